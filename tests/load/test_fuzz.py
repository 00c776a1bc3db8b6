"""Random calls over a real bus, one at a time and many at once.

``FUZZ_CALLS`` is the number of calls in all.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Self

import pytest
from dbus_next.constants import MessageType
from dbus_next.message import Message
from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st

from snapd_native.bus.lanes import Lane
from snapd_native.client import BlockingClient
from snapd_native.model import DIGEST_LABEL, STANDBY_LABEL
from snapd_native.wire.names import JOB, JOB_PATH, PEER
from tests.support.database import open_copy
from tests.support.descriptors import descriptors, wait_until_closed, wait_until_idle
from tests.support.file_systems import long_on_xfs
from tests.support.fuzz.calls import ANSWERED, CALLS, LAST_JOB, REFUSED, RETURNS
from tests.support.fuzz.packets import FuzzClient, Packet
from tests.support.kernel_mounts import mounts_below
from tests.support.raw_client import wait_until_asleep
from tests.support.service import Service, commit_snapshot, remove_all, run_daemon
from tests.support.waiting import wait_until

CALL_COUNT = int(os.environ.get("FUZZ_CALLS", "1000"))
CALLS_PER_EXAMPLE = 40
"""Calls in an example. Each example begins with only `base`, so that few calls repeat a failure."""
CLIENTS = 4

MAX_MEMORY_GROWTH = 12 << 20
"""Bytes by which the memory of the service may grow after the first calls.

The service caches some signatures.
"""

RETURN_FREED_MEMORY = {
    "GLIBC_TUNABLES": "glibc.malloc.arena_max=1:glibc.malloc.mmap_threshold=1024"
}
"""Settings with which the C library returns freed memory, so that the rest is in use.

Otherwise large calls leave gaps between small objects: up to 20 MiB, which the next calls use.
"""

MAX_THREADS = 10 + sum(lane.threads for lane in Lane)
"""Maximum number of threads: those of all lanes, and a few others."""

OURS, STANDARD = "org.snapdnative1.Error.", "org.freedesktop.DBus.Error."
COMMON_ERRORS = {
    f"{OURS}InvalidArgument",
    *(f"{STANDARD}Unknown{what}" for what in ("Method", "Object", "Interface")),
}
"""The errors that any call may raise."""

ERRORS_OF_CALLS: dict[str, tuple[str, ...]] = {
    "Prepare": ("NotFound", "AlreadyExists"),
    "PrepareJob": ("NotFound", "AlreadyExists"),
    "View": ("NotFound", "AlreadyExists"),
    "Commit": ("AlreadyExists", "NotFound", "FailedPrecondition"),
    "CommitJob": ("AlreadyExists", "NotFound", "FailedPrecondition"),
    "Mounts": ("NotFound", "FailedPrecondition"),
    "Stat": ("NotFound",),
    "Update": ("NotFound",),
    "Usage": ("NotFound",),
    "BackgroundUsage": ("NotFound",),
    "Remove": ("NotFound", "FailedPrecondition"),
    "Verify": ("NotFound", "FailedPrecondition"),
    "VerifyJob": ("NotFound", "FailedPrecondition"),
    "Standby": ("NotFound",),
    "Mount": ("NotFound", "FailedPrecondition", "AlreadyExists"),
    "Unmount": ("NotFound", "FailedPrecondition"),
    "ListMounts": ("NotFound",),
    "OpenTree": ("NotFound", "FailedPrecondition"),
    "Cancel": ("NotFound", "FailedPrecondition"),
    "Introspect": ("NotFound",),
    "Get": ("NotFound",),
    "GetAll": ("NotFound",),
    "Set": ("NotFound",),
}
"""The other errors of each call while no other call runs."""

PROPERTY_ERRORS = {f"{STANDARD}UnknownProperty", f"{STANDARD}PropertyReadOnly"}
CONCURRENCY_ERRORS = {
    f"{OURS}{name}" for name in ("FailedPrecondition", "ResourceExhausted", "Cancelled")
}
"""The errors that a call may also raise while others run."""

State = tuple[object, ...]


@dataclass
class FuzzedService:
    """A service, with checks of its state and its replies."""

    service: Service
    scratch: Path
    job: int = 0
    """The number of the last job."""
    seen: Counter[str] = field(default_factory=Counter)
    """The number of calls with each outcome."""
    memory: int = 0
    """The memory of the service after the first calls, in bytes."""
    descriptors: Counter[str] = field(default_factory=Counter)
    """Its open descriptors at that moment, by kind."""

    def __enter__(self) -> Self:
        places = self.scratch / "places"
        for name in ("0", "1", "2", "é 😀"):
            (places / name).mkdir(parents=True)
        (places / "file").touch()
        (places / "link").symlink_to("0")
        return self

    def __exit__(self, *error: object) -> None:
        with BlockingClient() as client:
            self._clear(client)
            if not any(error):
                assert client.check() == []
                self._check_leaks(client)

    def fill_placeholder(self, text: str) -> str:
        """Replace the placeholder that a text of a packet begins with."""
        if text.startswith("@"):
            return f"{self.scratch}{text[1:]}"
        if text.startswith(LAST_JOB):
            return f"{JOB_PATH}/{max(self.job - int(text.removeprefix(LAST_JOB)), 0)}"
        return text

    def begin(self) -> None:
        """Remove everything, and commit `base`."""
        with BlockingClient() as client:
            self._clear(client)
            if self.memory == 0 and self.seen.total() > CALL_COUNT // 100:
                self._start_all_workers(client)
                self.descriptors = descriptors(self.service)
                self.memory = self._memory()
            commit_snapshot(client, "base", files={"file": "text", "other": "more"})

    def state(self) -> State:
        """Return the state that a refused call must not change."""
        trees = []
        with open_copy(self.service.state) as db:
            # The other column shows whether the tree is on disk yet.
            snapshots = db.execute(
                "SELECT id, name, kind, parent, created, updated, labels, size, inodes"
                " FROM snapshots ORDER BY id"
            ).fetchall()
            mounts = db.execute("SELECT * FROM mounts ORDER BY id").fetchall()
        for tree in (self.service.state / "snapshots").iterdir():
            # Standby clones and deletions change in the background.
            if tree.name.isdigit():
                status = tree.stat()
                trees.append((tree.name, status.st_mode, status.st_mtime_ns, os.listdir(tree)))
        places = [(path, path.lstat().st_mode) for path in (self.scratch / "places").iterdir()]
        return snapshots, mounts, sorted(trees), sorted(places), mounts_below(self.scratch)

    def check_reply(self, packet: Packet, answer: Message, others: Iterable[str] = ()) -> bool:
        """Check that the contract permits a reply; return whether the call was refused."""
        if answer.message_type is MessageType.METHOD_RETURN:
            assert answer.signature == RETURNS[packet.member]
            self.seen["done"] += 1
            return False
        name, (text,) = answer.error_name, answer.body
        allowed = {
            *COMMON_ERRORS,
            *(f"{OURS}{name}" for name in ERRORS_OF_CALLS.get(packet.member, ())),
        }
        if packet.member in ("Get", "Set"):
            allowed |= PROPERTY_ERRORS
        assert name in {*allowed, *others}, f"{packet}: {text}"
        assert text.isprintable()
        for inner in ("Traceback", ".py", "sqlite", "<class", "/snapshots/"):
            assert inner not in text
        asked = [self.fill_placeholder(value) for value in packet.body if isinstance(value, str)]
        # A message may name mount targets and paths of the call, and no other path.
        other = text.replace(str(self.scratch / "places"), "")
        assert str(self.scratch) not in other or any(str(self.scratch) in value for value in asked)
        self.seen[name.rpartition(".")[2]] += 1
        return True

    def await_jobs(self, peer: FuzzClient) -> None:
        """Wait until no job runs, and forget the signals of ``peer``."""
        while peer.call(Packet("ListJobs")).body != [[]]:
            peer.signal("JobRemoved")
        peer.signals.clear()

    def _check_leaks(self, client: BlockingClient) -> None:
        # Calls of clients that have left can still run.
        wait_until(lambda: not client.jobs())
        wait_until_closed(self.service, self.descriptors)
        assert int(self._status("Threads")) <= MAX_THREADS
        print(f"{self.memory >> 10} KiB, and {self._memory() - self.memory >> 10} KiB more")
        assert self._memory() - self.memory < MAX_MEMORY_GROWTH

    def _start_all_workers(self, client: BlockingClient) -> None:
        """Make the service start all workers that it keeps."""
        client.prepare("employing")
        labels = {STANDBY_LABEL: "1", DIGEST_LABEL: "any"}
        client.commit("employed", "employing", labels)
        client.verify("employed")
        wait_until(lambda: client.standby("employed").ready == 1)
        self._clear(client)

    def _memory(self) -> int:
        """Return the resident memory of the service, in bytes."""
        return int(self._status("VmRSS").split()[0]) << 10

    def _status(self, what: str) -> str:
        lines = Path(f"/proc/{self.service.pid}/status").read_text().splitlines()
        return dict(line.split(":", 1) for line in lines)[what]

    def _clear(self, client: BlockingClient) -> None:
        # Calls of clients that have left can still run.
        wait_until_idle(self.service)
        wait_until_asleep(self.service.pid)
        for mounted in client.list_mounts():
            client.unmount(mounted.target, lazy=True)
        remove_all(client)


@pytest.fixture
def fuzzed(on_bus: str, scratch: Path) -> Iterator[FuzzedService]:
    with (
        run_daemon(on_bus, scratch / "state", RETURN_FREED_MEMORY) as service,
        FuzzedService(service, scratch) as fuzzed_service,
    ):
        yield fuzzed_service
        seen = fuzzed_service.seen
        print(f"{seen.total()} calls: {dict(seen.most_common())}")


def examples(calls: int) -> settings:
    """Return settings for as many examples as have ``calls`` calls in all."""
    return settings(
        max_examples=max(calls // CALLS_PER_EXAMPLE, 1),
        deadline=None,
        database=None,
        # Hypothesis takes longer to shrink a failure than a person to understand it.
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
        report_multiple_bugs=False,
    )


def call_lists(calls: st.SearchStrategy[Packet]) -> st.SearchStrategy[list[Packet]]:
    return st.lists(calls, min_size=CALLS_PER_EXAMPLE, max_size=CALLS_PER_EXAMPLE)


@long_on_xfs
@pytest.mark.timeout(600 + CALL_COUNT // 5)
@pytest.mark.parametrize("refused", [False, True], ids=["any", "refused"])
def test_each_random_call_gets_an_answer_of_the_contract(
    fuzzed: FuzzedService, refused: bool, run_seed: int
) -> None:
    """The contract permits each reply, and a refused call has changed nothing."""

    @seed(run_seed)
    @examples(CALL_COUNT // 5)
    @given(call_lists(REFUSED if refused else ANSWERED))
    def run(packets: list[Packet]) -> None:
        fuzzed.begin()
        with FuzzClient(fuzzed.service.address, fuzzed.fill_placeholder) as peer:
            peer.subscribe("type='signal',member='JobRemoved'")
            before, running = fuzzed.state(), False
            for packet in packets:
                if running and packet.interface != JOB:
                    fuzzed.await_jobs(peer)
                    before, running = fuzzed.state(), False
                answer = peer.call(packet)
                was_refused = fuzzed.check_reply(packet, answer)
                assert was_refused or not refused, packet
                if answer.signature == "o":
                    fuzzed.job, running = int(answer.body[0].rpartition("/")[2]), True
                if not running:
                    after = fuzzed.state()
                    assert after == before or not was_refused, packet
                    before = after
            fuzzed.await_jobs(peer)

    run()


@pytest.mark.timeout(600 + CALL_COUNT // 5)
def test_concurrent_random_calls_are_answered_and_leak_nothing(
    fuzzed: FuzzedService, run_seed: int
) -> None:
    """One of the clients leaves without reading."""

    @seed(run_seed)
    @examples(CALL_COUNT // 10)
    @given(call_lists(CALLS))
    def run(packets: list[Packet]) -> None:
        fuzzed.begin()
        with ExitStack() as stack:
            address = fuzzed.service.address
            peers = [
                stack.enter_context(FuzzClient(address, fuzzed.fill_placeholder))
                for _ in range(CLIENTS)
            ]
            waiting: list[dict[int, Packet]] = [{} for _ in peers]
            for number, packet in enumerate(packets):
                serial = peers[number % CLIENTS].send(packet)
                if packet.wants_reply:
                    waiting[number % CLIENTS][serial] = packet
            # The last client leaves without reading its replies.
            peers.pop().close()
            for peer, calls in zip(peers, waiting, strict=False):
                while calls:
                    answer = peer.next_reply()
                    fuzzed.check_reply(calls.pop(answer.reply_serial), answer, CONCURRENCY_ERRORS)
                assert peer.call(Packet("Ping", PEER)).body == []

    run()
