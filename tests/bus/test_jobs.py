"""Jobs on the bus: their signals, their properties, their limits and how they end."""

from __future__ import annotations

import asyncio
import shutil
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
from dbus_next.constants import MessageFlag
from dbus_next.message import Message

from snapd_native.bus.introspection import contract, shapes
from snapd_native.client import BlockingClient, Client
from snapd_native.errors import (
    AlreadyExists,
    FailedPrecondition,
    InvalidArgument,
    NotFound,
    ResourceExhausted,
    SnapdError,
    Unavailable,
)
from snapd_native.trees.relay import IDLE
from snapd_native.wire.names import BUS_NAME, JOB, JOB_PATH, OBJECT_PATH
from tests.support.daemon_process import IMPATIENT, Notifications, started
from tests.support.descriptors import hands, nothing_left_open, workers
from tests.support.file_systems import on_ext4
from tests.support.holding import held
from tests.support.job_watch import Watch, held_up, watch
from tests.support.service import (
    Service,
    check_sentence,
    committed,
    everything,
    refused,
    serving,
)
from tests.support.waiting import eventually

pytestmark = on_ext4

Call = tuple[str, *tuple[Any, ...]]

PREPARE: Call = ("PrepareJob", "ssa{sv}", "key", "base", {})
COMMIT: Call = ("CommitJob", "ssa{sv}", "name", "work", {})


@pytest.mark.parametrize(
    ("call", "key", "change"),
    [
        (PREPARE, "key", "SnapshotAdded"),
        (("PrepareJob", "ssa{sv}", "key", "", {}), "key", "SnapshotAdded"),
        (COMMIT, "work", "SnapshotCommitted"),
    ],
    ids=["prepare", "prepare nothing", "commit"],
)
def test_a_job_sends_job_new_before_its_reply_and_job_removed_last(
    filled: Service, call: Call, key: str, change: str
) -> None:
    async def scenario(watched: Watch) -> None:
        (path,) = await watched.call(*call)
        removed = await watched.signal("JobRemoved", path)
        number = int(path.removeprefix(f"{JOB_PATH}/"))
        # A quick job may take effect before JobNew is sent.
        order = watched.order()
        assert sorted(order) == sorted(["JobNew", "reply", change, "JobRemoved"])
        assert [name for name in order if name != change] == ["JobNew", "reply", "JobRemoved"]
        assert order[-1] == "JobRemoved"
        new, gone = watched.signals("JobNew", "JobRemoved")
        assert (new.path, new.signature, new.body) == (OBJECT_PATH, "uo", [number, path])
        assert (gone.path, gone.signature) == (OBJECT_PATH, "uossss")
        assert removed == [number, path, key, "done", "", ""]
        assert await watched.call("ListJobs") == [[]]

    watch(scenario)


REFUSALS: list[tuple[type[SnapdError], str, list[object]]] = [
    (InvalidArgument, "Prepare", ["", "", {}]),
    (InvalidArgument, "Prepare", ["key", "work", {}]),
    (NotFound, "Prepare", ["key", "none", {}]),
    (AlreadyExists, "Prepare", ["work", "base", {}]),
    (InvalidArgument, "Commit", ["", "work", {}]),
    (InvalidArgument, "Commit", ["name", "k" * 5000, {}]),
    (AlreadyExists, "Commit", ["base", "work", {}]),
    (NotFound, "Commit", ["name", "none", {}]),
    (FailedPrecondition, "Commit", ["name", "base", {}]),
]


def test_a_refused_prepare_job_or_commit_job_starts_no_job(filled: Service) -> None:
    async def scenario(watched: Watch) -> None:
        for kind, member, body in REFUSALS:
            messages = []
            for form in (member, f"{member}Job"):
                with pytest.raises(kind) as caught:
                    await watched.call(form, "ssa{sv}", *body)
                messages.append(caught.value.message)
            assert messages[0] == messages[1]
        for member in ("PrepareJob", "CommitJob"):
            with refused(InvalidArgument, member):
                await watched.call(member, "ss", "one", "other")
        assert watched.signals() == []

    watch(scenario)


def test_job_numbers_are_consecutive(filled: Service) -> None:
    async def scenario(watched: Watch) -> None:
        paths = []
        for number in range(10):
            paths += await watched.call("PrepareJob", "ssa{sv}", f"{number}", "", {})
            await watched.signal("JobRemoved", paths[-1])
        first = int(paths[0].rpartition("/")[2])
        assert paths == [f"{JOB_PATH}/{number}" for number in range(first, first + 10)]

    watch(scenario)


@pytest.mark.parametrize(
    ("call", "operation", "key"),
    [(PREPARE, "prepare", "key"), (COMMIT, "commit", "work")],
    ids=["prepare", "commit"],
)
def test_a_job_shows_its_operation_key_and_progress(
    filled: Service,
    shared_client: BlockingClient,
    call: Call,
    operation: str,
    key: str,
) -> None:
    usage = shared_client.usage("base")
    total = (usage.inodes, usage.size) if operation == "prepare" else (0, 0)

    async def scenario(watched: Watch) -> None:
        with held_up(filled):
            (path,) = await watched.call(*call)
            number, _ = await watched.signal("JobNew")
            assert await watched.call("ListJobs") == [[[number, operation, key, 0, path]]]
            values = await watched.properties(path)
            assert {name: value.value for name, value in values.items()} == {
                "Id": number,
                "Operation": operation,
                "Key": key,
                "EntriesDone": 0,
                "BytesDone": 0,
                "EntriesTotal": total[0],
                "BytesTotal": total[1],
            }
            types = {name: value.signature for name, value in values.items()}
            assert types == shapes(contract())[JOB].properties
        await watched.signal("JobRemoved", path)

    watch(scenario)


def test_a_job_reports_progress_at_most_five_times_a_second(
    shared: Service, shared_client: BlockingClient
) -> None:
    files = {f"{number}": "text" for number in range(20)}
    root = committed(shared_client, "base", files=files)
    usage = shared_client.usage("base")

    async def scenario(watched: Watch) -> None:
        begun = time.monotonic()
        # The root does not wait.
        with held(root, after=1) as copy:
            (path,) = await watched.call("PrepareJob", "ssa{sv}", "key", "base", {})
            # The daemon signals no progress from before JobNew. So the copy goes on only after this
            # reply.
            await watched.call("Stat", "s", "base")
            for number in range(1, 4):
                copy.let_pass(2)
                await watched.many("PropertiesChanged", number)
            assert watched.signals("JobRemoved") == []
        removed = await watched.signal("JobRemoved", path)
        assert removed[3] == "done"
        told = watched.signals("PropertiesChanged")
        assert {message.path for message in told} == {path}
        done = {"EntriesDone": [0], "BytesDone": [0]}
        for message in told:
            interface, changed, invalidated = message.body
            assert (interface, invalidated) == (JOB, [])
            assert changed
            for name, value in changed.items():
                assert value.signature == "t"
                done[name].append(value.value)
        for values, most in zip(done.values(), (usage.inodes, usage.size), strict=True):
            assert values == sorted(set(values))
            assert values[-1] <= most
        (ended,) = (
            time
            for message, time in zip(watched.arrived, watched.times, strict=True)
            if message.member == "JobRemoved"
        )
        # A busy machine only increases the time.
        assert len(told) <= 5 * (ended - begun) + 1

    watch(scenario)


LONG: dict[str, tuple[str, list[Any], str, str, str | None]] = {
    "Prepare": ("ssa{sv}", ["key", "base", {}], "prepare", "key", "SnapshotAdded"),
    "Commit": ("ssa{sv}", ["name", "work", {}], "commit", "work", "SnapshotCommitted"),
    "Usage": ("s", ["work"], "usage", "work", None),
}
"""Calls that wait for workers: arguments, the job's operation and key, the signal at the end."""


@pytest.mark.parametrize("member", LONG)
def test_a_call_that_takes_long_shows_as_a_job(filled: Service, member: str) -> None:
    signature, body, operation, key, change = LONG[member]

    async def scenario(watched: Watch) -> None:
        with held_up(filled):
            calling = asyncio.ensure_future(watched.call(member, signature, *body))
            number, path = await watched.signal("JobNew")
            assert not calling.done()
            async with Client() as other:
                (job,) = await other.jobs()
            assert (job.id, job.operation, job.key, job.uid) == (number, operation, key, 0)
        await calling
        order = ["JobNew", *([change] if change else []), "JobRemoved", "reply"]
        assert watched.order() == order
        (removed,) = watched.signals("JobRemoved")
        assert removed.body == [number, path, key, "done", "", ""]

    watch(scenario)


def test_background_usage_is_measured_by_workers_of_idle_priority(
    filled: Service, shared_client: BlockingClient
) -> None:
    usage = shared_client.background_usage("work")
    assert usage == shared_client.usage("work")

    async def scenario(watched: Watch) -> None:
        with held_up(filled, IDLE):
            calling = asyncio.ensure_future(watched.call("BackgroundUsage", "sa{sv}", "work", {}))
            await watched.signal("JobNew")
            async with Client() as other:
                assert await other.usage("work") == usage
            assert not calling.done()
        assert await calling == [usage.size, usage.inodes]

    watch(scenario)


def test_a_long_cleanup_shows_as_a_job_that_can_be_cancelled(
    shared: Service, shared_client: BlockingClient
) -> None:
    tree = committed(shared_client, "doomed")

    async def scenario(watched: Watch) -> None:
        with held(tree):
            await watched.call("Remove", "sa{sv}", "doomed", {})
            cleaning = asyncio.ensure_future(watched.call("Cleanup", "a{sv}", {}))
            number, path = await watched.signal("JobNew")
            assert await watched.call("ListJobs") == [[[number, "cleanup", "", 0, path]]]
            await watched.call("Cancel", path=path)
            with pytest.raises(SnapdError, match="was cancelled"):
                await cleaning
        removed = await watched.signal("JobRemoved", path)
        assert removed[:4] == [number, path, "", "cancelled"]

    watch(scenario)
    shared_client.cleanup()
    assert shared.directories() == []


def test_job_removed_of_a_failed_job_carries_the_error(
    filled: Service, shared_client: BlockingClient
) -> None:
    shutil.rmtree(shared_client.view("look", "base").source)

    async def scenario(watched: Watch) -> None:
        (path,) = await watched.call(*PREPARE)
        *_, key, result, name, text = await watched.signal("JobRemoved", path)
        assert (key, result, name) == ("key", "failed", "org.snapdnative1.Error.DataLoss")
        check_sentence(text, '"key"', '"base"', "backup")
        assert watched.order() == ["JobNew", "reply", "JobRemoved"]
        await watched.call("Prepare", "ssa{sv}", "key", "", {})

    watch(scenario)


def test_other_calls_are_answered_while_a_job_waits(
    filled: Service, shared_client: BlockingClient
) -> None:
    async def scenario(watched: Watch) -> None:
        with held_up(filled):
            (path,) = await watched.call(*PREPARE)
            for _ in range(100):
                await watched.call("Stat", "s", "base")
            await watched.call("View", "ssa{sv}", "view", "base", {})
            await watched.call("Update", "sa{ss}as", "view", {"a": "1"}, [])
            await watched.call("List", "asa{sv}", [], {})
            # Another job has workers of its own.
            await watched.call("Prepare", "ssa{sv}", "other", "base", {})
            await watched.call("Commit", "ssa{sv}", "name", "other", {})
            for key in ("name", "view"):
                await watched.call("Remove", "sa{sv}", key, {})
            await watched.call("Cleanup", "a{sv}", {})
            assert (await watched.properties(path))["EntriesDone"].value == 0
            # A call above can have taken so long that it showed as a job.
            assert all(path not in removed.body for removed in watched.signals("JobRemoved"))
        assert (await watched.signal("JobRemoved", path))[3] == "done"

    watch(scenario)


def test_more_than_64_jobs_at_once_raise_resource_exhausted(
    service: Service, client: BlockingClient
) -> None:
    tree = committed(client, "base", files={"file": "text"})
    state = everything(client, service)

    async def scenario(watched: Watch) -> None:
        keys = [f"key {number}" for number in range(64)]
        with held(tree / "file"):
            calls = [watched.call("PrepareJob", "ssa{sv}", key, "base", {}) for key in keys]
            paths = [path for (path,) in await asyncio.gather(*calls)]
            more: list[Call] = [
                ("PrepareJob", "ssa{sv}", "new", "base", {}),
                ("Cleanup", "a{sv}", {}),
            ]
            for call in more:
                with refused(ResourceExhausted, "64"):
                    await watched.call(*call)
            (rows,) = await watched.call("ListJobs")
            assert sorted(row[4] for row in rows) == sorted(paths)
            assert sorted(row[2] for row in rows) == sorted(keys)
            await asyncio.gather(*(watched.call("Cancel", path=path) for path in paths))
        ends = [message.body[3] for message in watched.signals("JobRemoved")]
        assert ends == ["cancelled"] * 64
        assert await watched.call("ListJobs") == [[]]
        (path,) = await watched.call(*PREPARE)
        assert (await watched.signal("JobRemoved", path))[3] == "done"

    with nothing_left_open(service):
        watch(scenario)
    client.remove("key")
    client.cleanup()
    assert everything(client, service) == state
    eventually(lambda: len(workers(service)) <= hands(service), lambda: workers(service))


@asynccontextmanager
async def stopping(service: Service, watched: Watch) -> AsyncIterator[str]:
    """Terminate the daemon while a job waits; yield the job's path."""
    with held_up(service):
        (path,) = await watched.call(*PREPARE)
        service.daemon.process.terminate()
        with refused(Unavailable, "is stopping"):
            while True:
                await watched.call("Stat", "s", "base")
        watched.forget()
        calls: list[Call] = [PREPARE, COMMIT, ("ListJobs",)]
        for call in calls:
            with refused(Unavailable, "is stopping"):
                await watched.call(*call)
        assert watched.signals() == []
        yield path


@pytest.mark.parametrize("cancelled", [False, True])
def test_a_stopping_daemon_waits_for_its_job_to_end(
    on_bus: str, scratch: Path, cancelled: bool
) -> None:
    async def scenario(watched: Watch) -> None:
        async with stopping(service, watched) as path:
            if cancelled:
                await watched.call("Cancel", path=path)
        removed = await watched.signal("JobRemoved", path)
        assert removed[3] == ("cancelled" if cancelled else "done")
        assert service.daemon.process.wait() == 0

    with serving(on_bus, scratch / "state") as service:
        with BlockingClient() as client:
            committed(client, "base", files={"file": "text"})
        watch(scenario)
    with serving(on_bus, scratch / "state"), BlockingClient() as client:
        assert [info.name for info in client.list()] == ["base", *([] if cancelled else ["key"])]


def test_a_stopping_daemon_undoes_a_job_that_takes_too_long(
    on_bus: str, scratch: Path, notifications: Notifications
) -> None:
    state = scratch / "state"

    async def scenario(watched: Watch) -> None:
        with held_up(daemon):
            (path,) = await watched.call(*PREPARE)
            daemon.terminate()
            *_, result, name, text = await watched.signal("JobRemoved", path)
        assert (result, name) == ("failed", "org.snapdnative1.Error.Unavailable")
        check_sentence(text, "stopping")

    program = IMPATIENT.format(state=str(state))
    with started(on_bus, state, notifications, program) as daemon:
        notifications.until("READY=1")
        with BlockingClient() as client:
            committed(client, "base", files={"file": "text"})
        watch(scenario)
    assert len(list((state / "snapshots").iterdir())) == 1


def test_prepare_job_without_an_expected_reply_still_runs(filled: Service) -> None:
    async def scenario(watched: Watch) -> None:
        member, signature, *body = PREPARE
        message = Message(
            destination=BUS_NAME,
            path=OBJECT_PATH,
            member=member,
            signature=signature,
            body=body,
            flags=MessageFlag.NO_REPLY_EXPECTED,
        )
        await watched.bus.send(message)
        assert (await watched.signal("JobRemoved"))[3] == "done"
        order = watched.order()
        assert sorted(order) == ["JobNew", "JobRemoved", "SnapshotAdded"]
        assert order[-1] == "JobRemoved"

    watch(scenario)
