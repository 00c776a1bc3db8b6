"""The program, and the commands that run processes.

What needs D-Bus or rich is imported by the command that needs it, so that help comes at once.
"""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Sequence
from pathlib import Path

import click

from snapd_native import __version__
from snapd_native.cli import snapshots, upkeep
from snapd_native.cli.exits import INTERRUPTED, status
from snapd_native.errors import AccessDenied, SnapdError

_EPILOG = """\b
Exit status: 0 done, 1 internal error, or check has found something, 2 wrong usage,
3 invalid argument, 4 not found, 5 already exists, 6 failed precondition,
7 resource exhausted, 8 data loss, 9 cancelled, 10 service unavailable,
11 access denied, 12 interactive authorization required.
"""

_COMMANDS: Sequence[click.Command] = [
    *(snapshots.prepare, snapshots.view, snapshots.commit, snapshots.rm),
    *(snapshots.stat, snapshots.ls, snapshots.tree, snapshots.label, snapshots.usage),
    *(snapshots.mounts, snapshots.mount, snapshots.umount),
    *(upkeep.check, upkeep.verify, upkeep.jobs, upkeep.cancel, upkeep.cleanup),
]


def main() -> None:
    """Run the program."""
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
        # The reader of a pipe has seen enough. Python would complain at exit about what it could
        # not flush.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(0)


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


@cli.command()
@click.option(
    "--state-directory",
    type=click.Path(path_type=Path, file_okay=False),
    help="Where snapshots and metadata lie."
    " [default: $STATE_DIRECTORY, /var/lib/snapd-native[@NAME]]",
)
@click.option(
    "--runtime-directory",
    type=click.Path(path_type=Path, file_okay=False),
    help="Where mounts are made. [default: $RUNTIME_DIRECTORY, /run/snapd-native[@NAME]]",
)
@click.option(
    "--standby-free",
    type=click.FloatRange(0, 100),
    metavar="PERCENT",
    default=10,
    show_default=True,
    help="Space and inodes that standby clones leave free.",
)
@click.option("-v", "--verbose", "level", flag_value=logging.DEBUG, help="Log reads too.")
@click.option("-q", "--quiet", "level", flag_value=logging.WARNING, help="Log problems only.")
@click.pass_obj
def daemon(
    instance: str,
    state_directory: Path | None,
    runtime_directory: Path | None,
    standby_free: float,
    level: int | None,
) -> None:
    """Serve on the system bus; systemd runs this."""
    from snapd_native import logs
    from snapd_native.daemon import run
    from snapd_native.wire.names import bus_name, unit_name

    logs.configure(level or logging.INFO)
    if os.geteuid() != 0:
        raise AccessDenied("the daemon needs root: run it as root")
    name = bus_name(instance)
    unit = unit_name(name)
    state = state_directory or Path(os.environ.get("STATE_DIRECTORY", f"/var/lib/{unit}"))
    runtime = runtime_directory or Path(os.environ.get("RUNTIME_DIRECTORY", f"/run/{unit}"))
    sys.exit(run(name, state.absolute(), runtime.absolute(), standby_free / 100))


@cli.command()
@click.option(
    "--tree",
    "source",
    type=click.Path(path_type=Path, exists=True, file_okay=False),
    default=Path("/usr/share"),
    show_default=True,
    help="The directory tree to take.",
)
@click.option(
    "--directory",
    type=click.Path(path_type=Path, exists=True, file_okay=False),
    default=Path("/var/tmp"),  # noqa: S108 - a private directory is made in it
    show_default=True,
    help="Where the demonstration keeps its snapshots meanwhile.",
)
def demo(source: Path, directory: Path) -> None:
    """Show the service at work, on a private bus and on a real tree of this machine."""
    from snapd_native.cli.demo import run

    if os.geteuid() != 0:
        raise AccessDenied("the demonstration starts the daemon: run it as root")
    try:
        run(source, directory)
    except KeyboardInterrupt:
        raise click.Abort from None
