"""The end of the daemon by SIGTERM or SIGKILL, and the state that it leaves."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

import pytest

from snapd_native.client import BlockingClient, Client
from snapd_native.errors import NotFound, Unavailable
from snapd_native.model import Kind
from tests.support.daemon_process import DAEMON_WITHOUT_GRACE, Notifications, start_daemon
from tests.support.file_systems import long_on_xfs
from tests.support.holding import hold_at_files
from tests.support.service import (
    HANG_TIMEOUT,
    commit_snapshot,
    expect_error,
    run_daemon,
    run_with_client,
)

pytestmark = long_on_xfs

DIRECTORIES = 10
"""Directories in the tree that a call reads when the daemon ends, each with one file."""

ENTRIES = 2 * DIRECTORIES + 1
"""Inodes of that tree, with its root."""


def commit_big(client: BlockingClient) -> Path:
    """Commit `big`, and return the path of its tree."""
    files = {f"{number}/file": "text" for number in range(DIRECTORIES)}
    return commit_snapshot(client, "big", files=files)


def snapshots_after_restart(on_bus: str, state: Path) -> Mapping[str, Kind]:
    """Restart the service, check that each snapshot has one tree, and return the snapshots."""
    with run_daemon(on_bus, state) as service, BlockingClient() as client:
        infos = list(client.walk())
        trees = set(os.listdir(state / "snapshots"))
        assert len(trees) == len(infos)
        for info in infos:
            if info.kind is not Kind.COMMITTED:
                assert Path(client.mounts(info.name).source).name in trees
            assert client.usage(info.name).inodes == ENTRIES
        client.cleanup()
        assert set(os.listdir(state / "snapshots")) == trees
        assert service.daemon.process.poll() is None
        return {info.name: info.kind for info in infos}


StartCall = Callable[[Client], "asyncio.Future[object]"]

LONG_CALLS: dict[str, tuple[StartCall, str, set[str]]] = {
    "Prepare": (
        lambda c: asyncio.ensure_future(c.prepare("new", "big")),
        "big",
        {"big", "key", "new"},
    ),
    "Commit": (lambda c: asyncio.ensure_future(c.commit("new", "key")), "key", {"big", "new"}),
}
"""Calls that take long: the start, the snapshot whose tree is read, the snapshots afterwards."""


def commit_big_and_prepare_key() -> dict[str, Path]:
    """Return the paths of both trees."""
    with BlockingClient() as client:
        big = commit_big(client)
        return {"big": big, "key": Path(client.prepare("key", "big").source)}


@pytest.mark.parametrize("member", LONG_CALLS)
def test_a_stopping_daemon_finishes_a_running_call(on_bus: str, scratch: Path, member: str) -> None:
    state = scratch / "state"
    begin, walked, done = LONG_CALLS[member]
    with run_daemon(on_bus, state) as service:
        trees = commit_big_and_prepare_key()

        async def scenario(client: Client) -> None:
            with hold_at_files(trees[walked] / "5") as walk:
                running = begin(client)
                await asyncio.to_thread(walk.wait_until_reached)
                service.daemon.process.terminate()
                async with Client() as other:
                    with expect_error(Unavailable, "is stopping"):
                        while True:
                            await other.stat("big")
                assert not running.done()
            await running

        run_with_client(scenario)
    assert snapshots_after_restart(on_bus, state).keys() == done


def test_more_signals_while_the_daemon_ends_do_not_change_its_exit_status(
    on_bus: str, scratch: Path
) -> None:
    with run_daemon(on_bus, scratch / "state") as service:
        ended = False
        while not ended:
            service.daemon.process.terminate()
            with suppress(subprocess.TimeoutExpired):
                service.daemon.process.wait(0.01)
                ended = True


def test_a_stopping_daemon_undoes_a_copy_that_takes_too_long(
    on_bus: str, scratch: Path, notifications: Notifications
) -> None:
    state = scratch / "state"
    program = DAEMON_WITHOUT_GRACE.format(state=str(state))
    with start_daemon(on_bus, state, notifications, program) as daemon:
        notifications.read_until("READY=1")
        with BlockingClient() as client:
            tree = commit_big(client)
        with (
            BlockingClient() as client,
            ThreadPoolExecutor(1) as pool,
            hold_at_files(tree / "5" / "file") as copy,
        ):
            running = pool.submit(client.prepare, "new", "big")
            copy.wait_until_reached()
            daemon.terminate()
            with expect_error(Unavailable, "is stopping"):
                running.result()
    assert len(os.listdir(state / "snapshots")) == 1
    assert snapshots_after_restart(on_bus, state).keys() == {"big"}


def test_a_daemon_stopped_during_a_deletion_leaves_a_consistent_state(
    on_bus: str, scratch: Path
) -> None:
    state = scratch / "state"
    with run_daemon(on_bus, state) as service:
        with BlockingClient() as client:
            tree = commit_big(client)
            with hold_at_files(tree / "5") as deletion:
                client.remove("big")
                deletion.wait_until_reached()
                service.daemon.process.terminate()
        assert service.daemon.process.wait(HANG_TIMEOUT) == 0
    assert snapshots_after_restart(on_bus, state) == {}


@pytest.mark.parametrize("member", LONG_CALLS)
@pytest.mark.parametrize("where", [".", "5"])
def test_a_killed_daemon_leaves_nothing_of_a_running_call(
    on_bus: str, scratch: Path, member: str, where: str
) -> None:
    """The daemon is killed when a worker opens the root of the tree, or in the middle of it."""
    state = scratch / "state"
    begin, walked, _ = LONG_CALLS[member]
    with run_daemon(on_bus, state, status=-signal.SIGKILL) as service:
        trees = commit_big_and_prepare_key()

        async def scenario(client: Client) -> None:
            with hold_at_files(trees[walked] / where) as walk:
                running = begin(client)
                await asyncio.to_thread(walk.wait_until_reached)
                service.daemon.process.kill()
                await asyncio.wait({running})
                assert isinstance(running.exception(), Unavailable)

        run_with_client(scenario)
    assert snapshots_after_restart(on_bus, state).keys() == {"big", "key"}


def test_acknowledged_calls_survive_a_kill_of_the_daemon(on_bus: str, scratch: Path) -> None:
    state = scratch / "state"
    with run_daemon(on_bus, state, status=-signal.SIGKILL) as service, BlockingClient() as client:
        for number in range(20):
            commit_snapshot(
                client, f"{number}", str(number - 1) if number else "", {f"{number}": "text"}
            )
        client.prepare("key", "19", {"a": "1"})
        client.view("view", "19")
        client.update("view", {"b": "2"})
        client.remove("view")
        service.daemon.process.kill()
        before = {"key"} | {str(number) for number in range(20)}
        service.daemon.process.wait(HANG_TIMEOUT)
    with run_daemon(on_bus, state), BlockingClient() as client:
        assert {info.name for info in client.list()} == before
        root = Path(client.mounts("key").source)
        assert {path.name: path.read_text() for path in root.iterdir()} == {
            str(number): "text" for number in range(20)
        }
        assert client.stat("key").labels == {"a": "1"}
        with expect_error(NotFound, '"view"'):
            client.stat("view")
