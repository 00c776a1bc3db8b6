"""The daemon's end, by will or by force, and what there is after it."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest

from snapd_native.client import BlockingClient, Client
from snapd_native.errors import NotFound, Unavailable
from snapd_native.model import Kind
from tests.daemons import IMPATIENT, Notifications, started
from tests.service import (
    PATIENCE,
    committed,
    committed_big,
    refused,
    run,
    serving,
    wait_until_held,
)
from tests.watching import directories_copied, held_up, is_half_copied

FILES = 10_000
"""In the tree that is copied when the end comes."""

ENTRIES = FILES + FILES // 1000 + 1
"""With its directories and its root."""


def consistent(on_bus: str, state: Path) -> Mapping[str, Kind]:
    """Start the service again and return what it has; every record has a tree, and no more."""
    with serving(on_bus, state) as service, BlockingClient() as client:
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


Begin = Callable[[Client], "asyncio.Future[object]"]

LONG: dict[str, tuple[Begin, str, list[set[str]]]] = {
    "Prepare": (
        lambda c: asyncio.ensure_future(c.prepare("new", "big")),
        "new",
        [{"big", "key"}, {"big", "key", "new"}],
    ),
    "Commit": (
        lambda c: asyncio.ensure_future(c.commit("new", "key")),
        "new",
        [{"big", "key"}, {"big", "new"}],
    ),
}
"""A call that takes long, the name that it holds meanwhile, and what there may be afterwards."""


@pytest.mark.parametrize("member", LONG)
def test_a_running_call_is_finished_at_the_end(on_bus: str, scratch: Path, member: str) -> None:
    state = scratch / "state"
    begin, name, (_, done) = LONG[member]
    with serving(on_bus, state) as service:

        async def scenario(client: Client) -> None:
            with held_up(service):
                running = begin(client)
                async with Client() as other:
                    await wait_until_held(other, name)
                    service.daemon.process.terminate()
                    with refused(Unavailable, "is stopping"):
                        while True:
                            await other.stat("big")
                assert not running.done()
            await running

        with BlockingClient() as client:
            committed_big(client, "big", FILES)
            client.prepare("key", "big")
        run(scenario)
    assert consistent(on_bus, state).keys() == done


def test_a_copy_that_takes_too_long_at_the_end_is_undone(
    on_bus: str, scratch: Path, notifications: Notifications
) -> None:
    state = scratch / "state"
    program = IMPATIENT.format(state=str(state))
    with started(on_bus, state, notifications, program) as daemon:
        notifications.until("READY=1")

        async def scenario(client: Client) -> None:
            while True:
                running = asyncio.ensure_future(client.prepare("new", "big"))
                async with Client() as other:
                    while not (running.done() or is_half_copied(state, FILES // 1000)):
                        await other.stat("big")
                with held_up(daemon):
                    # A fast copy may be done before anybody could stop it.
                    if is_half_copied(state, FILES // 1000):
                        daemon.terminate()
                        with refused(Unavailable, "is stopping"):
                            await running
                        break
                await running
                await client.remove("new")

        with BlockingClient() as client:
            committed_big(client, "big", FILES)
        run(scenario)
    assert len(os.listdir(state / "snapshots")) == 1
    assert consistent(on_bus, state).keys() == {"big"}


def test_a_deletion_does_not_hold_up_the_end(on_bus: str, scratch: Path) -> None:
    state = scratch / "state"
    with serving(on_bus, state) as service:
        with BlockingClient() as client:
            committed_big(client, "big", FILES)
            client.remove("big")
        service.daemon.process.terminate()
    assert consistent(on_bus, state) == {}


@pytest.mark.parametrize("member", LONG)
@pytest.mark.parametrize("directories", [0, FILES // 2000])
def test_a_crash_leaves_all_or_nothing(
    on_bus: str, scratch: Path, member: str, directories: int
) -> None:
    """Killed as soon as the call has begun, or with about half of the tree done."""
    state = scratch / "state"
    begin, name, allowed = LONG[member]
    with serving(on_bus, state, status=-signal.SIGKILL) as service:

        async def scenario(client: Client) -> None:
            running = begin(client)
            async with Client() as other:
                await wait_until_held(other, name)
                while (there := directories_copied(state)) is not None and there < directories:
                    await other.stat("big")
                service.daemon.process.kill()
                await asyncio.wait({running})
                running.exception()

        with BlockingClient() as client:
            committed_big(client, "big", FILES)
            client.prepare("key", "big")
        run(scenario)
    assert consistent(on_bus, state).keys() in allowed


def test_what_was_acknowledged_survives_a_crash(on_bus: str, scratch: Path) -> None:
    state = scratch / "state"
    with serving(on_bus, state, status=-signal.SIGKILL) as service, BlockingClient() as client:
        for number in range(20):
            committed(client, f"{number}", str(number - 1) if number else "", {f"{number}": "text"})
        client.prepare("key", "19", {"a": "1"})
        client.view("view", "19")
        client.update("view", {"b": "2"})
        client.remove("view")
        service.daemon.process.kill()
        before = {"key"} | {str(number) for number in range(20)}
        service.daemon.process.wait(PATIENCE)
    with serving(on_bus, state), BlockingClient() as client:
        assert {info.name for info in client.list()} == before
        root = Path(client.mounts("key").source)
        assert {path.name: path.read_text() for path in root.iterdir()} == {
            str(number): "text" for number in range(20)
        }
        assert client.stat("key").labels == {"a": "1"}
        with refused(NotFound, '"view"'):
            client.stat("view")
