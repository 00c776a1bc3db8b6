"""Commands that run the daemon."""

from __future__ import annotations

import logging
import os
import sys
from pathlib import Path

import click

from snapd_native.errors import AccessDenied, Unavailable


@click.command()
@click.option(
    "--state-directory",
    type=click.Path(path_type=Path, file_okay=False),
    help="The directory of snapshots and metadata."
    " [default: $STATE_DIRECTORY, /var/lib/snapd-native[@NAME]]",
)
@click.option(
    "--runtime-directory",
    type=click.Path(path_type=Path, file_okay=False),
    help="The directory of mounts without a target."
    " [default: $RUNTIME_DIRECTORY, /run/snapd-native[@NAME]]",
)
@click.option(
    "--standby-free",
    type=click.FloatRange(0, 100),
    metavar="PERCENT",
    default=10,
    show_default=True,
    help="The share of space and inodes that standby clones leave free.",
)
@click.option(
    "-v", "--verbose", "level", flag_value=logging.DEBUG, help="Also log calls that only read."
)
@click.option("-q", "--quiet", "level", flag_value=logging.WARNING, help="Log only problems.")
@click.pass_obj
def daemon(
    instance: str,
    state_directory: Path | None,
    runtime_directory: Path | None,
    standby_free: float,
    level: int | None,
) -> None:
    """Run the service on the system bus; systemd starts this."""
    _begin_in_utf8_mode()
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


def _begin_in_utf8_mode() -> None:
    """Start the program again in UTF-8 mode, unless the locale uses the encoding of D-Bus."""
    if sys.getfilesystemencoding() != "utf-8":
        os.execv(sys.executable, [sys.executable, "-X", "utf8", *sys.orig_argv[1:]])  # noqa: S606 - it is this program


@click.command()
@click.option(
    "--socket",
    type=click.Path(path_type=Path),
    default=Path("/run/snapd-native-containerd/containerd.sock"),
    show_default=True,
    help="The socket that containerd connects to.",
)
@click.option(
    "--name",
    default="containerd",
    show_default=True,
    help="The name of the containerd; each containerd of the same store needs its own.",
)
@click.option(
    "--usage-age",
    type=click.FloatRange(0),
    metavar="SECONDS",
    default=60,
    show_default=True,
    help="Measure the usage of an active snapshot again after this time.",
)
@click.pass_obj
def containerd(instance: str, socket: Path, name: str, usage_age: float) -> None:
    """Run the snapshots plugin of containerd; systemd starts this."""
    _begin_in_utf8_mode()
    from snapd_native import logs

    try:
        from snapd_native.containerd.server import run
    except ModuleNotFoundError as error:
        raise Unavailable(
            f"the Python package {error.name} is missing: install the package"
            " snapd-native-containerd, or snapd-native[containerd] with pip"
        ) from None

    logs.configure(logging.INFO)
    if os.geteuid() != 0:
        raise AccessDenied("the plugin needs root: run it as root")
    run(instance, socket.absolute(), name, usage_age)


@click.command()
@click.option(
    "--tree",
    "source",
    type=click.Path(path_type=Path, exists=True, file_okay=False),
    default=Path("/usr/share"),
    show_default=True,
    help="The directory tree that the demonstration copies.",
)
@click.option(
    "--directory",
    type=click.Path(path_type=Path, exists=True, file_okay=False),
    default=Path("/var/tmp"),  # noqa: S108 - a private directory is made in it
    show_default=True,
    help="The directory in which the demonstration keeps its snapshots.",
)
def demo(source: Path, directory: Path) -> None:
    """Show the service at work on a private bus."""
    from snapd_native.cli.demo import run

    if os.geteuid() != 0:
        raise AccessDenied("the demonstration starts the daemon: run it as root")
    try:
        run(source, directory)
    except KeyboardInterrupt:
        raise click.Abort from None
