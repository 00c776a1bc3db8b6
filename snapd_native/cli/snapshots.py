"""Commands on snapshots.

Commands import D-Bus and rich only when they run, so that help appears at once.
"""

from __future__ import annotations

import os

import click

from snapd_native.cli.options import connected, json_option, labels_option, parsed_labels
from snapd_native.errors import NotFound
from snapd_native.model import quote


@click.command()
@click.argument("key")
@click.argument("parent", default="")
@labels_option
@json_option
def prepare(key: str, parent: str, labels: tuple[str, ...], as_json: bool) -> None:
    """Make the active snapshot KEY, empty or a copy of PARENT.

    Ctrl-C cancels the copy and removes what was copied.
    """
    from snapd_native.cli import render

    given = parsed_labels(labels)
    with connected() as client:
        with render.progress("Preparing", key) as progress:
            mount = client.prepare(key, parent, given, progress)
        render.mount(mount, as_json=as_json)


@click.command()
@click.argument("key")
@click.argument("parent", default="")
@labels_option
@json_option
def view(key: str, parent: str, labels: tuple[str, ...], as_json: bool) -> None:
    """Make the read-only view KEY of PARENT."""
    from snapd_native.cli import render

    given = parsed_labels(labels)
    with connected() as client:
        render.mount(client.view(key, parent, given), as_json=as_json)


@click.command()
@click.argument("name")
@click.argument("key")
@click.option(
    "--parent", default="", help="Set the parent of a snapshot that was prepared without one."
)
@click.option("--digest", is_flag=True, help="Record a digest of the tree, for verify.")
@labels_option
def commit(name: str, key: str, parent: str, digest: bool, labels: tuple[str, ...]) -> None:
    """Make the active snapshot KEY the committed snapshot NAME.

    After this command the snapshot survives a power cut, and its files and directories are
    immutable. The labels of KEY are deleted.
    """
    from snapd_native.cli import render

    given = parsed_labels(labels)
    with connected() as client, render.progress("Committing", key) as progress:
        client.commit(name, key, given, parent, progress, digest)


@click.command()
@click.argument("key", default="")
@click.argument("target", default="/mnt")
@json_option
@click.option("--fstab", "form", flag_value="fstab", help="Print a line for /etc/fstab.")
@click.option("--command", "form", flag_value="command", help="Print a command for the shell.")
def mounts(key: str, target: str, as_json: bool, form: str | None) -> None:
    """List mounts, or print how to mount KEY on TARGET by hand.

    KEY is an active snapshot or a view. The default of TARGET is /mnt.
    """
    from snapd_native.cli import render

    if form and (as_json or not key):
        raise click.UsageError(f"--{form} needs a KEY and cannot be used with --json.")
    with connected() as client:
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


@click.command()
@click.argument("key")
@click.argument("target", default="")
@click.option(
    "--read-only", is_flag=True, help="Mount an active snapshot read-only; a view always is."
)
def mount(key: str, target: str, read_only: bool) -> None:
    """Mount the active snapshot or view KEY on TARGET.

    Print the directory of the mount. Without TARGET, the service makes a directory. The mount stays
    until umount. After a reboot the service makes it again.
    """
    with connected() as client:
        print(client.mount(key, os.path.abspath(target) if target else "", read_only or None))


@click.command()
@click.argument("what", metavar="TARGET|KEY")
@click.option("--lazy", is_flag=True, help="Unmount also what is in use.")
def umount(what: str, lazy: bool) -> None:
    """Unmount the directory TARGET, or every mount of KEY."""
    with connected() as client:
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


@click.command()
@click.argument("key")
@json_option
def stat(key: str, as_json: bool) -> None:
    """Print the record and the ready standby clones of KEY."""
    from snapd_native.cli import render

    with connected() as client:
        info = client.stat(key)
        render.stat(info, as_json=as_json, standby=client.standby(key))


@click.command()
@click.argument("filters", nargs=-1, metavar="[FILTER]...")
@json_option
def ls(filters: tuple[str, ...], as_json: bool) -> None:
    """List all snapshots, or those that match at least one FILTER.

    A FILTER is a list of conditions that must all hold, separated by commas. Conditions are about
    name, parent, kind and labels. Examples: kind==committed,labels.app==web or name~=^build- or
    labels."org/tier".
    """
    from snapd_native.cli import render

    with connected() as client:
        render.table(client.walk(filters), as_json=as_json)


@click.command()
@json_option
def tree(as_json: bool) -> None:
    """Print all snapshots as a tree of parents and children."""
    from snapd_native.cli import render

    with connected() as client:
        render.lineage(client.walk(), as_json=as_json)


@click.command()
@click.argument("name")
@click.argument("changes", nargs=-1, metavar="[KEY=VALUE | KEY-]...")
@click.option("--replace", is_flag=True, help="Delete all other labels.")
@json_option
def label(name: str, changes: tuple[str, ...], replace: bool, as_json: bool) -> None:
    """Set labels of NAME by KEY=VALUE, and delete them by KEY-."""
    from snapd_native.cli import render

    if not changes and not replace:
        raise click.UsageError("Give at least one KEY=VALUE or KEY-, or --replace.")
    deleted = {change[:-1] for change in changes if "=" not in change and change.endswith("-")}
    given = parsed_labels(tuple(c for c in changes if c[:-1] not in deleted or "=" in c))
    paths = ["labels"] if replace else [f"labels.{key}" for key in [*given, *sorted(deleted)]]
    with connected() as client:
        render.stat(client.update(name, given, paths), as_json=as_json)


@click.command()
@click.argument("keys", nargs=-1, required=True, metavar="KEY...")
@json_option
def usage(keys: tuple[str, ...], as_json: bool) -> None:
    """Print the disk usage of each KEY."""
    from snapd_native.cli import render

    with connected() as client:
        render.usage([(key, client.usage(key)) for key in keys], as_json=as_json)


@click.command()
@click.argument("keys", nargs=-1, required=True, metavar="KEY...")
def rm(keys: tuple[str, ...]) -> None:
    """Remove each KEY. The service deletes its data in the background."""
    with connected() as client:
        for key in keys:
            client.remove(key)
