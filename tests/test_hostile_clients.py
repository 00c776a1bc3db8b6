"""Clients that flood, that never read, that leave in the middle: the service outlives them all."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from itertools import chain
from pathlib import Path
from typing import Any

import pytest
from dbus_next.constants import MessageFlag

from snapd_native.bus.backlog import DESCRIPTOR, OWN_IN_ALL, ROOM
from snapd_native.bus.introspection import document
from snapd_native.bus.lanes import Lane
from snapd_native.client import BlockingClient, Client
from snapd_native.model import Info
from snapd_native.private import private_bus
from snapd_native.wire.names import INTROSPECTABLE, JOB_PATH, OBJECT_PATH
from tests.bus_mounting import OPEN_TREE, has_open, stock
from tests.filesystems import on_ext4
from tests.hostile import MOST, crowd, names_of, peak, pid_of_bus, threads, waiting
from tests.polkit import POLICY, polkitd
from tests.service import (
    NOBODY,
    PATIENCE,
    Service,
    check_sentence,
    run,
    serving,
)
from tests.waiting import eventually, stays
from tests.watching import workers

pytestmark = on_ext4

SILENT = MessageFlag.NO_REPLY_EXPECTED
MEBIBYTE = 1 << 20
PAGE = 8 * MEBIBYTE

RULES = """
polkit.addRule(function(action, subject) {
    if (action.id == "org.snapdnative1.read") return polkit.Result.YES;
});
"""


@pytest.fixture
def stocked(service: Service) -> Service:
    """Have what `stock` makes, on a service that serves one test: what it takes is counted."""
    with BlockingClient() as client:
        stock(client)
    return service


def is_served() -> None:
    """Make calls of every lane, none of which may fail."""

    async def scenario(client: Client) -> None:
        assert (await client.stat("base")).name == "base"
        assert "base" in [info.name async for info in client.walk()]
        await client.prepare("new", "base")
        await client.update("new", {"a": "1"})
        await client.usage("new")
        await client.list_mounts()
        await client.remove("new")
        await client.cleanup()

    run(scenario)


def test_calls_of_connections_that_are_not_known_yet_are_not_all_kept(stocked: Service) -> None:
    """The bus tells who they are after all that they have sent."""
    is_served()
    before = peak(stocked.pid)
    with crowd(stocked.address, 10, NOBODY) as strangers:
        os.kill(stocked.pid, signal.SIGSTOP)
        try:
            for raw in strangers:
                call = raw.packed("Stat", "s", "base", flags=SILENT)
                raw.socket.sendall(call * 3000)
                raw.ask_driver("GetId")
                raw.replies(1)
        finally:
            os.kill(stocked.pid, signal.SIGCONT)
        is_served()
    assert peak(stocked.pid) - before < 24 * MEBIBYTE


def test_what_a_stranger_sends_does_not_come_back(stocked: Service) -> None:
    """A call may have a path of megabytes, before anybody knows whether it is allowed."""
    long = "x" * MEBIBYTE
    with crowd(stocked.address, 1, NOBODY) as (raw,):
        for path in (f"/{long}", f"{JOB_PATH}/{long}"):
            for member, interface in (
                ("Introspect", INTROSPECTABLE),
                ("Introspect", "org.example"),
                ("None", INTROSPECTABLE),
            ):
                raw.socket.sendall(raw.packed(member, path=path, interface=interface))
                (reply,) = raw.replies(1).values()
                check_sentence(reply.body[0])


CALLS: dict[str, list[tuple[Any, ...]]] = {
    "read": [("Stat", "s", "base"), ("Mounts", "s", "work"), ("Standby", "s", "base")],
    "list": [("List", "asa{sv}", [], {})],
    "change": [("Update", "sa{ss}as", "work", {"a": "1"}, []), ("View", "ssa{sv}", "look", "", {})],
    "mount": [("ListMounts", "s", ""), ("Unmount", "sa{sv}", "/none", {})],
    "tree": [
        ("Usage", "s", "base"),
        ("Prepare", "ssa{sv}", "work", "base", {}),
        ("Cleanup", "a{sv}", {}),
        ("Check", "a{sv}", {}),
    ],
}
"""Calls of each lane, none of which leaves anything."""

REFUSED = {"", "ResourceExhausted"}


@pytest.mark.parametrize(
    ("lane", "connections"),
    [("read", 100), ("tree", 100), ("list", 20), ("change", 20), ("mount", 20)],
)
def test_connections_with_all_calls_that_the_bus_allows(
    stocked: Service, lane: str, connections: int
) -> None:
    """Each gets an answer, perhaps that there are too many; others are served meanwhile."""
    is_served()
    before, state = stocked.descriptors(), snapshots()
    calls = CALLS[lane]
    times = MOST // len(calls)
    with crowd(stocked.address, connections) as clients:
        for raw in clients:
            for call in calls:
                raw.call(*call, times=times)
        outcomes = chain.from_iterable(raw.replies(times * len(calls)).values() for raw in clients)
        names = names_of(outcomes)
    assert names <= REFUSED | {"AlreadyExists", "NotFound"}
    assert "" in names or lane == "mount"
    eventually(lambda: has_open(stocked, before))
    assert [info.name for info in snapshots()] == [info.name for info in state]
    is_served()


def test_workers_do_not_grow_with_jobs(stocked: Service) -> None:
    """As many jobs go on as there may be; as few processes are kept as ever."""
    is_served()
    before = len(stocked.descriptors()), len(workers(stocked)), threads(stocked)
    with crowd(stocked.address, 2) as clients:
        for raw in clients:
            raw.call("Usage", "s", "work", times=MOST)
        outcomes = chain.from_iterable(raw.replies(MOST).values() for raw in clients)
        assert names_of(outcomes) <= REFUSED
    most = len(os.sched_getaffinity(0))
    eventually(lambda: len(workers(stocked)) <= most)
    assert len(stocked.descriptors()) <= before[0] - before[1] + most
    assert threads(stocked) <= before[2] + Lane.TREE.threads


def snapshots() -> list[Info]:
    with BlockingClient() as client:
        return list(client.walk())


def test_a_hundred_connections_of_a_stranger(stocked: Service) -> None:
    is_served()
    before, state = stocked.descriptors(), snapshots()
    grown = peak(stocked.pid)
    calls = [call for calls in CALLS.values() for call in calls]
    with crowd(stocked.address, 100, NOBODY) as clients:
        for number, raw in enumerate(clients):
            for call in calls:
                raw.call(*call, times=MOST // len(calls))
            if number % 10 == 0:
                is_served()
        count = MOST // len(calls) * len(calls)
        outcomes = chain.from_iterable(raw.replies(count).values() for raw in clients)
        assert names_of(outcomes) <= {"AccessDenied", "ResourceExhausted"}
    eventually(lambda: has_open(stocked, before))
    assert snapshots() == state
    assert peak(stocked.pid) - grown < 64 * MEBIBYTE


@pytest.fixture
def fat(stocked: Service) -> Service:
    """Have a page of List that is as large as one may be."""
    labels = {f"{number:03}": "x" * 4000 for number in range(250)}
    with BlockingClient() as client:
        for number in range(7):
            client.view(f"fat {number}", "base", labels)
    return stocked


@pytest.mark.parametrize("count", [1, 3, 20])
def test_who_does_not_read_large_answers_is_in_nobody_s_way(fat: Service, count: int) -> None:
    is_served()
    before, grown = fat.descriptors(), peak(fat.pid)
    with crowd(fat.address, count) as clients:
        for raw in clients:
            raw.call("List", "asa{sv}", [], {}, times=MOST)
        eventually(lambda: waiting(fat.address) > ROOM * count // (count + 1) - 2 * PAGE)
        # Hundreds of pages are asked for.
        for _ in range(20):
            is_served()
            assert waiting(fat.address) < ROOM + OWN_IN_ALL
        assert peak(fat.pid) - grown < 160 * MEBIBYTE
        for raw in clients:
            names = names_of(raw.replies(MOST).values())
            assert names <= REFUSED
            assert "ResourceExhausted" in names
    is_served()
    eventually(lambda: has_open(fat, before))


def test_strangers_who_do_not_read_are_in_nobody_s_way(stocked: Service) -> None:
    """What anybody may ask for is small, and comes to a lot."""
    is_served()
    grown = peak(stocked.pid)
    rounds = 2 * ROOM // len(document(OBJECT_PATH, []) or "") // (100 * MOST) + 1
    with crowd(stocked.address, 100, NOBODY) as strangers:
        for _ in range(rounds):
            for number, raw in enumerate(strangers):
                for _ in range(MOST):
                    raw.socket.sendall(raw.packed("Introspect", interface=INTROSPECTABLE))
                if number % 10 == 0:
                    is_served()
        assert ROOM * 0.9 < waiting(stocked.address) < ROOM + OWN_IN_ALL
    assert peak(stocked.pid) - grown < 64 * MEBIBYTE


def test_who_does_not_read_descriptors_does_not_take_them_all(stocked: Service) -> None:
    is_served()
    before = stocked.descriptors()
    with crowd(stocked.address, 60) as clients:
        for _ in range(8):
            # So few at once that none is refused for their number.
            for raw in clients:
                raw.call("OpenTree", OPEN_TREE, "work", {}, times=4)
            is_served()
            assert waiting(stocked.address, "FDs") <= ROOM // DESCRIPTOR
        for raw in clients:
            assert names_of(raw.replies(32).values()) <= REFUSED
        eventually(lambda: has_open(stocked, before))
    is_served()


def test_the_end_does_not_wait_for_who_does_not_read(fat: Service) -> None:
    with crowd(fat.address, 3) as clients:
        for raw in clients:
            raw.call("List", "asa{sv}", [], {}, times=MOST)
        eventually(lambda: waiting(fat.address) > ROOM // 2)
        fat.daemon.process.terminate()
        assert fat.daemon.process.wait(PATIENCE) == 0


def test_a_bus_that_takes_nothing_does_not_take_all_memory(fat: Service) -> None:
    is_served()
    grown, bus = peak(fat.pid), pid_of_bus(fat.address)
    with crowd(fat.address, 3) as clients:
        for raw in clients:
            raw.call("List", "asa{sv}", [], {}, times=MOST)
        eventually(lambda: waiting(fat.address) > 0)
        os.kill(bus, signal.SIGSTOP)
        try:
            stays(lambda: peak(fat.pid) - grown < 160 * MEBIBYTE, 5)
        finally:
            os.kill(bus, signal.SIGCONT)
    is_served()


def test_clients_that_send_and_vanish(stocked: Service) -> None:
    is_served()
    before = stocked.descriptors()
    for number in range(100):
        with crowd(stocked.address, 1) as (raw,):
            raw.call("Prepare", "ssa{sv}", f"new {number}", "base", {})
            raw.call("View", "ssa{sv}", f"view {number}", "base", {})
            raw.call("OpenTree", OPEN_TREE, "work", {})
            raw.call("Usage", "s", "work")
            raw.call("Remove", "sa{sv}", f"view {number}", {})
    is_served()
    eventually(lambda: has_open(stocked, before))
    with BlockingClient() as client:
        assert client.check() == []
        for info in client.walk():
            if info.name not in ("base", "work", "look"):
                assert info.parent == "base"
                client.usage(info.name)
                client.remove(info.name)


def test_messages_of_which_only_the_beginning_comes(stocked: Service) -> None:
    is_served()
    before = stocked.descriptors()
    with crowd(stocked.address, 50, NOBODY) as strangers, crowd(stocked.address, 50) as roots:
        for number, raw in enumerate((*strangers, *roots)):
            call = raw.packed("Update", "sa{ss}as", "work", {"half": "x" * 1000}, [])
            raw.socket.sendall(call[: 1 + number * 10])
        is_served()
        assert "half" not in run(lambda client: client.stat("work")).labels
    is_served()
    assert stocked.descriptors() == before


def test_who_listens_to_all_signals_and_reads_none(stocked: Service) -> None:
    is_served()
    before, grown = stocked.descriptors(), peak(stocked.pid)

    async def scenario(client: Client) -> None:
        async with client.changes() as changes:
            for number in range(1000):
                await client.update("work", {"a": str(number)})
                await anext(changes)

    with crowd(stocked.address, 20, NOBODY) as strangers:
        for raw in strangers:
            raw.ask_driver("AddMatch", "s", "type='signal'")
            raw.replies(1)
        run(scenario)
        is_served()
    assert peak(stocked.pid) - grown < 16 * MEBIBYTE
    assert stocked.descriptors() == before


def test_users_who_may_read_leave_room_for_root(
    scratch: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As many of their calls as there may be go on, and none gets on."""
    tmp_path.chmod(0o755)
    with private_bus([POLICY]) as address, polkitd(address, RULES, tmp_path):
        monkeypatch.setenv("DBUS_SYSTEM_BUS_ADDRESS", address)
        with serving(address, scratch / "state") as service, BlockingClient() as client:
            stock(client)
            with crowd(address, 1, NOBODY) as (stranger,), all_stopped(service) as stop:

                def fill() -> bool:
                    stranger.call("Usage", "s", "work", times=4)
                    stop()
                    return [job.uid for job in client.jobs()] == [NOBODY] * Lane.TREE.threads

                eventually(fill)
                client.prepare("new")
                assert client.usage("base").inodes == 2
                client.remove("new")
                client.cleanup()


@contextmanager
def all_stopped(service: Service) -> Iterator[Callable[[], None]]:
    """Yield what stops the workers that there are; they go on in the end."""
    stopped: set[int] = set()

    def stop() -> None:
        for pid in workers(service):
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGSTOP)
                stopped.add(pid)

    try:
        yield stop
    finally:
        for pid in stopped:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGCONT)
