"""The program, with all its commands."""

from __future__ import annotations

import codecs
import io
import os
import sys
from contextlib import suppress

import click

from snapd_native import __version__
from snapd_native.cli import processes, snapshots, upkeep
from snapd_native.cli.exits import INTERRUPTED, status
from snapd_native.errors import SnapdError

_EPILOG = """\b
Exit status: 0 done, 1 internal error, or check has found a problem, 2 wrong usage,
3 invalid argument, 4 not found, 5 already exists, 6 failed precondition,
7 resource exhausted, 8 data loss, 9 cancelled, 10 service unavailable,
11 access denied, 12 interactive authorization required, 130 ended by Ctrl-C.
"""

_COMMANDS = [
    snapshots.prepare,
    snapshots.view,
    snapshots.commit,
    snapshots.mounts,
    snapshots.mount,
    snapshots.umount,
    snapshots.stat,
    snapshots.ls,
    snapshots.tree,
    snapshots.label,
    snapshots.usage,
    snapshots.rm,
    upkeep.check,
    upkeep.verify,
    upkeep.jobs,
    upkeep.cancel,
    upkeep.cleanup,
    processes.daemon,
    processes.containerd,
    processes.demo,
]


def main() -> None:
    """Run the program."""
    codecs.register_error("snapd-native", _encoded)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="snapd-native")
    try:
        cli.main(prog_name="snapd-native", standalone_mode=False)
    except click.Abort:
        sys.exit(INTERRUPTED)
    except click.UsageError as error:
        path = error.ctx.command_path if error.ctx else "snapd-native"
        click.echo(f"snapd-native: {error.format_message()} See {path} --help.", err=True)
        sys.exit(error.exit_code)
    except SnapdError as error:
        click.echo(f"snapd-native: {error.message}", err=True)
        sys.exit(status(error))
    except BrokenPipeError:
        # The reader of a pipe has closed it. Python would report an error at exit for what it could
        # not flush.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(0)


def _encoded(error: UnicodeError) -> tuple[str | bytes, int]:
    """Print the number of a character that the encoding of the terminal lacks.

    A byte of the command line that is not text is printed as it is. See codecs.register_error.
    """
    for handler in ("surrogateescape", "backslashreplace"):
        with suppress(UnicodeError):
            return codecs.lookup_error(handler)(error)
    raise error


@click.group(
    commands=_COMMANDS, epilog=_EPILOG, context_settings={"help_option_names": ["-h", "--help"]}
)
@click.version_option(__version__, "--version", prog_name="snapd-native")
@click.option(
    "--instance",
    metavar="NAME",
    default="",
    envvar="SNAPD_NATIVE_INSTANCE",
    help="Use the service org.snapdnative1.NAME. [default: $SNAPD_NATIVE_INSTANCE, none]",
)
@click.pass_context
def cli(context: click.Context, instance: str) -> None:
    """Keep snapshots of directory trees: prepare, commit and view them."""
    context.obj = instance
