"""OpenTree over the bus leaves no descriptors open in the daemon."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable, Coroutine
from contextlib import (
    AbstractAsyncContextManager,
)
from pathlib import Path
from typing import Any

import pytest
from dbus_next.constants import MessageFlag
from dbus_next.message import Message
from dbus_next.signature import Variant

from snapd_native.wire.names import BUS_NAME, MANAGER, OBJECT_PATH
from tests.support.bus_mounts import (
    MOUNT,
    OPEN_TREE,
    UNMOUNT,
    connect_as_nobody,
)
from tests.support.descriptors import descriptors, wait_until_closed
from tests.support.file_systems import on_ext4
from tests.support.kernel_mounts import make_target, mounts_below
from tests.support.service import (
    HANG_TIMEOUT,
    Service,
    connection,
)

pytestmark = on_ext4


async def open_trees_and_close_them(bus: connection, number: int) -> None:
    for _ in range(number // 50):
        calls = [
            bus.request(BUS_NAME, OBJECT_PATH, MANAGER, "OpenTree", OPEN_TREE, [key, {}])
            for key in ["work", "look"] * 25
        ]
        for (fd,) in await asyncio.gather(*calls):
            os.close(fd)


async def want_no_reply(bus: connection, number: int) -> None:
    for _ in range(number // 200):
        for _ in range(200):
            await bus.send(open_tree(MessageFlag.NO_REPLY_EXPECTED))
        # Wait for this reply, so that there are never too many open calls.
        await bus.ask(member="ListMounts", signature="s", body=[""])


async def leave_before_the_reply(__: connection, number: int) -> None:
    for _ in range(number // 50):
        async with connection() as bus:
            calls = [asyncio.ensure_future(bus.call(open_tree())) for _ in range(50)]
            await asyncio.wait(calls, return_when=asyncio.FIRST_COMPLETED)
        await asyncio.gather(*calls, return_exceptions=True)


async def read_nothing(__: connection, number: int) -> None:
    for _ in range(number // 100):
        async with connection() as bus:
            asyncio.get_running_loop().remove_reader(bus._fd)
            await asyncio.gather(*(bus.send(open_tree()) for _ in range(100)))


def open_tree(flags: MessageFlag = MessageFlag.NONE) -> Message:
    return Message(
        destination=BUS_NAME,
        path=OBJECT_PATH,
        interface=MANAGER,
        member="OpenTree",
        signature=OPEN_TREE,
        body=["work", {}],
        flags=flags,
    )


@pytest.mark.parametrize(
    "scenario",
    [open_trees_and_close_them, want_no_reply, leave_before_the_reply, read_nothing],
)
@pytest.mark.parametrize("number", [200, pytest.param(10_000, marks=pytest.mark.long)])
def test_many_open_tree_calls_leave_no_open_descriptors(
    populated_service: Service,
    scenario: Callable[[connection, int], Coroutine[Any, Any, None]],
    number: int,
) -> None:
    async def asking() -> None:
        async with asyncio.timeout(HANG_TIMEOUT), connection() as bus:
            await bus.ask(member="ListMounts", signature="s", body=[""])
            before = descriptors(populated_service)
            await scenario(bus, number)
            await asyncio.to_thread(wait_until_closed, populated_service, before)
            # The daemon still answers this connection.
            await bus.ask(member="ListMounts", signature="s", body=[""])

    asyncio.run(asking())


@pytest.mark.parametrize("who", [connection, connect_as_nobody])
def test_the_daemon_keeps_no_descriptor_sent_with_a_mount_call(
    populated_service: Service,
    places: Path,
    who: Callable[[], AbstractAsyncContextManager[connection]],
) -> None:
    here = str(make_target(places))
    before = descriptors(populated_service)

    async def scenario() -> set[str]:
        names = set()
        option = {"read-only": Variant("h", 0)}
        async with who() as bus:
            with open("/dev/null", "rb") as file:
                for _ in range(50):
                    for member, signature, body in (
                        ("Mount", MOUNT, ["work", here, option]),
                        ("Unmount", UNMOUNT, [here, {"lazy": Variant("h", 3)}]),
                        ("OpenTree", OPEN_TREE, ["work", option]),
                        ("ListMounts", "h", [2]),
                    ):
                        fds = [file.fileno()] * 4
                        reply = await bus.ask(
                            member=member, signature=signature, body=body, unix_fds=fds
                        )
                        names.add(reply.error_name.rpartition(".")[2])
            wait_until_closed(populated_service, before)
        return names

    assert asyncio.run(scenario()) == {
        "AccessDenied" if who is connect_as_nobody else "InvalidArgument"
    }
    assert mounts_below(places) == []
