"""The service as a process: recover, connect, serve and end."""

from __future__ import annotations

import asyncio
import logging
import os
import resource
import signal
import sys
import threading
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any

from dbus_next.constants import NameFlag, RequestNameReply
from sdnotify import SystemdNotifier

from snapd_native.bus.dispatch import Dispatcher
from snapd_native.bus.lanes import Lane, Lanes
from snapd_native.errors import DataLoss, SnapdError, Unavailable
from snapd_native.model import Change, quote_path
from snapd_native.snapshotter import Snapshotter
from snapd_native.snapshotter.failures import explained
from snapd_native.wire.connection import Connection

log = logging.getLogger(__name__)

GRACE = 10.0
"""Seconds for running calls after SIGTERM; then those that copy are undone."""

_EXTENSION = 30
"""Seconds of start-up time that are requested from systemd repeatedly during recovery."""

SYSTEMD_SECONDS = 10.0
"""How long systemd may take to answer a question."""

SWITCH_SECONDS = 0.0005
"""Seconds after which Python switches threads while one computes, as for a List with filters.

A short call needs four switches. With Python's 5 ms, Stat took twice as long beside two Lists.
"""


_ENDING = (signal.SIGTERM, signal.SIGINT)


def run(name: str, state: Path, runtime: Path, least_free: float) -> int:
    """Serve as ``name`` on the bus until SIGTERM or SIGINT; return the process's exit status."""
    # Files of the service are for root only, unless a mode is set explicitly.
    os.umask(0o077)
    sys.setswitchinterval(SWITCH_SECONDS)
    # A walk keeps up to two hundred directories open, and many run at once.
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    try:
        with explained(f"make the runtime directory {quote_path(str(runtime))}"):
            runtime.mkdir(mode=0o700, parents=True, exist_ok=True)
        engine = partial(Snapshotter, state, least_free=least_free, runtime=runtime)
        asyncio.run(_Daemon(name, engine).serve())
    except (SnapdError, OSError) as error:
        log.critical("%s", error)
        return 1
    return 0


class _Daemon:
    def __init__(self, name: str, engine: Callable[..., Snapshotter]) -> None:
        self._name = name
        self._engine = engine
        self._systemd = SystemdNotifier()
        self._stop = asyncio.Event()
        self._dispatcher: Dispatcher | None = None

    async def serve(self) -> None:
        loop = asyncio.get_running_loop()
        for number in _ENDING:
            loop.add_signal_handler(number, self._stop.set)
        try:
            await self._serve(loop)
        finally:
            # After the end of the loop another signal would kill the process, and so change its
            # exit status.
            for number in _ENDING:
                loop.remove_signal_handler(number)
                signal.signal(number, signal.SIG_IGN)

    async def _serve(self, loop: asyncio.AbstractEventLoop) -> None:
        snapshotter = await self._recovered(loop, await _soft_reboots())
        if snapshotter is None:
            return
        lanes = Lanes()
        try:
            dispatcher = Dispatcher(snapshotter, lanes)
            self._dispatcher = dispatcher
            await dispatcher.start()
            await self._take_name(dispatcher)
            log.info(
                "serving %s on %s as %s, reflink %s",
                snapshotter.state_directory,
                snapshotter.filesystem_type,
                self._name,
                "works" if snapshotter.reflink else "does not work",
            )
            self._notify(f"READY=1\n{_serving(snapshotter)}")
            lost = asyncio.ensure_future(dispatcher.connection.wait_for_disconnect())
            async with self._watchdog(lanes, snapshotter):
                asked = asyncio.ensure_future(self._stop.wait())
                await asyncio.wait({lost, asked}, return_when=asyncio.FIRST_COMPLETED)
                asked.cancel()
                await self._leave(dispatcher, snapshotter)
            if not self._stop.is_set():
                with suppress(Exception):
                    await lost
                raise Unavailable("the system bus closed the connection: the service ends")
            dispatcher.connection.disconnect()
            with suppress(Exception):
                await lost
        finally:
            snapshotter.stop()
            lanes.close()
            snapshotter.close()

    async def _recovered(
        self, loop: asyncio.AbstractEventLoop, soft_reboots: int
    ) -> Snapshotter | None:
        """Open the engine, and request more time from systemd while orphans are deleted.

        Return None if the daemon is stopped before that is done.
        """

        def announce(change: Change) -> None:
            loop.call_soon_threadsafe(self._emit, change)

        self._notify("STATUS=Deleting what the last run left")
        halt = threading.Event()
        engine = partial(self._engine, announce=announce, stopping=halt, soft_reboots=soft_reboots)
        recovery = loop.run_in_executor(None, engine)
        asked = asyncio.ensure_future(self._stop.wait())
        while not recovery.done() and not asked.done():
            self._notify(f"EXTEND_TIMEOUT_USEC={_EXTENSION * 1_000_000}")
            either: set[asyncio.Future[Any]] = {recovery, asked}
            first = asyncio.FIRST_COMPLETED
            await asyncio.wait(either, timeout=_EXTENSION / 3, return_when=first)
        if asked.done():
            halt.set()
        asked.cancel()
        try:
            return await recovery
        except Unavailable:
            if halt.is_set():
                return None
            raise

    def _notify(self, state: str) -> None:
        # SystemdNotifier encodes as Latin-1, systemd reads UTF-8.
        self._systemd.notify(state.encode(errors="replace").decode("latin-1"))

    def _emit(self, change: Change) -> None:
        if self._dispatcher is not None:
            self._dispatcher.announce(change)

    async def _take_name(self, dispatcher: Dispatcher) -> None:
        try:
            (reply,) = await dispatcher.connection.ask_driver(
                "RequestName", "su", [self._name, NameFlag.DO_NOT_QUEUE.value]
            )
        except SnapdError as error:
            raise Unavailable(
                f"the bus does not give the name {self._name} ({error}): install the bus policy"
                " dbus/org.snapdnative1.conf, and run the daemon as root"
            ) from None
        if reply != RequestNameReply.PRIMARY_OWNER.value:
            raise Unavailable(
                f"the name {self._name} is taken by another process: stop that daemon first"
            )

    async def _leave(self, dispatcher: Dispatcher, snapshotter: Snapshotter) -> None:
        self._notify("STOPPING=1\nSTATUS=Waiting for running calls")
        dispatcher.refuse()
        if not await dispatcher.finish(GRACE):
            log.info("undoing the calls that are still running")
            snapshotter.stop()
            await dispatcher.finish(None)
        # No call comes after the name is released. The bus answers after it has delivered all that
        # was sent before. If a client does not read, the bus never answers.
        for member, signature, body in (("ReleaseName", "s", [self._name]), ("GetId", "", [])):
            if dispatcher.connection.connected:
                asking = dispatcher.connection.ask_driver(member, signature, body)
                with suppress(SnapdError, TimeoutError):
                    await asyncio.wait_for(asking, GRACE)
                await dispatcher.finish(GRACE)

    @asynccontextmanager
    async def _watchdog(self, lanes: Lanes, snapshotter: Snapshotter) -> AsyncIterator[None]:
        """Notify the watchdog of systemd, if it is on, while event loop and threads work."""
        interval = int(os.environ.get("WATCHDOG_USEC", "0")) / 1_000_000
        task = asyncio.ensure_future(self._feed(interval / 3, lanes, snapshotter))
        try:
            yield
        finally:
            task.cancel()
            with suppress(asyncio.CancelledError):
                await task

    async def _feed(self, period: float, lanes: Lanes, snapshotter: Snapshotter) -> None:
        while period:
            checking = asyncio.ensure_future(_check_lanes(lanes, snapshotter))
            try:
                waited = False
                # Hanging threads trigger the watchdog. Threads that wait for the disk do not: a
                # restart would not help, and a frozen file system often means that a backup runs.
                while not (await asyncio.wait({checking}, timeout=period))[0]:
                    if lanes.waits_for_disk():
                        waited = True
                        self._notify(f"WATCHDOG=1\n{_WAITING}")
                if waited:
                    self._notify(_serving(snapshotter))
                if checking.result():
                    self._notify("WATCHDOG=1")
            finally:
                checking.cancel()
            await asyncio.sleep(period)


async def _soft_reboots() -> int:
    """Return how often user space was restarted since the kernel was booted; 0 without systemd.

    That is known since systemd 257. Each of these restarts unmounts what a reboot would unmount,
    under the same boot id; see systemd-soft-reboot.service(8).

    Raises:
        Unavailable: the bus cannot be reached, or systemd does not answer.
    """
    connection = Connection()
    await connection.open()
    try:
        async with asyncio.timeout(SYSTEMD_SECONDS):
            (count,) = await connection.request(
                "org.freedesktop.systemd1",
                "/org/freedesktop/systemd1",
                "org.freedesktop.DBus.Properties",
                "Get",
                "ss",
                ["org.freedesktop.systemd1.Manager", "SoftRebootsCount"],
            )
    except TimeoutError:
        raise Unavailable("systemd does not answer on the bus: start the service again") from None
    except SnapdError as error:
        if not connection.connected:
            raise
        log.debug("soft reboots are not recognized: %s", error)
        return 0
    finally:
        connection.disconnect()
    return int(count.value)


_WAITING = "STATUS=Waiting for the disk: thaw its file system if that is frozen"


def _serving(snapshotter: Snapshotter) -> str:
    return f"STATUS=Serving {snapshotter.state_directory}"


async def _check_lanes(lanes: Lanes, snapshotter: Snapshotter) -> bool:
    """Wait for a thread of each quick lane; return False if a lane is full."""
    try:
        for lane in (Lane.READ, Lane.CHANGE):
            await lanes.run(lane, os.geteuid(), partial(_check_health, snapshotter))
    except SnapdError as error:
        log.error("the service is not well: %s", error)
        return False
    return True


def _check_health(snapshotter: Snapshotter) -> None:
    """Log an unreadable metastore. A restart would not help, and callers get the reason."""
    try:
        snapshotter.check_health()
    except DataLoss as error:
        log.error("the service is not well: %s", error)
