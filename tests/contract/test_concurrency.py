"""Signals and their order, reserved keys, and calls while trees are copied or deleted."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Awaitable, Callable
from contextlib import AsyncExitStack, suppress
from functools import partial
from pathlib import Path

from dbus_next.constants import MessageType
from dbus_next.message import Message

from snapd_native.client import BlockingClient, Client
from snapd_native.errors import (
    AlreadyExists,
    FailedPrecondition,
    InvalidArgument,
    NotFound,
    SnapdError,
)
from snapd_native.model import Added, Change, Committed, Kind, Mount, Removed, Updated
from snapd_native.wire.names import BUS_NAME, OBJECT_PATH
from tests.support.holding import hold_at_files, hold_workers
from tests.support.service import (
    Service,
    commit_snapshot,
    connection,
    expect_error,
    run_with_client,
    wait_until_reserved,
)

CALLS_WITH_CHANGES: list[tuple[Callable[[Client], Awaitable[object]], Change]] = [
    (lambda c: c.prepare("ü/1"), Added("ü/1", Kind.ACTIVE, "")),
    (lambda c: c.update("ü/1", {"a": "1"}), Updated("ü/1")),
    (lambda c: c.commit("base", "ü/1"), Committed("base", "ü/1")),
    (lambda c: c.prepare("key", "base"), Added("key", Kind.ACTIVE, "base")),
    (lambda c: c.view("view", "base"), Added("view", Kind.VIEW, "base")),
    (lambda c: c.view("empty"), Added("empty", Kind.VIEW, "")),
    (lambda c: c.update("base", {}, ["labels.a"]), Updated("base")),
    (lambda c: c.commit("name", "key"), Committed("name", "key")),
    (lambda c: c.remove("name"), Removed("name")),
    (lambda c: c.remove("view"), Removed("view")),
    (lambda c: c.remove("empty"), Removed("empty")),
    (lambda c: c.remove("base"), Removed("base")),
]
"""Calls, each with the one change that it makes."""

FAILURES: list[Callable[[Client], Awaitable[object]]] = [
    lambda c: c.prepare(""),
    lambda c: c.prepare("new", "none"),
    lambda c: c.view("new", "none"),
    lambda c: c.commit("new", "none"),
    lambda c: c.update("none", {}),
    lambda c: c.remove("none"),
]


def test_each_change_sends_exactly_one_signal(shared_service: Service) -> None:
    async def scenario(client: Client) -> None:
        async with client.changes() as changes:
            for call, change in CALLS_WITH_CHANGES:
                for fail in FAILURES:
                    with suppress(SnapdError):
                        await fail(client)
                await client.list()
                await call(client)
                assert await anext(changes) == change

    run_with_client(scenario)


def test_the_signal_of_a_change_arrives_before_the_reply(shared_service: Service) -> None:
    """The test compares the order of the raw messages."""

    async def scenario() -> list[str]:
        arrived: list[str] = []

        def record(message: Message) -> None:
            # A call that takes long also sends the signals of a job.
            if message.message_type is MessageType.SIGNAL and message.member.startswith("Snapshot"):
                arrived.append(f"{message.path} {message.member} {message.signature}")
            elif message.message_type is MessageType.METHOD_RETURN:
                arrived.append("reply")

        async with connection() as bus:
            rule = f"type='signal',sender='{BUS_NAME}'"
            await bus.ask_driver("AddMatch", "s", [rule])
            bus.add_message_handler(record)
            for member, signature, body in (
                ("Prepare", "ssa{sv}", ["key", "", {}]),
                ("Update", "sa{ss}as", ["key", {}, []]),
                ("Commit", "ssa{sv}", ["name", "key", {}]),
                ("Remove", "sa{sv}", ["name", {}]),
            ):
                reply = await bus.ask(member=member, signature=signature, body=body)
                assert reply.message_type is MessageType.METHOD_RETURN
        return arrived

    assert asyncio.run(scenario()) == [
        f"{OBJECT_PATH} SnapshotAdded sss",
        "reply",
        f"{OBJECT_PATH} SnapshotUpdated s",
        "reply",
        f"{OBJECT_PATH} SnapshotCommitted ss",
        "reply",
        f"{OBJECT_PATH} SnapshotRemoved s",
        "reply",
    ]


def test_the_signals_of_eight_concurrent_clients_lead_to_the_final_state(
    shared_service: Service,
) -> None:
    """The clients use the same few names. The signals alone show which snapshots exist."""

    async def scenario(client: Client) -> None:
        async with client.changes() as changes, AsyncExitStack() as stack:
            others = [await stack.enter_async_context(Client()) for _ in range(8)]
            # These calls guarantee at least one change of each kind.
            await client.prepare("the first")
            await client.update("the first", {"a": "1"})
            await client.commit("the second", "the first")
            await client.remove("the second")
            await asyncio.gather(
                *(make_random_calls(other, seed) for seed, other in enumerate(others))
            )
            await client.prepare("the last")
            history = [await anext(changes)]
            while history[-1] != Added("the last", Kind.ACTIVE, ""):
                history.append(await anext(changes))
            assert {type(change) for change in history} == {Added, Committed, Updated, Removed}
            found = {info.name: (info.kind, info.parent) for info in await client.list()}
            assert replay(history) == found

    run_with_client(scenario)


async def make_random_calls(client: Client, seed: int) -> None:
    dice = random.Random(seed)
    names = [f"name {number}" for number in range(12)]
    for _ in range(80):
        one, other = dice.choice(names), dice.choice(["", *names])
        calls: dict[str, Callable[[], Awaitable[object]]] = {
            "prepare": partial(client.prepare, one, other),
            "view": partial(client.view, one, other),
            "commit": partial(client.commit, other, one),
            "update": partial(client.update, one, {"seed": str(seed)}),
            "remove": partial(client.remove, one),
        }
        with suppress(NotFound, AlreadyExists, FailedPrecondition, InvalidArgument):
            await calls[dice.choice([*calls])]()


def replay(history: list[Change]) -> dict[str, tuple[Kind, str]]:
    """Return the snapshots after ``history``, each change of which must be possible."""
    there: dict[str, tuple[Kind, str]] = {}
    for change in history:
        match change:
            case Added(key, kind, parent):
                assert key not in there
                assert not parent or there[parent][0] is Kind.COMMITTED
                there[key] = (kind, parent)
            case Committed(name, key):
                kind, parent = there.pop(key)
                assert kind is Kind.ACTIVE
                assert name not in there
                there[name] = (Kind.COMMITTED, parent)
            case Updated(name):
                assert name in there
            case Removed(key):
                del there[key]
                assert all(parent != key for _, parent in there.values())
    return there


def test_only_one_of_sixteen_concurrent_calls_gets_a_key(
    shared_service: Service, shared_client: BlockingClient
) -> None:
    commit_snapshot(shared_client, "base")

    async def scenario(client: Client) -> list[Mount | BaseException]:
        calls = [client.prepare("key", "base") for _ in range(8)]
        calls += [client.view("key") for _ in range(8)]
        return await asyncio.gather(*calls, return_exceptions=True)

    outcomes = run_with_client(scenario)
    assert sum(isinstance(outcome, Mount) for outcome in outcomes) == 1
    assert sum(isinstance(outcome, AlreadyExists) for outcome in outcomes) == 15


def test_a_key_is_reserved_but_not_visible_while_prepare_runs(
    shared_service: Service, shared_client: BlockingClient
) -> None:
    commit_snapshot(shared_client, "base", files={"file": "text"})

    async def scenario(client: Client) -> None:
        with hold_workers(shared_service):
            preparing = asyncio.ensure_future(client.prepare("key", "base"))
            await check_reserved(preparing)
        mount = await preparing
        assert await client.mounts("key") == mount

    async def check_reserved(preparing: asyncio.Future[Mount]) -> None:
        async with Client() as other:
            await wait_until_reserved(other, "key")
            for look in (other.stat, other.mounts, other.usage, other.remove):
                with expect_error(NotFound, '"key"'):
                    await look("key")
            with expect_error(NotFound, '"key"'):
                await other.update("key", {})
            with expect_error(NotFound, '"key"'):
                await other.commit("name", "key")
            with expect_error(NotFound, '"key"'):
                await other.prepare("child", "key")
            assert [info.name for info in await other.list()] == ["base"]
            for take in (other.prepare, other.view):
                with expect_error(AlreadyExists, '"key"', "still running"):
                    await take("key")
            with expect_error(FailedPrecondition, 'cannot remove "base"', "children"):
                await other.remove("base")
            assert not preparing.done()

    run_with_client(scenario)
    assert (Path(shared_client.mounts("key").source) / "file").read_text() == "text"


def test_key_and_name_are_reserved_while_commit_runs(
    shared_service: Service, shared_client: BlockingClient
) -> None:
    commit_snapshot(shared_client, "base")
    shared_client.prepare("key", "base")

    async def scenario(client: Client) -> None:
        with hold_workers(shared_service):
            committing = asyncio.ensure_future(client.commit("name", "key"))
            await check_reserved(committing)
        await committing

    async def check_reserved(committing: asyncio.Future[None]) -> None:
        async with Client() as other:
            await wait_until_reserved(other, "name")
            removing, again, taking, seeing = await asyncio.gather(
                other.remove("key"),
                other.commit("another", "key"),
                other.view("name"),
                other.stat("key"),
                return_exceptions=True,
            )
            assert not committing.done()
            with expect_error(FailedPrecondition, '"key"', "being committed"):
                raise as_exception(removing)
            with expect_error(FailedPrecondition, '"key"', "being committed"):
                raise as_exception(again)
            with expect_error(AlreadyExists, '"name"'):
                raise as_exception(taking)
            assert not isinstance(seeing, BaseException)
            assert seeing.kind is Kind.ACTIVE

    run_with_client(scenario)


def as_exception(outcome: object) -> BaseException:
    assert isinstance(outcome, BaseException)
    return outcome


async def make_short_calls(client: Client) -> None:
    """Make calls that copy almost nothing."""
    await client.stat("base")
    assert len(await client.list(["kind==committed"])) >= 1
    await client.view("view", "base")
    await client.mounts("view")
    await client.prepare("new")
    await client.update("new", {"a": "1"})
    await client.usage("base")
    await client.usage("new")
    await client.remove("new")
    await client.prepare("copy", "base")
    await client.remove("copy")
    await client.remove("view")


def test_short_calls_do_not_wait_for_a_running_copy(
    shared_service: Service, shared_client: BlockingClient
) -> None:
    commit_snapshot(shared_client, "base", files={"file": "text"})

    async def scenario(client: Client) -> None:
        with hold_workers(shared_service):
            preparing = asyncio.ensure_future(client.prepare("key", "base"))
            async with Client() as other:
                await wait_until_reserved(other, "key")
                await make_short_calls(other)
            assert not preparing.done()
        await preparing

    run_with_client(scenario)


def test_short_calls_do_not_wait_for_a_running_deletion(
    shared_service: Service, shared_client: BlockingClient
) -> None:
    commit_snapshot(shared_client, "base")
    tree = commit_snapshot(shared_client, "doomed", files={"file": "text"})

    async def scenario(client: Client) -> None:
        with hold_at_files(tree / "file") as deletion:
            await client.remove("doomed")
            await asyncio.to_thread(deletion.wait_until_reached)
            cleaning = asyncio.ensure_future(client.cleanup())
            async with Client() as other:
                await make_short_calls(other)
            assert not cleaning.done()
        await cleaning

    run_with_client(scenario)
