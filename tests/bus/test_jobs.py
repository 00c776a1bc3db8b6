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

from snapd_native.bus.introspection import contract, interfaces
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
from tests.support.daemon_process import DAEMON_WITHOUT_GRACE, Notifications, start_daemon
from tests.support.descriptors import max_workers, nothing_left_open, worker_pids
from tests.support.file_systems import on_ext4
from tests.support.holding import hold_at_files, hold_workers
from tests.support.job_watch import Watcher, run_with_watcher
from tests.support.sealing import unsealed
from tests.support.service import (
    Service,
    check_sentence,
    commit_snapshot,
    expect_error,
    run_daemon,
    snapshots_and_directories,
)
from tests.support.waiting import wait_until

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
    service_with_base: Service, call: Call, key: str, change: str
) -> None:
    async def scenario(watcher: Watcher) -> None:
        (path,) = await watcher.call(*call)
        removed = await watcher.wait_for_signal("JobRemoved", path)
        number = int(path.removeprefix(f"{JOB_PATH}/"))
        # A quick job may take effect before JobNew is sent.
        order = watcher.message_order()
        assert sorted(order) == sorted(["JobNew", "reply", change, "JobRemoved"])
        assert [name for name in order if name != change] == ["JobNew", "reply", "JobRemoved"]
        assert order[-1] == "JobRemoved"
        new, gone = watcher.signals("JobNew", "JobRemoved")
        assert (new.path, new.signature, new.body) == (OBJECT_PATH, "uo", [number, path])
        assert (gone.path, gone.signature) == (OBJECT_PATH, "uossss")
        assert removed == [number, path, key, "done", "", ""]
        assert await watcher.call("ListJobs") == [[]]

    run_with_watcher(scenario)


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


def test_a_refused_prepare_job_or_commit_job_starts_no_job(service_with_base: Service) -> None:
    async def scenario(watcher: Watcher) -> None:
        for kind, member, body in REFUSALS:
            messages = []
            for form in (member, f"{member}Job"):
                with pytest.raises(kind) as caught:
                    await watcher.call(form, "ssa{sv}", *body)
                messages.append(caught.value.message)
            assert messages[0] == messages[1]
        for member in ("PrepareJob", "CommitJob"):
            with expect_error(InvalidArgument, member):
                await watcher.call(member, "ss", "one", "other")
        assert watcher.signals() == []

    run_with_watcher(scenario)


def test_job_numbers_are_consecutive(service_with_base: Service) -> None:
    async def scenario(watcher: Watcher) -> None:
        paths = []
        for number in range(10):
            paths += await watcher.call("PrepareJob", "ssa{sv}", f"{number}", "", {})
            await watcher.wait_for_signal("JobRemoved", paths[-1])
        first = int(paths[0].rpartition("/")[2])
        assert paths == [f"{JOB_PATH}/{number}" for number in range(first, first + 10)]

    run_with_watcher(scenario)


@pytest.mark.parametrize(
    ("call", "operation", "key"),
    [(PREPARE, "prepare", "key"), (COMMIT, "commit", "work")],
    ids=["prepare", "commit"],
)
def test_a_job_shows_its_operation_key_and_progress(
    service_with_base: Service,
    shared_client: BlockingClient,
    call: Call,
    operation: str,
    key: str,
) -> None:
    usage = shared_client.usage("base")
    total = (usage.inodes, usage.size) if operation == "prepare" else (0, 0)

    async def scenario(watcher: Watcher) -> None:
        with hold_workers(service_with_base):
            (path,) = await watcher.call(*call)
            number, _ = await watcher.wait_for_signal("JobNew")
            assert await watcher.call("ListJobs") == [[[number, operation, key, 0, path]]]
            values = await watcher.properties(path)
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
            assert types == interfaces(contract())[JOB].properties
        await watcher.wait_for_signal("JobRemoved", path)

    run_with_watcher(scenario)


def test_a_job_reports_progress_at_most_five_times_a_second(
    shared_service: Service, shared_client: BlockingClient
) -> None:
    files = {f"{number}": "text" for number in range(20)}
    root = commit_snapshot(shared_client, "base", files=files)
    usage = shared_client.usage("base")

    async def scenario(watcher: Watcher) -> None:
        begun = time.monotonic()
        # The root does not wait.
        with hold_at_files(root, after=1) as copy:
            (path,) = await watcher.call("PrepareJob", "ssa{sv}", "key", "base", {})
            # The daemon signals no progress from before JobNew. So the copy goes on only after this
            # reply.
            await watcher.call("Stat", "s", "base")
            for number in range(1, 4):
                copy.release(2)
                await watcher.wait_for_signals("PropertiesChanged", number)
            assert watcher.signals("JobRemoved") == []
        removed = await watcher.wait_for_signal("JobRemoved", path)
        assert removed[3] == "done"
        signals = watcher.signals("PropertiesChanged")
        assert {message.path for message in signals} == {path}
        done = {"EntriesDone": [0], "BytesDone": [0]}
        for message in signals:
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
            for message, time in zip(watcher.arrived, watcher.times, strict=True)
            if message.member == "JobRemoved"
        )
        # A busy machine only increases the time.
        assert len(signals) <= 5 * (ended - begun) + 1

    run_with_watcher(scenario)


LONG_CALLS: dict[str, tuple[str, list[Any], str, str, str | None]] = {
    "Prepare": ("ssa{sv}", ["key", "base", {}], "prepare", "key", "SnapshotAdded"),
    "Commit": ("ssa{sv}", ["name", "work", {}], "commit", "work", "SnapshotCommitted"),
    "Usage": ("s", ["work"], "usage", "work", None),
}
"""Calls that wait for workers: arguments, the job's operation and key, the signal at the end."""


@pytest.mark.parametrize("member", LONG_CALLS)
def test_a_call_that_takes_long_shows_as_a_job(service_with_base: Service, member: str) -> None:
    signature, body, operation, key, change = LONG_CALLS[member]

    async def scenario(watcher: Watcher) -> None:
        with hold_workers(service_with_base):
            calling = asyncio.ensure_future(watcher.call(member, signature, *body))
            number, path = await watcher.wait_for_signal("JobNew")
            assert not calling.done()
            async with Client() as other:
                (job,) = await other.jobs()
            assert (job.id, job.operation, job.key, job.uid) == (number, operation, key, 0)
        await calling
        order = ["JobNew", *([change] if change else []), "JobRemoved", "reply"]
        assert watcher.message_order() == order
        (removed,) = watcher.signals("JobRemoved")
        assert removed.body == [number, path, key, "done", "", ""]

    run_with_watcher(scenario)


def test_background_usage_is_measured_by_workers_of_idle_priority(
    service_with_base: Service, shared_client: BlockingClient
) -> None:
    usage = shared_client.background_usage("work")
    assert usage == shared_client.usage("work")

    async def scenario(watcher: Watcher) -> None:
        with hold_workers(service_with_base, IDLE):
            calling = asyncio.ensure_future(watcher.call("BackgroundUsage", "sa{sv}", "work", {}))
            await watcher.wait_for_signal("JobNew")
            async with Client() as other:
                assert await other.usage("work") == usage
            assert not calling.done()
        assert await calling == [usage.size, usage.inodes]

    run_with_watcher(scenario)


def test_a_long_cleanup_shows_as_a_job_that_can_be_cancelled(
    shared_service: Service, shared_client: BlockingClient
) -> None:
    tree = commit_snapshot(shared_client, "doomed", files={"file": "text"})

    async def scenario(watcher: Watcher) -> None:
        with hold_at_files(tree / "file"):
            await watcher.call("Remove", "sa{sv}", "doomed", {})
            cleaning = asyncio.ensure_future(watcher.call("Cleanup", "a{sv}", {}))
            number, path = await watcher.wait_for_signal("JobNew")
            assert await watcher.call("ListJobs") == [[[number, "cleanup", "", 0, path]]]
            await watcher.call("Cancel", path=path)
            with pytest.raises(SnapdError, match="was cancelled"):
                await cleaning
        removed = await watcher.wait_for_signal("JobRemoved", path)
        assert removed[:4] == [number, path, "", "cancelled"]

    run_with_watcher(scenario)
    shared_client.cleanup()
    assert shared_service.directories() == []


def test_job_removed_of_a_failed_job_carries_the_error(
    service_with_base: Service, shared_client: BlockingClient
) -> None:
    shutil.rmtree(unsealed(Path(shared_client.view("look", "base").source)))

    async def scenario(watcher: Watcher) -> None:
        (path,) = await watcher.call(*PREPARE)
        *_, key, result, name, text = await watcher.wait_for_signal("JobRemoved", path)
        assert (key, result, name) == ("key", "failed", "org.snapdnative1.Error.DataLoss")
        check_sentence(text, '"key"', '"base"', "backup")
        assert watcher.message_order() == ["JobNew", "reply", "JobRemoved"]
        await watcher.call("Prepare", "ssa{sv}", "key", "", {})

    run_with_watcher(scenario)


def test_other_calls_are_answered_while_a_job_waits(
    service_with_base: Service, shared_client: BlockingClient
) -> None:
    async def scenario(watcher: Watcher) -> None:
        with hold_workers(service_with_base):
            (path,) = await watcher.call(*PREPARE)
            for _ in range(100):
                await watcher.call("Stat", "s", "base")
            await watcher.call("View", "ssa{sv}", "view", "base", {})
            await watcher.call("Update", "sa{ss}as", "view", {"a": "1"}, [])
            await watcher.call("List", "asa{sv}", [], {})
            # Another job has workers of its own.
            await watcher.call("Prepare", "ssa{sv}", "other", "base", {})
            await watcher.call("Commit", "ssa{sv}", "name", "other", {})
            for key in ("name", "view"):
                await watcher.call("Remove", "sa{sv}", key, {})
            await watcher.call("Cleanup", "a{sv}", {})
            assert (await watcher.properties(path))["EntriesDone"].value == 0
            # A call above can have taken so long that it showed as a job.
            assert all(path not in removed.body for removed in watcher.signals("JobRemoved"))
        assert (await watcher.wait_for_signal("JobRemoved", path))[3] == "done"

    run_with_watcher(scenario)


def test_more_than_64_jobs_at_once_raise_resource_exhausted(
    service: Service, client: BlockingClient
) -> None:
    tree = commit_snapshot(client, "base", files={"file": "text"})
    state = snapshots_and_directories(client, service)

    async def scenario(watcher: Watcher) -> None:
        keys = [f"key {number}" for number in range(64)]
        with hold_at_files(tree / "file"):
            calls = [watcher.call("PrepareJob", "ssa{sv}", key, "base", {}) for key in keys]
            paths = [path for (path,) in await asyncio.gather(*calls)]
            more: list[Call] = [
                ("PrepareJob", "ssa{sv}", "new", "base", {}),
                ("Cleanup", "a{sv}", {}),
            ]
            for call in more:
                with expect_error(ResourceExhausted, "64"):
                    await watcher.call(*call)
            (rows,) = await watcher.call("ListJobs")
            assert sorted(row[4] for row in rows) == sorted(paths)
            assert sorted(row[2] for row in rows) == sorted(keys)
            await asyncio.gather(*(watcher.call("Cancel", path=path) for path in paths))
        ends = [message.body[3] for message in watcher.signals("JobRemoved")]
        assert ends == ["cancelled"] * 64
        assert await watcher.call("ListJobs") == [[]]
        (path,) = await watcher.call(*PREPARE)
        assert (await watcher.wait_for_signal("JobRemoved", path))[3] == "done"

    with nothing_left_open(service):
        run_with_watcher(scenario)
    client.remove("key")
    client.cleanup()
    assert snapshots_and_directories(client, service) == state
    wait_until(
        lambda: len(worker_pids(service)) <= max_workers(service), lambda: worker_pids(service)
    )


@asynccontextmanager
async def stop_daemon_during_job(service: Service, watcher: Watcher) -> AsyncIterator[str]:
    """Terminate the daemon while a job waits; yield the job's path."""
    with hold_workers(service):
        (path,) = await watcher.call(*PREPARE)
        service.daemon.process.terminate()
        with expect_error(Unavailable, "is stopping"):
            while True:
                await watcher.call("Stat", "s", "base")
        watcher.forget()
        calls: list[Call] = [PREPARE, COMMIT, ("ListJobs",)]
        for call in calls:
            with expect_error(Unavailable, "is stopping"):
                await watcher.call(*call)
        assert watcher.signals() == []
        yield path


@pytest.mark.parametrize("cancelled", [False, True])
def test_a_stopping_daemon_waits_for_its_job_to_end(
    on_bus: str, scratch: Path, cancelled: bool
) -> None:
    async def scenario(watcher: Watcher) -> None:
        async with stop_daemon_during_job(service, watcher) as path:
            if cancelled:
                await watcher.call("Cancel", path=path)
        removed = await watcher.wait_for_signal("JobRemoved", path)
        assert removed[3] == ("cancelled" if cancelled else "done")
        assert service.daemon.process.wait() == 0

    with run_daemon(on_bus, scratch / "state") as service:
        with BlockingClient() as client:
            commit_snapshot(client, "base", files={"file": "text"})
        run_with_watcher(scenario)
    with run_daemon(on_bus, scratch / "state"), BlockingClient() as client:
        assert [info.name for info in client.list()] == ["base", *([] if cancelled else ["key"])]


def test_a_stopping_daemon_undoes_a_job_that_takes_too_long(
    on_bus: str, scratch: Path, notifications: Notifications
) -> None:
    state = scratch / "state"

    async def scenario(watcher: Watcher) -> None:
        with hold_workers(daemon):
            (path,) = await watcher.call(*PREPARE)
            daemon.terminate()
            *_, result, name, text = await watcher.wait_for_signal("JobRemoved", path)
        assert (result, name) == ("failed", "org.snapdnative1.Error.Unavailable")
        check_sentence(text, "stopping")

    program = DAEMON_WITHOUT_GRACE.format(state=str(state))
    with start_daemon(on_bus, state, notifications, program) as daemon:
        notifications.read_until("READY=1")
        with BlockingClient() as client:
            commit_snapshot(client, "base", files={"file": "text"})
        run_with_watcher(scenario)
    assert len(list((state / "snapshots").iterdir())) == 1


def test_prepare_job_runs_when_no_reply_is_expected(service_with_base: Service) -> None:
    async def scenario(watcher: Watcher) -> None:
        member, signature, *body = PREPARE
        message = Message(
            destination=BUS_NAME,
            path=OBJECT_PATH,
            member=member,
            signature=signature,
            body=body,
            flags=MessageFlag.NO_REPLY_EXPECTED,
        )
        await watcher.bus.send(message)
        assert (await watcher.wait_for_signal("JobRemoved"))[3] == "done"
        order = watcher.message_order()
        assert sorted(order) == ["JobNew", "JobRemoved", "SnapshotAdded"]
        assert order[-1] == "JobRemoved"

    run_with_watcher(scenario)
