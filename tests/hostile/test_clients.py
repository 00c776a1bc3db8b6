"""Clients that flood the daemon, stop reading, or leave in the middle of a call."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Iterator
from contextlib import ExitStack
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
from tests.support.bus_mounts import OPEN_TREE, stock
from tests.support.descriptors import descriptors, hands, wait_until_closed, workers
from tests.support.file_systems import on_ext4
from tests.support.holding import held
from tests.support.polkit_daemon import POLICY, polkitd
from tests.support.raw_client import (
    MOST,
    Raw,
    crowd,
    names_of,
    peak,
    pid_of_bus,
    threads,
    wait_until_asleep,
    waiting,
)
from tests.support.service import (
    NOBODY,
    PATIENCE,
    Service,
    check_sentence,
    run,
    serving,
)
from tests.support.waiting import eventually

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
def said(tmp_path: Path) -> Path:
    """Return the path of a file for the standard error of the daemon."""
    return tmp_path / "said"


@pytest.fixture
def service(on_bus: str, scratch: Path, said: Path) -> Iterator[Service]:
    """Run a daemon for one test."""
    with ExitStack() as stack:
        own = os.dup(2)
        with said.open("wb") as file:
            os.dup2(file.fileno(), 2)
        try:
            started = stack.enter_context(serving(on_bus, scratch / "state"))
        finally:
            os.dup2(own, 2)
            os.close(own)
        yield started
    print(said.read_text(), end="", file=sys.stderr)


@pytest.fixture
def stocked(service: Service) -> Service:
    """Make the snapshots of `stock` on a service for one test, which measures its resources."""
    with BlockingClient() as client:
        stock(client)
    return service


def is_served() -> None:
    """Check that calls of several lanes succeed for root."""

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


def test_calls_of_unidentified_connections_do_not_fill_the_memory(stocked: Service) -> None:
    """The bus delivers all their calls before it tells the daemon their uids."""
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


def test_error_messages_do_not_repeat_a_path_of_a_mebibyte(stocked: Service) -> None:
    """The daemon reads the path of a call, which can have megabytes, before the authorisation."""
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
"""Calls of each lane; none of them makes or removes a snapshot."""

REFUSED = {"", "ResourceExhausted"}


@pytest.mark.parametrize(
    ("lane", "connections"),
    [
        *(("read", 20), ("tree", 20), ("list", 20), ("change", 20), ("mount", 20)),
        pytest.param("read", 100, marks=pytest.mark.long),
        pytest.param("tree", 100, marks=pytest.mark.long),
    ],
)
def test_every_call_of_many_full_connections_is_answered(
    stocked: Service, lane: str, connections: int
) -> None:
    """Some answers may be that there are too many calls."""
    is_served()
    before, state = descriptors(stocked), snapshots()
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
    wait_until_closed(stocked, before)
    assert [info.name for info in snapshots()] == [info.name for info in state]
    is_served()


def test_workers_and_threads_stay_bounded_under_many_jobs(stocked: Service) -> None:
    """The most jobs run that may; afterwards the daemon keeps only its usual workers."""
    is_served()
    before, grown = descriptors(stocked), threads(stocked)
    with crowd(stocked.address, 2) as clients:
        for raw in clients:
            raw.call("Usage", "s", "work", times=MOST)
        outcomes = chain.from_iterable(raw.replies(MOST).values() for raw in clients)
        assert names_of(outcomes) <= REFUSED
    eventually(lambda: len(workers(stocked)) <= hands(stocked), lambda: workers(stocked))
    wait_until_closed(stocked, before)
    assert threads(stocked) <= grown + Lane.SURVEY.threads


def snapshots() -> list[Info]:
    with BlockingClient() as client:
        return list(client.walk())


def test_a_hundred_connections_of_a_denied_user_do_not_delay_root(stocked: Service) -> None:
    is_served()
    before, state = descriptors(stocked), snapshots()
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
    wait_until_closed(stocked, before)
    assert snapshots() == state
    assert peak(stocked.pid) - grown < 64 * MEBIBYTE


@pytest.fixture
def fat(stocked: Service) -> Service:
    """Add views, so that a page of List has almost the largest allowed size."""
    labels = {f"{number:03}": "x" * 4000 for number in range(250)}
    with BlockingClient() as client:
        for number in range(7):
            client.view(f"fat {number}", "base", labels)
    return stocked


@pytest.mark.parametrize(
    "count", [1, *(pytest.param(count, marks=pytest.mark.long) for count in (3, 20))]
)
def test_a_client_that_stops_reading_does_not_delay_other_clients(
    fat: Service, said: Path, count: int
) -> None:
    def is_behind(raw: Raw) -> bool:
        return f"{raw.name} does not read its answers" in said.read_text()

    is_served()
    before, grown = descriptors(fat), peak(fat.pid)
    with crowd(fat.address, count) as clients:
        for raw in clients:
            raw.call("List", "asa{sv}", [], {}, times=MOST)
        eventually(lambda: waiting(fat.address) > ROOM * count // (count + 1) - 2 * PAGE)
        # The clients have requested more than a hundred pages.
        for _ in range(20):
            is_served()
            assert waiting(fat.address) < ROOM + OWN_IN_ALL
        # Calls of the first two clients are refused because these do not read. Some calls of later
        # clients are refused because there are too many at once.
        eventually(lambda: all(map(is_behind, clients[:2])), said.read_text)
        assert peak(fat.pid) - grown < 160 * MEBIBYTE
        for raw in clients:
            names = names_of(raw.replies(MOST).values())
            assert names <= REFUSED
            assert "ResourceExhausted" in names
    is_served()
    wait_until_closed(fat, before)


@pytest.mark.long
def test_other_users_that_stop_reading_do_not_delay_root(stocked: Service) -> None:
    """A reply that every user may request is small, but many replies need much memory."""
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
        eventually(lambda: waiting(stocked.address) > ROOM * 0.9)
        assert waiting(stocked.address) < ROOM + OWN_IN_ALL
    assert peak(stocked.pid) - grown < 64 * MEBIBYTE


def test_clients_that_stop_reading_cannot_exhaust_the_descriptors(stocked: Service) -> None:
    is_served()
    before = descriptors(stocked)
    with crowd(stocked.address, 60) as clients:
        for _ in range(8):
            # These are too few calls at once to be refused for their number.
            for raw in clients:
                raw.call("OpenTree", OPEN_TREE, "work", {}, times=4)
            is_served()
            assert waiting(stocked.address, "FDs") <= ROOM // DESCRIPTOR
        for raw in clients:
            assert names_of(raw.replies(32).values()) <= REFUSED
        wait_until_closed(stocked, before)
    is_served()


@pytest.mark.long
def test_a_stopping_daemon_does_not_wait_for_clients_that_stop_reading(fat: Service) -> None:
    with crowd(fat.address, 3) as clients:
        for raw in clients:
            raw.call("List", "asa{sv}", [], {}, times=MOST)
        eventually(lambda: waiting(fat.address) > ROOM // 2)
        fat.daemon.process.terminate()
        assert fat.daemon.process.wait(PATIENCE) == 0


@pytest.mark.long
def test_a_bus_that_stops_reading_does_not_fill_the_memory(fat: Service) -> None:
    is_served()
    grown, bus = peak(fat.pid), pid_of_bus(fat.address)
    with crowd(fat.address, 3) as clients:
        for raw in clients:
            raw.call("List", "asa{sv}", [], {}, times=MOST)
        eventually(lambda: waiting(fat.address) > 0)
        os.kill(bus, signal.SIGSTOP)
        try:
            # Wait until the daemon can send no more before the bus continues.
            wait_until_asleep(fat.pid)
            assert peak(fat.pid) - grown < 160 * MEBIBYTE
        finally:
            os.kill(bus, signal.SIGCONT)
    is_served()


def test_clients_that_leave_after_their_calls_leave_a_consistent_state(stocked: Service) -> None:
    is_served()
    before = descriptors(stocked)
    for number in range(100):
        with crowd(stocked.address, 1) as (raw,):
            raw.call("Prepare", "ssa{sv}", f"new {number}", "base", {})
            raw.call("View", "ssa{sv}", f"view {number}", "base", {})
            raw.call("OpenTree", OPEN_TREE, "work", {})
            raw.call("Usage", "s", "work")
            raw.call("Remove", "sa{sv}", f"view {number}", {})
    is_served()
    wait_until_closed(stocked, before)
    with BlockingClient() as client:
        assert client.check() == []
        for info in client.walk():
            if info.name not in ("base", "work", "look"):
                assert info.parent == "base"
                client.usage(info.name)
                client.remove(info.name)


def test_incomplete_messages_do_not_delay_other_clients(stocked: Service) -> None:
    is_served()
    before = descriptors(stocked)
    with crowd(stocked.address, 50, NOBODY) as strangers, crowd(stocked.address, 50) as roots:
        for number, raw in enumerate((*strangers, *roots)):
            call = raw.packed("Update", "sa{ss}as", "work", {"half": "x" * 1000}, [])
            raw.socket.sendall(call[: 1 + number * 10])
        is_served()
        assert "half" not in run(lambda client: client.stat("work")).labels
    is_served()
    wait_until_closed(stocked, before)


def test_clients_that_do_not_read_signals_do_not_delay_other_clients(stocked: Service) -> None:
    is_served()
    before, grown = descriptors(stocked), peak(stocked.pid)

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
    wait_until_closed(stocked, before)


def test_calls_of_other_users_leave_threads_for_root(
    scratch: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The most calls of theirs run that may, and none ends."""
    tmp_path.chmod(0o755)
    with private_bus([POLICY]) as address, polkitd(address, RULES, tmp_path):
        monkeypatch.setenv("DBUS_SYSTEM_BUS_ADDRESS", address)
        with serving(address, scratch / "state"), BlockingClient() as client:
            stock(client)
            inside = Path(client.mounts("work").source) / "inside"
            inside.mkdir()
            with crowd(address, 1, NOBODY) as (stranger,), held(inside):

                def fill() -> bool:
                    # More calls at once would be too many questions to polkit.
                    stranger.call("Usage", "s", "work", times=4)
                    return [job.uid for job in client.jobs()] == [NOBODY] * Lane.SURVEY.threads

                eventually(fill)
                client.prepare("new")
                assert client.usage("base").inodes == 2
                client.remove("new")
                client.cleanup()
