"""Commands and their arguments.

What needs D-Bus or rich is imported by the command that needs it, so that help comes at once.
"""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

import click

from snapd_native import __version__
from snapd_native.cli.exits import FINDINGS, INTERRUPTED, status
from snapd_native.errors import AccessDenied, InvalidArgument, NotFound, SnapdError, Unavailable
from snapd_native.model import DIGEST_LABEL, quote, shown

if TYPE_CHECKING:
    from snapd_native.client import BlockingClient

_Command = TypeVar("_Command", bound=Callable[..., None])

_EPILOG = """\b
Exit status: 0 done, 1 internal error, or check has found something, 2 wrong usage,
3 invalid argument, 4 not found, 5 already exists, 6 failed precondition,
7 resource exhausted, 8 data loss, 9 cancelled, 10 service unavailable,
11 access denied, 12 interactive authorization required.
"""


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


@click.group(epilog=_EPILOG, context_settings={"help_option_names": ["-h", "--help"]})
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


_json = click.option("--json", "as_json", is_flag=True, help="Print JSON.")


def _labels_option(command: _Command) -> _Command:
    return click.option(
        "-l",
        "--label",
        "labels",
        multiple=True,
        metavar="KEY=VALUE",
        help="Set a label; may be repeated.",
    )(command)


@contextmanager
def _client() -> Iterator[BlockingClient]:
    from snapd_native.client import BlockingClient

    try:
        with BlockingClient(click.get_current_context().obj) as client:
            yield client
    except KeyboardInterrupt:
        raise click.Abort from None


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
@click.argument("key")
@click.argument("parent", default="")
@_labels_option
@_json
def prepare(key: str, parent: str, labels: tuple[str, ...], as_json: bool) -> None:
    """Make the active snapshot KEY: empty, or a private copy of PARENT.

    Ctrl-C cancels the copy, and leaves nothing of it.
    """
    from snapd_native.cli import render

    given = _parsed_labels(labels)
    with _client() as client:
        with render.progress("Preparing", key) as progress:
            mount = client.prepare(key, parent, given, progress)
        render.mount(mount, as_json=as_json)


@cli.command()
@click.argument("key")
@click.argument("parent", default="")
@_labels_option
@_json
def view(key: str, parent: str, labels: tuple[str, ...], as_json: bool) -> None:
    """Make the read-only view KEY of PARENT."""
    from snapd_native.cli import render

    given = _parsed_labels(labels)
    with _client() as client:
        render.mount(client.view(key, parent, given), as_json=as_json)


@cli.command()
@click.argument("name")
@click.argument("key")
@click.option("--parent", default="", help="Give a parent to a snapshot prepared without one.")
@click.option("--digest", is_flag=True, help="Record a digest of the tree, for verify.")
@_labels_option
def commit(name: str, key: str, parent: str, digest: bool, labels: tuple[str, ...]) -> None:
    """Make the active snapshot KEY the committed snapshot NAME.

    When this returns, the snapshot survives a power cut. Labels of KEY are not inherited.
    """
    from snapd_native.cli import render

    given = _parsed_labels(labels)
    with _client() as client, render.progress("Committing", key) as progress:
        client.commit(name, key, given, parent, progress, digest)


@cli.command()
@click.argument("key", default="")
@click.argument("target", default="/mnt")
@_json
@click.option("--fstab", "form", flag_value="fstab", help="Print a line for /etc/fstab.")
@click.option("--command", "form", flag_value="command", help="Print a command for the shell.")
def mounts(key: str, target: str, as_json: bool, form: str | None) -> None:
    """Print what is mounted; of the active snapshot or view KEY, how to mount it by hand.

    By hand, it would be mounted on TARGET, or on /mnt.
    """
    from snapd_native.cli import render

    if form and (as_json or not key):
        raise click.UsageError(f"--{form} needs a KEY, and goes without --json.")
    with _client() as client:
        if not key:
            render.mounted(client.list_mounts(), as_json=as_json)
            return
        mount = client.mounts(key)
    match form:
        case "fstab":
            render.fstab(mount, os.path.abspath(target))
        case "command":
            render.mount_command(mount, os.path.abspath(target))
        case _:
            render.mount(mount, as_json=as_json)


@cli.command()
@click.argument("key")
@click.argument("target", default="")
@click.option("--read-only", is_flag=True, help="Mount an active snapshot read-only, as a view is.")
def mount(key: str, target: str, read_only: bool) -> None:
    """Mount the active snapshot or view KEY on the directory TARGET, and print where.

    Without TARGET a directory is made for it. It stays mounted, also over a restart of the machine,
    until it is unmounted.
    """
    with _client() as client:
        print(client.mount(key, os.path.abspath(target) if target else "", read_only or None))


@cli.command()
@click.argument("what", metavar="TARGET|KEY")
@click.option("--lazy", is_flag=True, help="Unmount it also while it is in use.")
def umount(what: str, lazy: bool) -> None:
    """Unmount the directory TARGET, or all directories where KEY is mounted."""
    with _client() as client:
        mounted = client.list_mounts()
        path = os.path.abspath(what)
        if any(each.target == path for each in mounted):
            client.unmount(path, lazy)
            return
        targets = [each.target for each in mounted if each.key == what]
        if not targets:
            raise NotFound(f"{quote(what)} is not mounted: see snapd-native mounts")
        for target in targets:
            client.unmount(target, lazy)


@cli.command()
@click.argument("key")
@_json
def stat(key: str, as_json: bool) -> None:
    """Print the record of KEY, and how many of its standby clones are ready."""
    from snapd_native.cli import render

    with _client() as client:
        info = client.stat(key)
        render.stat(info, as_json=as_json, standby=client.standby(key))


@cli.command()
@click.argument("filters", nargs=-1, metavar="[FILTER]...")
@_json
def ls(filters: tuple[str, ...], as_json: bool) -> None:
    """List snapshots, all or those that match any FILTER.

    A FILTER is a comma-joined AND of conditions on name, parent, kind and labels:
    kind==committed,labels.app==web or name~=^build- or labels."org/tier".
    """
    from snapd_native.cli import render

    with _client() as client:
        render.table(client.walk(filters), as_json=as_json)


@cli.command()
@_json
def tree(as_json: bool) -> None:
    """Draw which snapshot descends from which."""
    from snapd_native.cli import render

    with _client() as client:
        render.lineage(client.walk(), as_json=as_json)


@cli.command()
@click.argument("name")
@click.argument("changes", nargs=-1, metavar="[KEY=VALUE | KEY-]...")
@click.option("--replace", is_flag=True, help="Drop all other labels.")
@_json
def label(name: str, changes: tuple[str, ...], replace: bool, as_json: bool) -> None:
    """Set labels of NAME by KEY=VALUE, and delete them by KEY-."""
    from snapd_native.cli import render

    if not changes and not replace:
        raise click.UsageError("Give at least one KEY=VALUE or KEY-, or --replace.")
    deleted = {change[:-1] for change in changes if "=" not in change and change.endswith("-")}
    given = _parsed_labels(tuple(c for c in changes if c[:-1] not in deleted or "=" in c))
    paths = ["labels"] if replace else [f"labels.{key}" for key in [*given, *sorted(deleted)]]
    with _client() as client:
        render.stat(client.update(name, given, paths), as_json=as_json)


@cli.command()
@click.argument("keys", nargs=-1, required=True, metavar="KEY...")
@_json
def usage(keys: tuple[str, ...], as_json: bool) -> None:
    """Print how much of the disk each KEY takes."""
    from snapd_native.cli import render

    with _client() as client:
        render.usage([(key, client.usage(key)) for key in keys], as_json=as_json)


@cli.command()
@click.argument("keys", nargs=-1, required=True, metavar="KEY...")
def rm(keys: tuple[str, ...]) -> None:
    """Remove each KEY; its data is deleted in the background."""
    with _client() as client:
        for key in keys:
            client.remove(key)


@cli.command()
@click.option("--repair", is_flag=True, help="Mend first what can be mended without losing data.")
@_json
def check(repair: bool, as_json: bool) -> None:
    """Compare records, directories and mounts.

    Each line is something that is wrong, with tabs in it: what it is about, the snapshot, and a
    sentence that says what to do. The exit status is 1 then. What was mended is told on the
    standard error.
    """
    from snapd_native.cli import render

    with _client() as client:
        mended = client.repair() if repair else []
        found = client.check()
    for finding in mended:
        about = f"{quote(finding.key)}: " if finding.key else ""
        click.echo(f"snapd-native: mended: {about}{shown(finding.what)}", err=True)
    render.findings(found, as_json=as_json)
    if found:
        sys.exit(FINDINGS)


@cli.command()
@click.argument("names", nargs=-1, metavar="[NAME]...")
@_json
def verify(names: tuple[str, ...], as_json: bool) -> None:
    """Compare each committed snapshot NAME with the digest that was recorded by commit --digest.

    Without a NAME all are verified that have one. All of each is read, at idle priority. The digest
    and the name are printed of those that are as they were committed; the others are told on the
    standard error, and the exit status is that of the first. Ctrl-C cancels the work.
    """
    from snapd_native.cli import render

    failed: list[SnapdError] = []
    verified = []
    every = f'kind==committed,labels."{DIGEST_LABEL}"'
    with _client() as client:
        for name in names or [info.name for info in client.walk([every])]:
            try:
                with render.progress("Verifying", name) as progress:
                    digest = client.verify(name, progress)
            except SnapdError as error:
                if isinstance(error, NotFound) and not names:
                    # It was removed since.
                    continue
                failed.append(error)
                click.echo(f"snapd-native: {error.message}", err=True)
                if isinstance(error, Unavailable):
                    break
            else:
                verified.append((name, digest))
                if not as_json:
                    render.verified(name, digest)
    if as_json:
        render.all_verified(verified)
    if failed:
        sys.exit(status(failed[0]))


@cli.command()
@_json
def jobs(as_json: bool) -> None:
    """Print what the service is doing that takes long, and how far it is."""
    from snapd_native.cli import render

    with _client() as client:
        found = []
        for job in client.jobs():
            # It may end before it is asked.
            with suppress(NotFound):
                found.append((job, client.progress(job.id)))
    render.jobs(found, as_json=as_json)


@cli.command()
@click.argument("ids", nargs=-1, required=True, type=click.IntRange(0), metavar="ID...")
def cancel(ids: tuple[int, ...]) -> None:
    """Cancel each job ID, and return when all it had done is undone."""
    with _client() as client:
        for id_ in ids:
            client.cancel(id_)


@cli.command()
def cleanup() -> None:
    """Return when all that was removed is deleted."""
    with _client() as client:
        client.cleanup()


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


def _parsed_labels(texts: tuple[str, ...]) -> dict[str, str]:
    labels = {}
    for text in texts:
        key, equals, value = text.partition("=")
        if not equals or not key:
            raise InvalidArgument(f"{quote(text)} is no label: write KEY=VALUE")
        labels[key] = value
    return labels
