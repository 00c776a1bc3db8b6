"""Many calls, large calls, and callers that leave: other clients are served, nothing leaks."""

from __future__ import annotations

import asyncio
import gc
import os
import subprocess
from contextlib import AsyncExitStack, suppress
from pathlib import Path
from typing import Any

import pytest
from dbus_next._private.marshaller import Marshaller
from dbus_next.aio.message_bus import MessageBus
from dbus_next.constants import MessageFlag, MessageType
from dbus_next.message import Message
from dbus_next.signature import Variant

from snapd_native.bus.incoming import Call
from snapd_native.bus.lanes import Lane
from snapd_native.client import BlockingClient, Client
from snapd_native.errors import InvalidArgument, ResourceExhausted, SnapdError, Unavailable
from snapd_native.metastore import records
from snapd_native.model import Added, Kind
from snapd_native.trees.relay import IDLE
from snapd_native.wire.names import (
    BUS_NAME,
    MANAGER,
    OBJECT_PATH,
    PEER,
)
from snapd_native.wire.values import Body
from tests.support.descriptors import descriptors, wait_until_closed, worker_pids
from tests.support.engine import open_engine, populate
from tests.support.file_systems import long_on_xfs
from tests.support.holding import HeldCalls, hold_at_files, hold_function
from tests.support.service import (
    NOBODY,
    Service,
    as_user,
    call_method,
    check_sentence,
    commit_snapshot,
    connection,
    expect_error,
    run_with_client,
    snapshots_and_directories,
)
from tests.support.service_in_process import serve_in_process
from tests.support.waiting import WAIT_TIMEOUT

pytestmark = long_on_xfs


@pytest.mark.parametrize(
    ("member", "signature", "body"),
    [
        ("Prepare", "ssa{sv}", ["new", "none", {}]),
        ("PrepareJob", "ssa{sv}", ["new", "none", {}]),
        ("Prepare", "ssa{sv}", ["new", "", {"labels": Variant("a{ss}", {"": ""})}]),
        ("Stat", "s", ["none"]),
        ("List", "sasu", ["", ["bad=="], 0]),
        ("Remove", "s", ["none"]),
        ("Usage", "s", ["none"]),
        ("Verify", "sa{sv}", ["none", {}]),
        ("Mount", "ssa{sv}", ["none", "/", {}]),
        ("Unmount", "sa{sv}", ["/none", {}]),
        ("None", "s", ["none"]),
        ("Cleanup", "a{sv}", [{}]),
        ("Check", "", []),
    ],
)
def test_an_answered_call_is_freed_without_the_garbage_collector(
    on_bus: str, scratch: Path, member: str, signature: str, body: Body
) -> None:
    """The collector runs rarely, and a call and its reply can be large."""

    def existing() -> dict[int, Call | Marshaller]:
        return {id(it): it for it in gc.get_objects() if isinstance(it, (Call, Marshaller))}

    async def scenario() -> None:
        async with (
            serve_in_process(scratch / "state"),
            connection() as bus,
            asyncio.timeout(WAIT_TIMEOUT),
        ):
            await bus.ask(member=member, signature=signature, body=body)
            # The reply arrives a moment before the service frees the call and the reply.
            while existing().keys() - before.keys():
                await asyncio.sleep(0)

    gc.collect()
    # Other tests of this process can have left some. They stay, so that nothing gets their ids.
    before = existing()
    gc.disable()
    try:
        asyncio.run(scenario())
    finally:
        gc.enable()


def test_a_call_with_no_reply_expected_gets_no_reply(shared_service: Service) -> None:
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

    assert len(run_with_client(scenario)) == 10


def test_the_daemon_keeps_no_descriptor_sent_with_a_call(
    shared_service: Service, shared_client: BlockingClient
) -> None:
    before = descriptors(shared_service)

    async def scenario() -> None:
        bus = await MessageBus(bus_address=shared_service.address, negotiate_unix_fd=True).connect()
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
    wait_until_closed(shared_service, before)


@pytest.mark.parametrize("mebibytes", [10, 30])
def test_a_message_over_4_mib_raises_invalid_argument(
    shared_service: Service, mebibytes: int
) -> None:
    async def scenario(client: Client) -> None:
        async with connection() as bus:
            for member in ("Stat", "Mounts"):
                sending = bus.ask(member=member, signature="s", body=["x" * (mebibytes << 20)])
                reply, _ = await asyncio.gather(sending, client.list())
                assert reply.error_name == "org.snapdnative1.Error.InvalidArgument"
                check_sentence(reply.body[0], member, "4194304")

    run_with_client(scenario)


def test_large_messages_of_other_users_raise_access_denied(
    shared_service: Service, shared_client: BlockingClient
) -> None:
    for member in ("Stat", "Prepare"):
        done = subprocess.run(
            [
                *as_user(NOBODY),
                *(
                    "busctl",
                    f"--address={shared_service.address}",
                    "call",
                    BUS_NAME,
                    OBJECT_PATH,
                    MANAGER,
                ),
                *(member, "as", "100", *["x" * 15_000] * 100),
            ],
            check=False,
            capture_output=True,
            text=True,
        )
        assert "Access denied" in done.stderr
    assert shared_client.list() == []


def test_closed_connections_leave_no_open_descriptors(
    shared_service: Service, shared_client: BlockingClient
) -> None:
    async def scenario() -> None:
        for _ in range(300):
            async with connection() as bus:
                await bus.ask(member="Stat", signature="s", body=["none"])

    shared_client.list()
    before = descriptors(shared_service)
    asyncio.run(scenario())
    shared_client.list()
    wait_until_closed(shared_service, before)


def test_answered_calls_leave_no_open_descriptors(
    shared_service: Service, shared_client: BlockingClient
) -> None:
    commit_snapshot(shared_client, "base", files={"file": "text"})

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

        for start in range(0, 50, 10):
            await asyncio.gather(*(one(number) for number in range(start, start + 10)))
        for _ in range(5):
            await client.prepare("key", "base")
            await client.usage("key")
            await client.remove("key")
        await client.cleanup()

    shared_client.list()
    before = descriptors(shared_service)
    run_with_client(scenario)
    wait_until_closed(shared_service, before)


def test_prepare_completes_after_its_caller_has_left_the_bus(
    shared_service: Service, shared_client: BlockingClient
) -> None:
    root = commit_snapshot(shared_client, "base", files={"file": "text"})

    async def scenario(client: Client) -> None:
        async with client.changes() as changes:
            with hold_at_files(root / "file") as copy:
                async with Client() as leaving:
                    preparing = asyncio.ensure_future(leaving.prepare("key", "base"))
                    await asyncio.to_thread(copy.wait_until_reached)
                assert isinstance(await wait_for_exception(preparing), Unavailable)
            assert await anext(changes) == Added("key", Kind.ACTIVE, "base")

    run_with_client(scenario)
    copy = Path(shared_client.mounts("key").source)
    assert (copy / "file").read_text() == "text"


async def wait_for_exception(calling: asyncio.Future[Any]) -> BaseException | None:
    await asyncio.wait({calling})
    return calling.exception()


def test_the_daemon_answers_512_calls_at_once(
    shared_service: Service, shared_client: BlockingClient
) -> None:
    shared_client.prepare("key")

    async def scenario() -> None:
        async with AsyncExitStack() as stack:
            clients = [await stack.enter_async_context(Client()) for _ in range(4)]
            infos = await asyncio.gather(
                *(client.stat("key") for client in clients for _ in range(128))
            )
            assert {info.name for info in infos} == {"key"}

    asyncio.run(scenario())


def test_more_than_64_long_calls_at_once_raise_resource_exhausted(
    service: Service, client: BlockingClient
) -> None:
    """All calls of the lane `TREE` wait for one deletion. Calls of other lanes are answered."""
    commit_snapshot(client, "base")
    tree = commit_snapshot(client, "doomed", files={"file": "text"})

    async def scenario(client: Client) -> None:
        with hold_at_files(tree / "file") as deletion:
            await client.remove("doomed")
            await asyncio.to_thread(deletion.wait_until_reached)
            waiting = [asyncio.ensure_future(client.cleanup()) for _ in range(70)]
            async with Client() as other:
                while sum(task.done() for task in waiting) < 6:
                    await other.stat("base")
                with expect_error(ResourceExhausted, "64"):
                    await other.prepare("new", "base")
                assert [info.name for info in await other.list()] == ["base"]
                await other.view("view", "base")
                await other.update("view", {"a": "1"})
                await other.remove("view")
        outcomes = await asyncio.gather(*waiting, return_exceptions=True)
        failed = [outcome for outcome in outcomes if outcome is not None]
        assert [type(outcome) for outcome in failed] == [ResourceExhausted] * 6
        await client.prepare("new", "base")

    run_with_client(scenario)


def test_eighty_verify_calls_at_once_do_not_block_prepare(
    service: Service, client: BlockingClient
) -> None:
    commit_snapshot(client, "base", files={"file": "text"})
    (Path(client.prepare("making").source) / "file").write_text("text")
    client.commit("large", "making", digest=True)
    file = Path(client.view("look", "large").source) / "file"

    async def scenario(client: Client) -> None:
        with hold_at_files(file) as reading:
            verifying = [asyncio.ensure_future(client.verify("large")) for _ in range(80)]
            await asyncio.to_thread(reading.wait_until_reached)
            async with Client() as other:
                while sum(task.done() for task in verifying) < 16:
                    await other.stat("base")
                await other.prepare("copy", "base")
        outcomes = await asyncio.gather(*verifying, return_exceptions=True)
        failures = [one for one in outcomes if isinstance(one, BaseException)]
        assert [type(one) for one in failures] == [ResourceExhausted] * 16

    run_with_client(scenario)


def test_verify_jobs_do_not_block_prepare_and_use_few_workers(
    service: Service, client: BlockingClient
) -> None:
    commit_snapshot(client, "base", files={"file": "text"})
    (Path(client.prepare("making").source) / "file").write_text("text")
    client.commit("large", "making", digest=True)
    file = Path(client.view("look", "large").source) / "file"

    async def scenario(client: Client) -> None:
        async with connection() as bus:

            async def verify() -> str:
                reply = await bus.ask(member="VerifyJob", signature="sa{sv}", body=["large", {}])
                return reply.error_name or reply.body[0]

            with hold_at_files(file) as reading:
                await asyncio.gather(*(verify() for _ in range(64)))
                await asyncio.to_thread(reading.wait_until_reached, Lane.VERIFY.places)
                assert await verify() == "org.snapdnative1.Error.ResourceExhausted"
                await client.prepare("copy", "base")
                await client.usage("copy")
                assert len(worker_pids(service, IDLE)) == Lane.VERIFY.places
                # The list has the jobs that work and the jobs that wait for a place.
                jobs = await client.jobs()
                assert len(jobs) == 64
                await asyncio.gather(*(client.cancel(job.id) for job in jobs))
            assert await client.jobs() == []

    run_with_client(scenario)


def test_calls_with_a_wrong_signature_change_nothing(
    shared_service: Service, shared_client: BlockingClient
) -> None:
    shared_client.prepare("key")
    before = snapshots_and_directories(shared_client, shared_service)
    for signature in ("v", "a{sv}", "ssv", "aaaas"):
        values: dict[str, list[object]] = {
            "v": [Variant("v", Variant("v", Variant("s", "deep")))],
            "a{sv}": [{"key": Variant("as", ["key"])}],
            "ssv": ["key", "", Variant("a{ss}", {})],
            "aaaas": [[[[["key"]]]]],
        }
        for member in ("Prepare", "Commit", "Remove"):
            with expect_error(InvalidArgument, member):
                call_method(member, signature, *values[signature])
    assert snapshots_and_directories(shared_client, shared_service) == before
    assert os.path.isdir(shared_client.mounts("key").source)


def test_lists_end_when_their_caller_leaves_and_waiting_ones_do_not_begin(
    on_bus: str, scratch: Path
) -> None:
    """Otherwise List would keep a processor busy without a client."""
    lists = Lane.LIST.threads
    with open_engine(scratch / "state") as engine:
        populate(engine)

    async def scenario(reading: HeldCalls, parsing: HeldCalls) -> None:
        async with serve_in_process(scratch / "state") as dispatcher, connection() as other:
            async with connection() as leaving:
                asking = [
                    asyncio.ensure_future(
                        leaving.ask(member="List", signature="asa{sv}", body=[[], {}])
                    )
                    for _ in range(lists + 1)
                ]
                await asyncio.to_thread(reading.wait_until_reached, lists)
                name = str(leaving.unique_name)
            for task in asking:
                task.cancel()
            async with asyncio.timeout(WAIT_TIMEOUT):
                while dispatcher._authority.knows(name):
                    await asyncio.sleep(0.01)
            reading.release()
            assert await dispatcher.finish(WAIT_TIMEOUT)
            assert (reading.count, parsing.count) == (lists, lists)
            assert not (
                await other.ask(member="List", signature="asa{sv}", body=[[], {}])
            ).error_name
            assert (reading.count, parsing.count) == (lists + 4, lists + 1)

    with (
        hold_function(records, "readable") as reading,
        hold_function(Call, "arguments") as parsing,
    ):
        parsing.release()
        asyncio.run(scenario(reading, parsing))
