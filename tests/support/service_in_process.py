"""Run a service in the process of the test, so that its functions can be patched."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, closing
from pathlib import Path

from dbus_next.constants import NameFlag

from snapd_native.bus.dispatch import Dispatcher
from snapd_native.bus.lanes import Lanes
from snapd_native.model import Change
from snapd_native.snapshotter import Snapshotter
from snapd_native.wire.names import BUS_NAME


@asynccontextmanager
async def serve_in_process(state: Path) -> AsyncIterator[Dispatcher]:
    """Answer calls in the block, on the bus of `on_bus`. Clients can be in this process, too."""
    loop = asyncio.get_running_loop()

    def announce(change: Change) -> None:
        loop.call_soon_threadsafe(dispatcher.announce, change)

    with (
        closing(Snapshotter(state, announce, runtime=state.parent / "run")) as engine,
        closing(Lanes()) as lanes,
    ):
        dispatcher = Dispatcher(engine, lanes)
        await dispatcher.start()
        name = [BUS_NAME, NameFlag.DO_NOT_QUEUE.value]
        await dispatcher.connection.ask_driver("RequestName", "su", name)
        try:
            yield dispatcher
        finally:
            dispatcher.connection.disconnect()
