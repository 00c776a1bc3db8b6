"""Calls of the client with progress: their reports and their cancellation."""

from __future__ import annotations

import asyncio
import os
import signal
import threading
from collections.abc import AsyncIterator, Callable, Coroutine
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, asynccontextmanager
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from dbus_next.constants import MessageType
from dbus_next.message import Message
from dbus_next.signature import Variant

from snapd_native.client import BlockingClient, Client, Job, Progress
from snapd_native.errors import AlreadyExists, Cancelled, NotFound, SnapdError, Unavailable
from snapd_native.model import Added, Kind, Mount, Usage
from snapd_native.wire.names import (
    BUS_NAME,
    DRIVER,
    DRIVER_PATH,
    JOB,
    JOB_PATH,
    MANAGER,
    OBJECT_PATH,
    PROPERTIES,
)
from tests.support.descriptors import THIS_PROCESS, nothing_left_open
from tests.support.file_systems import on_ext4
from tests.support.holding import hold_at_files, hold_workers
from tests.support.job_watch import Watcher, run_with_watcher
from tests.support.service import (
    HANG_TIMEOUT,
    Service,
    commit_snapshot,
    connection,
    expect_error,
    run_daemon,
    run_daemon_until_bus_ends,
    run_with_client,
    snapshots_and_directories,
)

pytestmark = on_ext4


class ProgressLog:
    """The progress that a call has reported."""

    def __init__(self) -> None:
        self.all: list[Progress] = []
        self.first = asyncio.Event()

    def __call__(self, progress: Progress) -> None:
        self.all.append(progress)
        self.first.set()

    def check(self, total: Usage) -> None:
        """Check that the counts never decrease and never exceed ``total``."""
        for count in ("inodes", "size"):
            values = [getattr(progress.done, count) for progress in self.all]
            assert values == sorted(values)
            assert all(value <= getattr(total, count) for value in values)
        assert all(progress.total == total for progress in self.all)


CALLS: dict[str, Callable[[Client, ProgressLog], Coroutine[Any, Any, Mount | None]]] = {
    "prepare": lambda client, seen: client.prepare("key", "base", {"a": "1"}, seen),
    "commit": lambda client, seen: client.commit("name", "work", {"a": "1"}, progress=seen),
}


@pytest.mark.parametrize("member", CALLS)
def test_a_call_with_progress_reports_the_progress_of_its_job(
    service_with_base: Service, shared_client: BlockingClient, member: str
) -> None:
    async def scenario(client: Client) -> Mount | None:
        seen = ProgressLog()
        with hold_workers(service_with_base):
            calling = asyncio.ensure_future(CALLS[member](client, seen))
            await seen.first.wait()
            (job,) = await client.jobs()
            key = "key" if member == "prepare" else "work"
            assert job == Job(job.id, member, key, 0)
            assert await client.progress(job.id) == seen.all[-1]
        outcome = await calling
        if member == "prepare":
            seen.check(await client.usage("base"))
        assert await client.jobs() == []
        return outcome

    outcome = run_with_client(scenario)
    if member == "prepare":
        assert outcome == shared_client.mounts("key")
        assert shared_client.stat("key").labels == {"a": "1"}
    else:
        assert outcome is None
        info = shared_client.stat("name")
        assert (info.kind, info.parent, info.labels) == (Kind.COMMITTED, "base", {"a": "1"})


def test_a_call_with_progress_succeeds_when_it_ends_at_once(service_with_base: Service) -> None:
    with BlockingClient() as client:
        for number in range(20):
            mount = client.prepare(f"{number}", progress=lambda _: None)
            assert client.mounts(f"{number}") == mount
            client.commit(f"name {number}", f"{number}", progress=lambda _: None)


@pytest.mark.parametrize(
    "body", [("", ""), ("work", "base"), ("new", "none"), ("new", "\0")], ids=ascii
)
def test_a_call_raises_the_same_error_with_and_without_progress(
    service_with_base: Service, shared_client: BlockingClient, body: tuple[str, str]
) -> None:
    reported: list[Progress] = []
    for call in (shared_client.prepare, shared_client.commit):
        with pytest.raises(SnapdError) as plain:
            call(*body)
        with pytest.raises(SnapdError) as caught:
            call(*body, progress=reported.append)
        assert type(caught.value) is type(plain.value)
        assert caught.value.message == plain.value.message
    assert reported == []


@asynccontextmanager
async def start_waiting_call(
    service: Service, client: Client, member: str = "prepare"
) -> AsyncIterator[tuple[asyncio.Task[Mount | None], ProgressLog]]:
    """Yield a call with progress that waits for workers."""
    seen = ProgressLog()
    with hold_workers(service):
        calling = asyncio.ensure_future(CALLS[member](client, seen))
        await seen.first.wait()
        yield calling, seen


@pytest.mark.parametrize("member", CALLS)
def test_a_cancelled_coroutine_cancels_its_job(
    service_with_base: Service, shared_client: BlockingClient, member: str
) -> None:
    before = snapshots_and_directories(shared_client, service_with_base)

    async def scenario(client: Client) -> None:
        async with (
            start_waiting_call(service_with_base, client, member) as (calling, _),
            Client() as other,
        ):
            calling.cancel()
            await asyncio.wait({calling})
            # The job is undone before the coroutine ends.
            assert await other.jobs() == []
            assert calling.cancelled()
        await client.list()

    run_with_client(scenario)
    assert snapshots_and_directories(shared_client, service_with_base) == before


def test_a_coroutine_cancelled_at_any_message_leaves_no_job(
    service_with_base: Service, shared_client: BlockingClient
) -> None:
    """The test cancels before the first message to the client, after the first, and so on."""
    before = snapshots_and_directories(shared_client, service_with_base)

    async def cancel_after(steps: int, client: Client) -> bool:
        """Cancel a call after ``steps`` messages; return whether it had reported progress."""
        connection = client._connected()
        left, seen = steps, ProgressLog()

        def count(_: Message) -> None:
            nonlocal left
            left -= 1
            if left == 0:
                calling.cancel()

        with hold_workers(service_with_base):
            calling = asyncio.ensure_future(CALLS["prepare"](client, seen))
            connection.add_message_handler(count)
            await asyncio.sleep(0)
            if not steps:
                calling.cancel()
            reported = asyncio.ensure_future(seen.first.wait())
            await asyncio.wait({calling, reported}, return_when=asyncio.FIRST_COMPLETED)
            for task in (calling, reported):
                task.cancel()
            await asyncio.wait({calling})
            connection.remove_message_handler(count)
            assert calling.cancelled(), f"after {steps} messages: {calling.exception()!r}"
            assert await client.jobs() == []
        await client.usage("work")
        return bool(seen.all)

    for steps in range(100):
        if run_with_client(partial(cancel_after, steps)):
            break
    assert snapshots_and_directories(shared_client, service_with_base) == before


def test_a_call_raises_cancelled_when_another_client_cancels_its_job(
    service_with_base: Service, shared_client: BlockingClient
) -> None:
    async def scenario(client: Client) -> None:
        async with start_waiting_call(service_with_base, client) as (calling, _), Client() as other:
            (job,) = await other.jobs()
            await other.cancel(job.id)
            with expect_error(Cancelled, '"key"', "was cancelled"):
                await calling
            for call in (other.cancel, other.progress):
                with expect_error(NotFound, f"no job {job.id}"):
                    await call(job.id)
            with expect_error(AlreadyExists, '"work"'):
                await client.prepare("work", "base", progress=lambda _: None)

    run_with_client(scenario)


@pytest.mark.parametrize("member", CALLS)
def test_ctrl_c_cancels_the_job_of_a_blocking_call(
    service_with_base: Service, shared_client: BlockingClient, member: str
) -> None:
    before = snapshots_and_directories(shared_client, service_with_base)
    reported: list[Progress] = []
    calls: dict[str, Callable[..., object]] = {
        "prepare": partial(shared_client.prepare, "key", "base"),
        "commit": partial(shared_client.commit, "name", "work"),
    }

    async def interrupt(client: Client) -> None:
        while not await client.jobs():
            pass
        os.kill(os.getpid(), signal.SIGINT)

    with ThreadPoolExecutor(1) as pool, hold_workers(service_with_base):
        interrupting = pool.submit(run_with_client, interrupt)
        with pytest.raises(KeyboardInterrupt):
            calls[member](progress=reported.append)
        interrupting.result(HANG_TIMEOUT)
    assert shared_client.jobs() == []
    assert snapshots_and_directories(shared_client, service_with_base) == before
    shared_client.prepare("key", "base", progress=reported.append)


def test_ctrl_c_in_the_progress_callback_cancels_the_job(
    service_with_base: Service, shared_client: BlockingClient
) -> None:
    before = snapshots_and_directories(shared_client, service_with_base)
    with hold_workers(service_with_base), pytest.raises(KeyboardInterrupt):
        shared_client.prepare("key", "base", progress=lambda _: signal.raise_signal(signal.SIGINT))
    assert shared_client.jobs() == []
    assert snapshots_and_directories(shared_client, service_with_base) == before


def test_a_waiting_call_raises_unavailable_when_the_daemon_is_killed(
    on_bus: str, scratch: Path
) -> None:
    with run_daemon(on_bus, scratch / "state", status=-signal.SIGKILL) as service:

        async def scenario(client: Client) -> None:
            async with start_waiting_call(service, client) as (calling, _):
                service.daemon.process.kill()
                with expect_error(Unavailable, "service"):
                    await calling

        with BlockingClient() as client:
            commit_snapshot(client, "base", files={"file": "text"})
        run_with_client(scenario)
    with run_daemon(on_bus, scratch / "state"), BlockingClient() as client:
        assert [info.name for info in client.list()] == ["base"]


def test_a_waiting_call_raises_unavailable_when_the_bus_ends(scratch: Path) -> None:
    with run_daemon_until_bus_ends(scratch / "state") as (service, end_bus):

        async def scenario(client: Client) -> None:
            async with start_waiting_call(service, client) as (calling, _):
                await asyncio.to_thread(end_bus)
                with expect_error(Unavailable, "bus"):
                    await calling

        with BlockingClient() as client:
            commit_snapshot(client, "base", files={"file": "text"})
        run_with_client(scenario)


@pytest.mark.parametrize("ended", [False, True], ids=["further", "gone"])
def test_a_slow_client_gets_correct_progress_and_its_result(
    shared_service: Service, shared_client: BlockingClient, ended: bool
) -> None:
    """Before the client asks about its job, the job has gone on without a signal, or ended."""
    tree = commit_snapshot(
        shared_client, "base", files={f"{number}": "text" for number in range(20)}
    )
    ready = threading.Event()

    async def observe(watcher: Watcher) -> None:
        ready.set()
        _, path = await watcher.wait_for_signal("JobNew")
        # The daemon signals no progress from before JobNew. So the copy goes on only after this
        # reply.
        await watcher.call("Stat", "s", "base")
        copy.release(5)
        _, changed, _ = await watcher.wait_for_signal("PropertiesChanged", path)
        if ended:
            holding.close()
            await watcher.wait_for_signal("JobRemoved", path)
            return
        copy.release(5)
        while (await watcher.properties(path))["EntriesDone"] == changed["EntriesDone"]:
            pass

    async def scenario(client: Client) -> None:
        def wait(message: Message) -> None:
            # Only the reply with the job's path is delayed.
            if message.message_type is MessageType.METHOD_RETURN and message.signature == "o":
                observing.result(HANG_TIMEOUT)

        def progress(now: Progress) -> None:
            seen(now)
            holding.close()

        client._connected().add_message_handler(wait)
        seen = ProgressLog()
        mount = await client.prepare("key", "base", progress=progress)
        assert mount == await client.mounts("key")
        assert bool(seen.all) is not ended
        seen.check(await client.usage("base"))

    with ThreadPoolExecutor(1) as pool, ExitStack() as holding:
        # The root does not wait.
        copy = holding.enter_context(hold_at_files(tree, after=1))
        observing = pool.submit(run_with_watcher, observe)
        assert ready.wait(HANG_TIMEOUT)
        run_with_client(scenario)


def forged_signals(path: str) -> list[Message]:
    """Return signals that any client can forge about the job at ``path`` and the service."""
    number = int(path.removeprefix(f"{JOB_PATH}/"))
    far = {"EntriesDone": Variant("t", 1 << 40)}
    return [
        Message.new_signal(path, PROPERTIES, "PropertiesChanged", "sa{sv}as", [JOB, far, []]),
        Message.new_signal(path, PROPERTIES, "PropertiesChanged", "u", [0]),
        Message.new_signal(OBJECT_PATH, MANAGER, "SnapshotAdded", "sss", ["lie", "active", ""]),
        Message.new_signal(OBJECT_PATH, MANAGER, "SnapshotAdded", "u", [0]),
        Message.new_signal(
            *(OBJECT_PATH, MANAGER, "JobRemoved", "uossss", [number, path, "key", "done", "", ""])
        ),
        Message.new_signal(DRIVER_PATH, DRIVER, "NameOwnerChanged", "sss", [BUS_NAME, ":1.1", ""]),
    ]


@pytest.mark.parametrize("aimed", [False, True], ids=["to all", "to the client"])
@pytest.mark.parametrize("forged", range(6))
def test_a_client_ignores_forged_signals_of_other_senders(
    service_with_base: Service, forged: int, aimed: bool
) -> None:
    """Every client of the system bus can send signals that look like those of the service."""

    async def say(path: str, to: str | None) -> None:
        async with connection() as forger:
            message = forged_signals(path)[forged]
            message.destination = to  # type: ignore[assignment]
            await forger.send(message)
            # The bus replies after it has delivered the message before.
            await forger.ask_driver("GetId", "", [])

    async def scenario(client: Client) -> None:
        async with client.changes() as changes:
            async with start_waiting_call(service_with_base, client) as (calling, seen):
                (job,) = await client.jobs()
                await say(
                    f"{JOB_PATH}/{job.id}", client._connected().unique_name if aimed else None
                )
                for _ in range(3):
                    await client.stat("base")
                assert not calling.done(), "it believes that the job or the service has ended"
            assert await calling == await client.mounts("key")
            seen.check(await client.usage("base"))
            assert await anext(changes) == Added("key", Kind.ACTIVE, "base")

    run_with_client(scenario)


def test_calls_with_progress_leave_no_open_descriptors(
    service_with_base: Service, shared_client: BlockingClient
) -> None:
    with nothing_left_open(THIS_PROCESS):
        for _ in range(10):
            with BlockingClient() as client:
                client.prepare("key", "base", progress=lambda _: None)
                client.remove("key")
