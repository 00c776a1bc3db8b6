"""The plugin as a process: listen on a Unix socket, serve and end."""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import socket
import stat
from pathlib import Path
from urllib.parse import quote

import grpc
from sdnotify import SystemdNotifier

from snapd_native.containerd.service import Service
from snapd_native.containerd.snapshots import Snapshots
from snapd_native.errors import FailedPrecondition, InvalidArgument, Unavailable
from snapd_native.model import quote_path

log = logging.getLogger(__name__)

GRACE = 10.0
"""Seconds for running calls after SIGTERM; after that, calls that copy are undone."""

MAX_SOCKET = 107
"""The maximum length of the path of a Unix socket, in bytes; see unix(7)."""


def run(instance: str, path: Path, name: str, usage_age: float) -> None:
    """Serve the containerd that is called ``name`` until SIGTERM or SIGINT.

    Raises:
        SnapdError: the plugin cannot start.
    """
    os.umask(0o077)
    asyncio.run(_serve(Snapshots(instance, name, usage_age), path))


async def _serve(snapshots: Snapshots, path: Path) -> None:
    stop = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, stop.set)
    # The errors of gRPC are not sentences, and a server that has not started prints a traceback
    # when Python ends.
    _prepare_place(path)
    # The socket has the mode 0600 from the start: chmod would follow a symbolic link that has
    # replaced it.
    os.umask(0o177)
    server = grpc.aio.server(handlers=[Service(snapshots).handler()])
    server.add_insecure_port(f"unix:{quote(os.fsencode(path))}")
    try:
        await server.start()
        SystemdNotifier().notify("READY=1")
        log.info("serving containerd's snapshots on %s", quote_path(str(path)))
        await stop.wait()
        SystemdNotifier().notify("STOPPING=1")
        await server.stop(GRACE)
    finally:
        await snapshots.close()
        path.unlink(missing_ok=True)


def _prepare_place(path: Path) -> None:
    """Make the directory of the socket, delete an old socket, and check that a new one can be made.

    Raises:
        InvalidArgument: the path is too long.
        FailedPrecondition: the path is not a socket, or another process serves on it.
        Unavailable: the socket cannot be made.
    """
    shown = quote_path(str(path))
    if len(os.fsencode(path)) > MAX_SOCKET:
        raise InvalidArgument(
            f"the path {shown} is over {MAX_SOCKET} bytes long: choose a shorter one"
        )
    try:
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        _delete_unused(path)
        with socket.socket(socket.AF_UNIX) as trial:
            trial.bind(str(path))
        path.unlink()
    except OSError as error:
        raise Unavailable(
            f"the socket {shown} cannot be made ({error.strerror}): choose another"
        ) from None


def _delete_unused(path: Path) -> None:
    """Delete the socket of an ended process; refuse a path with anything else."""
    try:
        if not stat.S_ISSOCK(path.lstat().st_mode):
            raise FailedPrecondition(
                f"{quote_path(str(path))} is not a socket: choose another path"
            )
    except FileNotFoundError:
        return
    with socket.socket(socket.AF_UNIX) as other:
        # A process that accepts no connection would block this one.
        other.setblocking(False)
        try:
            other.connect(str(path))
        except ConnectionRefusedError:
            path.unlink()
            return
        except BlockingIOError:
            pass
    raise FailedPrecondition(
        f"another process serves on {quote_path(str(path))}: end it, or choose another path"
    )
