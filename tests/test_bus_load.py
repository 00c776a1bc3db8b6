"""Many calls, large calls and callers that leave: nobody else is harmed and nothing is left."""

from __future__ import annotations

import asyncio
import os
import subprocess
from contextlib import AsyncExitStack, suppress
from pathlib import Path

import pytest
from dbus_next.aio.message_bus import MessageBus
from dbus_next.constants import MessageFlag, MessageType
from dbus_next.message import Message
from dbus_next.signature import Variant

from snapd_native.client import BlockingClient, Client
from snapd_native.errors import InvalidArgument, ResourceExhausted, SnapdError
from snapd_native.model import Added, Kind
from snapd_native.wire.names import (
    BUS_NAME,
    MANAGER,
    OBJECT_PATH,
    PEER,
)
from tests.service import (
    NOBODY,
    Service,
    as_user,
    check_sentence,
    committed,
    committed_big,
    connection,
    everything,
    refused,
    request,
    run,
    wait_until_held,
)


def test_who_wants_no_reply_gets_none(shared: Service) -> None:
    async def scenario(client: Client) -> list[Message]:
        replies: list[Message] = []
        async with client.changes() as changes, connection() as bus:

            def record(message: Message) -> None:
                if message.message_type is not MessageType.SIGNAL:
                    replies.append(message)

            bus.add_message_handler(record)
            for member, signature, body in (
                ("Stat", "s", ["none"]),
                ("None", "", []),
                ("Prepare", "ssa{sv}", ["key", "", {}]),
            ):
                message = Message(
                    destination=BUS_NAME,
                    path=OBJECT_PATH,
                    interface=MANAGER,
                    member=member,
                    signature=signature,
                    body=body,
                    flags=MessageFlag.NO_REPLY_EXPECTED,
                )
                await bus.send(message)
            assert await anext(changes) == Added("key", Kind.ACTIVE, "")
            for _ in range(10):
                await bus.ask(interface=PEER, member="Ping")
        return replies

    assert len(run(scenario)) == 10


def test_descriptors_are_not_taken(shared: Service, shared_client: BlockingClient) -> None:
    before = shared.descriptors()

    async def scenario() -> None:
        bus = await MessageBus(bus_address=shared.address, negotiate_unix_fd=True).connect()
        for member, signature in (("Stat", "h"), ("Ping", "h"), ("Prepare", "ah")):
            with open("/dev/null", "rb") as file:
                message = Message(
                    destination=BUS_NAME,
                    path=OBJECT_PATH,
                    member=member,
                    signature=signature,
                    body=[0 if signature == "h" else [0]],
                    unix_fds=[file.fileno()],
                )
                reply = await bus.call(message)
            assert reply is not None
            assert reply.message_type is MessageType.ERROR
        bus.disconnect()

    asyncio.run(scenario())
    shared_client.list()
    assert shared.descriptors() == before


@pytest.mark.parametrize("mebibytes", [10, 30])
def test_large_messages_are_refused(shared: Service, mebibytes: int) -> None:
    async def scenario(client: Client) -> None:
        async with connection() as bus:
            for member in ("Stat", "Mounts"):
                sending = bus.ask(member=member, signature="s", body=["x" * (mebibytes << 20)])
                reply, _ = await asyncio.gather(sending, client.list())
                assert reply.error_name == "org.snapdnative1.Error.InvalidArgument"
                check_sentence(reply.body[0], member, "4194304")

    run(scenario)


def test_large_messages_of_others_are_denied(
    shared: Service, shared_client: BlockingClient
) -> None:
    for member in ("Stat", "Prepare"):
        done = subprocess.run(
            [
                *as_user(NOBODY),
                *("busctl", f"--address={shared.address}", "call", BUS_NAME, OBJECT_PATH, MANAGER),
                *(member, "as", "100", *["x" * 15_000] * 100),
            ],
            check=False,
            capture_output=True,
            text=True,
        )
        assert "Access denied" in done.stderr
    assert shared_client.list() == []


def test_connections_leave_nothing(shared: Service, shared_client: BlockingClient) -> None:
    async def scenario() -> None:
        for _ in range(300):
            async with connection() as bus:
                await bus.ask(member="Stat", signature="s", body=["none"])

    shared_client.list()
    before = shared.descriptors()
    asyncio.run(scenario())
    shared_client.list()
    assert shared.descriptors() == before


def test_calls_leave_nothing(shared: Service, shared_client: BlockingClient) -> None:
    committed(shared_client, "base", files={"file": "text"})

    async def scenario(client: Client) -> None:
        async def one(number: int) -> None:
            for call in (
                client.view(f"{number}", "base"),
                client.mounts(f"{number}"),
                client.stat("none"),
                client.prepare("base"),
                client.prepare("new", "none"),
                client.list(["=bad"]),
                client.usage("base"),
                client.remove("base"),
                client.remove(f"{number}"),
                client.list(),
            ):
                with suppress(SnapdError):
                    await call

        for start in range(0, 200, 10):
            await asyncio.gather(*(one(number) for number in range(start, start + 10)))
        for _ in range(5):
            await client.prepare("key", "base")
            await client.usage("key")
            await client.remove("key")
        await client.cleanup()

    shared_client.list()
    before = shared.descriptors()
    run(scenario)
    assert shared.descriptors() == before


def test_a_prepare_outlives_its_caller(shared: Service, shared_client: BlockingClient) -> None:
    root = committed_big(shared_client, "big")

    async def scenario(client: Client) -> None:
        async with client.changes() as changes:
            async with Client() as leaving:
                preparing = asyncio.ensure_future(leaving.prepare("key", "big"))
                await wait_until_held(client, "key")
                assert not preparing.done()
            assert await anext(changes) == Added("key", Kind.ACTIVE, "big")
            preparing.cancel()

    run(scenario)
    copy = Path(shared_client.mounts("key").source)
    assert sum(1 for _ in copy.rglob("*")) == sum(1 for _ in root.rglob("*"))


def test_many_calls_at_once(shared: Service, shared_client: BlockingClient) -> None:
    shared_client.prepare("key")

    async def scenario() -> None:
        async with AsyncExitStack() as stack:
            clients = [await stack.enter_async_context(Client()) for _ in range(4)]
            infos = await asyncio.gather(
                *(client.stat("key") for client in clients for _ in range(128))
            )
            assert {info.name for info in infos} == {"key"}

    asyncio.run(scenario())


def test_too_many_long_calls_are_refused(shared: Service, shared_client: BlockingClient) -> None:
    """All wait for one deletion, in the lane of what may take long; others have their own lanes."""
    committed(shared_client, "base")
    committed_big(shared_client, "big", 60_000)

    async def scenario(client: Client) -> None:
        await client.remove("big")
        waiting = [asyncio.ensure_future(client.cleanup()) for _ in range(70)]
        async with Client() as other:
            while not any(task.done() for task in waiting):
                await other.stat("base")
            with refused(ResourceExhausted, "64"):
                await other.prepare("new", "base")
            assert [info.name for info in await other.list()] == ["base"]
            await other.view("view", "base")
            await other.update("view", {"a": "1"})
            await other.remove("view")
        outcomes = await asyncio.gather(*waiting, return_exceptions=True)
        failed = [outcome for outcome in outcomes if outcome is not None]
        assert [type(outcome) for outcome in failed] == [ResourceExhausted] * 6
        await client.prepare("new", "base")

    run(scenario)


def test_who_verifies_keeps_nobody_from_copying(
    shared: Service, shared_client: BlockingClient
) -> None:
    root = Path(shared_client.prepare("making").source)
    for number in range(500):
        (root / str(number)).write_bytes(os.urandom(20_000))
    shared_client.commit("base", "making", digest=True)

    async def scenario(client: Client) -> None:
        verifying = [asyncio.ensure_future(client.verify("base")) for _ in range(80)]
        async with Client() as other:
            while not any(task.done() for task in verifying):
                await other.stat("base")
            await other.prepare("copy", "base")
        outcomes = await asyncio.gather(*verifying, return_exceptions=True)
        refused = [one for one in outcomes if isinstance(one, BaseException)]
        assert [type(one) for one in refused] == [ResourceExhausted] * 16

    run(scenario)


def test_refused_calls_change_nothing(shared: Service, shared_client: BlockingClient) -> None:
    shared_client.prepare("key")
    before = everything(shared_client, shared)
    for signature in ("v", "a{sv}", "ssv", "aaaas"):
        values: dict[str, list[object]] = {
            "v": [Variant("v", Variant("v", Variant("s", "deep")))],
            "a{sv}": [{"key": Variant("as", ["key"])}],
            "ssv": ["key", "", Variant("a{ss}", {})],
            "aaaas": [[[[["key"]]]]],
        }
        for member in ("Prepare", "Commit", "Remove"):
            with refused(InvalidArgument, member):
                request(member, signature, *values[signature])
    assert everything(shared_client, shared) == before
    assert os.path.isdir(shared_client.mounts("key").source)
