"""Clients that flood the daemon, stop reading, or leave in the middle of a call."""

from __future__ import annotations

import os
import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack
from itertools import chain
from pathlib import Path
from typing import Any

import pytest
from dbus_next.constants import MessageFlag

from snapd_native.bus.introspection import describe
from snapd_native.bus.lanes import Lane
from snapd_native.bus.outbox import DESCRIPTOR, OWN_IN_ALL, ROOM
from snapd_native.client import BlockingClient, Client
from snapd_native.model import Info
from snapd_native.private import private_bus
from snapd_native.wire.names import INTROSPECTABLE, JOB_PATH, OBJECT_PATH
from tests.support.bus_mounts import OPEN_TREE, populate_service
from tests.support.descriptors import descriptors, max_workers, wait_until_closed, worker_pids
from tests.support.file_systems import on_ext4
from tests.support.holding import hold_at_files, stop_processes
from tests.support.polkit_daemon import POLICY, run_polkitd
from tests.support.raw_client import (
    MAX_OPEN_CALLS,
    RawClient,
    bus_pid,
    connect_many,
    error_names,
    peak_memory,
    queued_at_bus,
    thread_count,
    wait_until_asleep,
)
from tests.support.service import (
    HANG_TIMEOUT,
    NOBODY,
    Service,
    check_sentence,
    run_daemon,
    run_with_client,
)
from tests.support.waiting import wait_until

pytestmark = on_ext4

NO_REPLY = MessageFlag.NO_REPLY_EXPECTED
MEBIBYTE = 1 << 20
PAGE = 8 * MEBIBYTE

DAEMON_USER = 1
"""The uid of the user `daemon`, which every Debian has."""

RULES = """
polkit.addRule(function(action, subject) {
    if (action.id == "org.snapdnative1.read") return polkit.Result.YES;
});
"""


@pytest.fixture
def log_file(tmp_path: Path) -> Path:
    """Return the path of a file for the standard error of the daemon."""
    return tmp_path / "said"


@pytest.fixture
def service(on_bus: str, scratch: Path, log_file: Path) -> Iterator[Service]:
    """Run a daemon for one test."""
    with ExitStack() as stack:
        own = os.dup(2)
        with log_file.open("wb") as file:
            os.dup2(file.fileno(), 2)
        try:
            started = stack.enter_context(run_daemon(on_bus, scratch / "state"))
        finally:
            os.dup2(own, 2)
            os.close(own)
        yield started
    print(log_file.read_text(), end="", file=sys.stderr)


@pytest.fixture
def populated_service(service: Service) -> Service:
    """Populate a service for one test, which measures its resources."""
    with BlockingClient() as client:
        populate_service(client)
    return service


def check_root_is_served() -> None:
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

    run_with_client(scenario)


def test_calls_of_unidentified_connections_do_not_fill_the_memory(
    populated_service: Service,
) -> None:
    """The bus delivers all their calls before it tells the daemon their uids."""
    check_root_is_served()
    before = peak_memory(populated_service.pid)
    with connect_many(populated_service.address, 10, NOBODY) as denied:
        with stop_processes(populated_service.pid):
            for raw in denied:
                call = raw.pack_call("Stat", "s", "base", flags=NO_REPLY)
                raw.socket.sendall(call * 3000)
                raw.ask_driver("GetId")
                raw.replies(1)
        check_root_is_served()
    assert peak_memory(populated_service.pid) - before < 24 * MEBIBYTE


def test_error_messages_do_not_repeat_a_path_of_a_mebibyte(populated_service: Service) -> None:
    """The daemon reads the path of a call, which can have megabytes, before the authorisation."""
    long = "x" * MEBIBYTE
    with connect_many(populated_service.address, 1, NOBODY) as (raw,):
        for path in (f"/{long}", f"{JOB_PATH}/{long}"):
            for member, interface in (
                ("Introspect", INTROSPECTABLE),
                ("Introspect", "org.example"),
                ("None", INTROSPECTABLE),
            ):
                raw.socket.sendall(raw.pack_call(member, path=path, interface=interface))
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

DONE_OR_REFUSED = {"", "ResourceExhausted"}


@pytest.mark.parametrize(
    ("lane", "connections"),
    [
        *((lane, 4) for lane in CALLS),
        *(pytest.param(lane, 20, marks=pytest.mark.long) for lane in CALLS),
        pytest.param("read", 100, marks=pytest.mark.long),
        pytest.param("tree", 100, marks=pytest.mark.long),
    ],
)
def test_every_call_of_many_full_connections_is_answered(
    populated_service: Service, lane: str, connections: int
) -> None:
    """Some replies may say that there are too many calls."""
    check_root_is_served()
    before, state = descriptors(populated_service), list_snapshots()
    calls = CALLS[lane]
    times = MAX_OPEN_CALLS // len(calls)
    with connect_many(populated_service.address, connections) as clients:
        for raw in clients:
            for call in calls:
                raw.call(*call, times=times)
        outcomes = chain.from_iterable(raw.replies(times * len(calls)).values() for raw in clients)
        names = error_names(outcomes)
    assert names <= DONE_OR_REFUSED | {"AlreadyExists", "NotFound"}
    assert "" in names or lane == "mount"
    wait_until_closed(populated_service, before)
    assert [info.name for info in list_snapshots()] == [info.name for info in state]
    check_root_is_served()


def test_workers_and_threads_stay_bounded_under_many_jobs(populated_service: Service) -> None:
    """As many jobs run as may run at once; later the daemon keeps only its usual workers."""
    check_root_is_served()
    before, grown = descriptors(populated_service), thread_count(populated_service)
    with connect_many(populated_service.address, 2) as clients:
        for raw in clients:
            raw.call("Usage", "s", "work", times=MAX_OPEN_CALLS)
        outcomes = chain.from_iterable(raw.replies(MAX_OPEN_CALLS).values() for raw in clients)
        assert error_names(outcomes) <= DONE_OR_REFUSED
    wait_until(
        lambda: len(worker_pids(populated_service)) <= max_workers(populated_service),
        lambda: worker_pids(populated_service),
    )
    wait_until_closed(populated_service, before)
    assert thread_count(populated_service) <= grown + Lane.SURVEY.threads


def list_snapshots() -> list[Info]:
    with BlockingClient() as client:
        return list(client.walk())


@pytest.mark.parametrize("count", [20, pytest.param(100, marks=pytest.mark.long)])
def test_many_connections_of_a_denied_user_do_not_delay_root(
    populated_service: Service, count: int
) -> None:
    check_root_is_served()
    before, state = descriptors(populated_service), list_snapshots()
    grown = peak_memory(populated_service.pid)
    calls = [call for calls in CALLS.values() for call in calls]
    with connect_many(populated_service.address, count, NOBODY) as clients:
        for number, raw in enumerate(clients):
            for call in calls:
                raw.call(*call, times=MAX_OPEN_CALLS // len(calls))
            if number % 10 == 0:
                check_root_is_served()
        expected = MAX_OPEN_CALLS // len(calls) * len(calls)
        outcomes = chain.from_iterable(raw.replies(expected).values() for raw in clients)
        assert error_names(outcomes) <= {"AccessDenied", "ResourceExhausted"}
    wait_until_closed(populated_service, before)
    assert list_snapshots() == state
    assert peak_memory(populated_service.pid) - grown < 64 * MEBIBYTE


@pytest.fixture
def service_with_large_pages(populated_service: Service) -> Service:
    """Add views, so that a page of List has almost the largest allowed size."""
    labels = {f"{number:03}": "x" * 4000 for number in range(250)}
    with BlockingClient() as client:
        for number in range(7):
            client.view(f"big {number}", "base", labels)
    return populated_service


@pytest.mark.parametrize(
    "count", [1, *(pytest.param(count, marks=pytest.mark.long) for count in (3, 20))]
)
def test_a_client_that_stops_reading_does_not_delay_other_clients(
    service_with_large_pages: Service, log_file: Path, count: int
) -> None:
    def is_slow(raw: RawClient) -> bool:
        return f"{raw.name} reads its replies slowly, or not" in log_file.read_text()

    check_root_is_served()
    before, grown = descriptors(service_with_large_pages), peak_memory(service_with_large_pages.pid)
    pages = 40
    with connect_many(service_with_large_pages.address, count) as clients:
        for raw in clients:
            raw.call("List", "asa{sv}", [], {}, times=pages)
        wait_until(
            lambda: (
                queued_at_bus(service_with_large_pages.address)
                > ROOM * count // (count + 1) - 2 * PAGE
            )
        )
        # Each client has requested more than fits into the memory that the service may use.
        for _ in range(20):
            check_root_is_served()
            assert queued_at_bus(service_with_large_pages.address) < ROOM + OWN_IN_ALL
        # The calls of the first two clients wait because these do not read. Some calls of later
        # clients are refused because the first have left too little room.
        wait_until(lambda: all(map(is_slow, clients[:2])), log_file.read_text)
        assert peak_memory(service_with_large_pages.pid) - grown < 160 * MEBIBYTE
        for raw in clients:
            names = error_names(raw.replies(pages).values())
            assert names <= ({""} if count == 1 else DONE_OR_REFUSED)
    check_root_is_served()
    wait_until_closed(service_with_large_pages, before)


@pytest.mark.long
def test_other_users_that_stop_reading_do_not_delay_root(populated_service: Service) -> None:
    """A reply that every user may request is small, but many replies need much memory."""
    check_root_is_served()
    grown = peak_memory(populated_service.pid)
    rounds = 2 * ROOM // len(describe(OBJECT_PATH, []) or "") // (100 * MAX_OPEN_CALLS) + 1
    with connect_many(populated_service.address, 100, NOBODY) as denied:
        for _ in range(rounds):
            for number, raw in enumerate(denied):
                for _ in range(MAX_OPEN_CALLS):
                    raw.socket.sendall(raw.pack_call("Introspect", interface=INTROSPECTABLE))
                if number % 10 == 0:
                    check_root_is_served()
        wait_until(lambda: queued_at_bus(populated_service.address) > ROOM * 0.9)
        assert queued_at_bus(populated_service.address) < ROOM + OWN_IN_ALL
    assert peak_memory(populated_service.pid) - grown < 64 * MEBIBYTE


@pytest.mark.long
def test_clients_that_stop_reading_cannot_exhaust_the_descriptors(
    populated_service: Service,
) -> None:
    check_root_is_served()
    before = descriptors(populated_service)
    with connect_many(populated_service.address, 60) as clients:
        for _ in range(8):
            # These are too few calls at once to be refused for their number.
            for raw in clients:
                raw.call("OpenTree", OPEN_TREE, "work", {}, times=4)
            check_root_is_served()
            assert queued_at_bus(populated_service.address, "FDs") <= ROOM // DESCRIPTOR
        for raw in clients:
            assert error_names(raw.replies(32).values()) <= DONE_OR_REFUSED
        wait_until_closed(populated_service, before)
    check_root_is_served()


@pytest.mark.long
def test_a_stopping_daemon_does_not_wait_for_clients_that_stop_reading(
    service_with_large_pages: Service,
) -> None:
    with connect_many(service_with_large_pages.address, 3) as clients:
        for raw in clients:
            raw.call("List", "asa{sv}", [], {}, times=MAX_OPEN_CALLS)
        wait_until(lambda: queued_at_bus(service_with_large_pages.address) > ROOM // 2)
        service_with_large_pages.daemon.process.terminate()
        assert service_with_large_pages.daemon.process.wait(HANG_TIMEOUT) == 0


@pytest.mark.long
def test_a_bus_that_stops_reading_does_not_fill_the_memory(
    service_with_large_pages: Service,
) -> None:
    check_root_is_served()
    grown, bus = (
        peak_memory(service_with_large_pages.pid),
        bus_pid(service_with_large_pages.address),
    )
    with connect_many(service_with_large_pages.address, 3) as clients:
        for raw in clients:
            raw.call("List", "asa{sv}", [], {}, times=MAX_OPEN_CALLS)
        wait_until(lambda: queued_at_bus(service_with_large_pages.address) > 0)
        with stop_processes(bus):
            # Wait until the daemon can send no more before the bus continues.
            wait_until_asleep(service_with_large_pages.pid)
            assert peak_memory(service_with_large_pages.pid) - grown < 160 * MEBIBYTE
    check_root_is_served()


def test_clients_that_leave_after_their_calls_leave_a_consistent_state(
    populated_service: Service,
) -> None:
    check_root_is_served()
    before = descriptors(populated_service)
    for number in range(100):
        with connect_many(populated_service.address, 1) as (raw,):
            raw.call("Prepare", "ssa{sv}", f"new {number}", "base", {})
            raw.call("View", "ssa{sv}", f"view {number}", "base", {})
            raw.call("OpenTree", OPEN_TREE, "work", {})
            raw.call("Usage", "s", "work")
            raw.call("Remove", "sa{sv}", f"view {number}", {})
    check_root_is_served()
    wait_until_closed(populated_service, before)
    with BlockingClient() as client:
        assert client.check() == []
        for info in client.walk():
            if info.name not in ("base", "work", "look"):
                assert info.parent == "base"
                client.usage(info.name)
                client.remove(info.name)


def test_incomplete_messages_do_not_delay_other_clients(populated_service: Service) -> None:
    check_root_is_served()
    before = descriptors(populated_service)
    with (
        connect_many(populated_service.address, 50, NOBODY) as denied,
        connect_many(populated_service.address, 50) as roots,
    ):
        for number, raw in enumerate((*denied, *roots)):
            call = raw.pack_call("Update", "sa{ss}as", "work", {"half": "x" * 1000}, [])
            raw.socket.sendall(call[: 1 + number * 10])
        check_root_is_served()
        assert "half" not in run_with_client(lambda client: client.stat("work")).labels
    check_root_is_served()
    wait_until_closed(populated_service, before)


@pytest.mark.long
def test_clients_that_do_not_read_signals_do_not_delay_other_clients(
    populated_service: Service,
) -> None:
    check_root_is_served()
    before, grown = descriptors(populated_service), peak_memory(populated_service.pid)

    async def scenario(client: Client) -> None:
        async with client.changes() as changes:
            for number in range(1000):
                await client.update("work", {"a": str(number)})
                await anext(changes)

    with connect_many(populated_service.address, 20, NOBODY) as denied:
        for raw in denied:
            raw.ask_driver("AddMatch", "s", "type='signal'")
            raw.replies(1)
        run_with_client(scenario)
        check_root_is_served()
    assert peak_memory(populated_service.pid) - grown < 16 * MEBIBYTE
    wait_until_closed(populated_service, before)


def test_root_is_served_while_other_users_use_all_their_threads(
    scratch: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As many calls of two other users run as may run at once, and none ends."""
    tmp_path.chmod(0o755)
    with private_bus([POLICY]) as address, run_polkitd(address, RULES, tmp_path):
        monkeypatch.setenv("DBUS_SYSTEM_BUS_ADDRESS", address)
        with run_daemon(address, scratch / "state"), BlockingClient() as client:
            populate_service(client)
            inside = Path(client.mounts("work").source) / "inside"
            inside.mkdir()
            with (
                connect_many(address, 1, NOBODY) as (nobody,),
                connect_many(address, 1, DAEMON_USER) as (other,),
                hold_at_files(inside),
            ):

                def fill() -> bool:
                    # More calls at once would be too many questions to polkit.
                    for user in (nobody, other):
                        user.call("Usage", "s", "work", times=4)
                    uids = Counter(job.uid for job in client.jobs())
                    half = Lane.SURVEY.threads // 2
                    return uids == {NOBODY: half, DAEMON_USER: half}

                wait_until(fill)
                client.prepare("new")
                assert client.usage("base").inodes == 2
                client.remove("new")
                client.cleanup()
