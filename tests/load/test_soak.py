"""Many clients for a long time: nothing leaks, nothing is lost, and Stat stays fast.

``SOAK_MINUTES`` is the duration on all file systems together. The seed of a run repeats the choices
of the clients, but not the instants. Clients work in rounds. Between two rounds all clients rest,
and the test compares the snapshots with the replies to the clients and with the signals.
"""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
import sys
import time
from collections import defaultdict
from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from contextlib import asynccontextmanager, contextmanager, suppress
from itertools import chain, zip_longest
from pathlib import Path
from typing import Any

import pytest
from dbus_next.constants import MessageType
from dbus_next.message import Message

from snapd_native.client import BlockingClient, Client
from snapd_native.model import STANDBY_LABEL, Info
from snapd_native.mounts import Table
from snapd_native.wire.names import BUS_NAME, MANAGER, PEER
from tests.support import PROJECT
from tests.support.raw_client import wait_until_asleep
from tests.support.service import HANG_TIMEOUT, UNIT_ENVIRONMENT, Service, connection, run_daemon
from tests.support.soak.clients import Order
from tests.support.soak.gauges import MIB, Gauge, growth, table, too_large
from tests.support.soak.tenants import Signal

MINUTES = float(os.environ.get("SOAK_MINUTES", "0.3"))

FILE_SYSTEMS = 2
ROUNDS = min(12, 4 + int(MINUTES))
WARM_UP_ROUNDS = ROUNDS // 4
"""Rounds of warm-up. After them, every thread, worker and connection exists."""

CHECKED_ROUNDS = ROUNDS - WARM_UP_ROUNDS
"""Rounds in which nothing may grow. If something grows, as many rounds follow: a leak goes on."""

TENANTS = 28
PROCESSES = 4
STAT_CLIENTS = 4
"""Clients that call nothing but Stat, in a process of their own."""

TREE_SIZES = (10, 100, 1000, 10_000)
"""Numbers of files in the snapshots that all clients copy."""

STAT_P99 = 0.05
"""Maximum 99th percentile of Stat in seconds, on a machine that does nothing else."""

STAT_CHECK_MINUTES = 10
"""Minutes of a run from which `STAT_P99` is checked.

A shorter run runs beside other tests, and measures the machine more than Stat.
"""


@pytest.mark.timeout(300 + 90 * MINUTES)
@pytest.mark.long
def test_many_clients_over_a_long_time_lose_nothing_and_leak_nothing(
    on_bus: str, scratch: Path, run_seed: int
) -> None:
    with (
        run_daemon(on_bus, scratch / "state", UNIT_ENVIRONMENT) as service,
        stopped_and_unmounted(service),
    ):
        with BlockingClient() as client:
            bases = {
                f"/base/{files}": commit_many_files(client, f"/base/{files}", files)
                for files in TREE_SIZES
            }
        soak = Soak(service)
        asyncio.run(soak.run(run_seed, bases, MINUTES * 60 / FILE_SYSTEMS / ROUNDS))
        assert service.directories() == []
    print_tables(soak)
    assert growth(soak.rests[WARM_UP_ROUNDS - 1 :], CHECKED_ROUNDS) == []
    assert too_large([*soak.rests, *chain(*soak.rounds)]) == []
    if MINUTES >= STAT_CHECK_MINUTES:
        p99 = percentile(soak.seconds["Stat"], 99)
        assert p99 <= STAT_P99


def commit_many_files(client: BlockingClient, name: str, files: int) -> int:
    """Commit a snapshot of ``files`` files, a hundred in each directory; return its inodes."""
    root = Path(client.prepare(f"{name} in the making").source)
    for number in range(files):
        directory = root / str(number // 100)
        directory.mkdir(exist_ok=True)
        (directory / str(number)).write_bytes(bytes([number % 251]) * (number % 4000))
    client.commit(name, f"{name} in the making", digest=files <= 1000)
    return client.usage(name).inodes


@contextmanager
def stopped_and_unmounted(service: Service) -> Iterator[None]:
    """Check that the block leaves no mount of the state's file system, and stop the service.

    Mounts that are left are unmounted.
    """
    before = mounts_of(service.state)
    try:
        yield
        assert mounts_of(service.state) == before
    finally:
        # A running service could still mount for pending calls, and unmount for clients that have
        # left.
        service.daemon.stop()
        for target in reversed([one for one in mounts_of(service.state) if one not in before]):
            subprocess.run(["umount", "--lazy", target], check=False)


def mounts_of(path: Path) -> list[str]:
    """Return the targets where the file system of ``path``, or a part of it, is mounted."""
    device = path.stat().st_dev
    found = f"{os.major(device)}:{os.minor(device)}"
    return [entry.target for entry in Table.read() if entry.root.device == found]


class History:
    """The signals of the service, and the changes that each client had replies for."""

    def __init__(self, there: dict[str, tuple[str, str]]) -> None:
        """Begin with the existing snapshots: their kinds and parents by name."""
        self.snapshots = there
        self.total = 0
        self._impossible: list[Signal] = []
        self._acknowledged: defaultdict[str, list[Signal]] = defaultdict(list)
        self._signals: defaultdict[str, list[Signal]] = defaultdict(list)

    def acknowledge(self, tenant: int, change: Signal) -> None:
        """Record a change that a reply to the tenant has acknowledged."""
        self._acknowledged[f"{tenant}"].append(change)

    def record_signal(self, message: Message) -> None:
        """Record a signal, and whether it is possible after the signals before it."""
        change = (message.member, *message.body)
        if message.message_type is MessageType.SIGNAL and message.member.startswith("Snapshot"):
            self.total += 1
            self._signals[message.body[0].split("/")[1]].append(change)
            if not self._apply(change):
                self._impossible.append(change)

    def _apply(self, change: Signal) -> bool:
        match change:
            case "SnapshotAdded", str(key), str(kind), str(parent):
                free = key not in self.snapshots
                possible = not parent or self.snapshots.get(parent, ("", ""))[0] == "committed"
                self.snapshots[key] = (kind, parent)
                return free and possible
            case "SnapshotCommitted", str(name), str(key):
                kind, parent = self.snapshots.pop(key, ("", ""))
                free = name not in self.snapshots
                self.snapshots[name] = ("committed", parent)
                return free and kind == "active"
            case "SnapshotUpdated", str(name):
                return name in self.snapshots
            case "SnapshotRemoved", str(key):
                return self.snapshots.pop(key, None) is not None
        return False

    def compare(self, infos: Sequence[Info]) -> None:
        """Compare the signals with the replies and the snapshots, while no call runs."""
        assert self._impossible == []
        assert {info.name: (info.kind.value, info.parent) for info in infos} == self.snapshots
        for owner in {*self._acknowledged, *self._signals} - {"base"}:
            acknowledged, signals = self._acknowledged[owner], self._signals[owner]
            for number, (one, other) in enumerate(zip_longest(acknowledged, signals)):
                assert one == other, (
                    f"change {number} of tenant {owner}: reply to {one}, signal {other},"
                    f" after {acknowledged[max(0, number - 3) : number]}"
                )
        self._acknowledged.clear()
        self._signals.clear()


class Process:
    """A process that runs clients."""

    def __init__(self, process: asyncio.subprocess.Process) -> None:
        self._process = process

    def tell(self, line: str) -> None:
        assert self._process.stdin is not None
        self._process.stdin.write(f"{line}\n".encode())

    async def until(self, place: str, note: Callable[[dict[str, Any]], None]) -> None:
        """Pass the reports of the clients to ``note``, until all clients have reached ``place``."""
        assert self._process.stdout is not None
        async for line in self._process.stdout:
            report = json.loads(line)
            if "failed" in report:
                raise AssertionError(report["failed"])
            if report.get("at") == place:
                return
            note(report)
        raise AssertionError("a process of clients has ended")


@asynccontextmanager
async def run_clients(seed: int, bases: Mapping[str, int]) -> AsyncIterator[list[Process]]:
    """Run the processes of all clients during the block."""
    orders: list[Order] = [
        {
            "seed": seed,
            "bases": {**bases},
            "tenants": [*range(number, TENANTS, PROCESSES)],
            "stat_clients": 0,
        }
        for number in range(PROCESSES)
    ]
    orders.append({"seed": seed, "bases": {**bases}, "tenants": [], "stat_clients": STAT_CLIENTS})
    started: list[asyncio.subprocess.Process] = []
    try:
        for _ in orders:
            one = await asyncio.create_subprocess_exec(
                *(sys.executable, "-m", "tests.support.soak.clients"),
                cwd=PROJECT,
                stdin=asyncio.subprocess.PIPE,
                stdout=asyncio.subprocess.PIPE,
                limit=64 * MIB,
            )
            started.append(one)
        processes = [*map(Process, started)]
        for process, order in zip(processes, orders, strict=True):
            process.tell(json.dumps(order))
        yield processes
    finally:
        for one in started:
            with suppress(ProcessLookupError):
                one.kill()
        for one in started:
            await one.communicate()


class Soak:
    """Lets clients work and rest in rounds, and measures the daemon."""

    def __init__(self, service: Service) -> None:
        self.seconds: defaultdict[str, list[float]] = defaultdict(list)
        """The durations of calls, by name of the call."""
        self.rests: list[Gauge] = []
        self.rounds: list[list[Gauge]] = []
        """The measurements under load, one a second."""
        self.refused = 0
        self._service = service

    @property
    def calls(self) -> int:
        return sum(map(len, self.seconds.values()))

    async def run(self, seed: int, bases: Mapping[str, int], seconds: float) -> None:
        """Let all clients work in rounds of ``seconds``, rest between the rounds, and leave."""
        async with Client() as client, connection() as bus:
            match = f"type='signal',sender='{BUS_NAME}',interface='{MANAGER}'"
            await bus.ask_driver("AddMatch", "s", [match])
            infos = [info async for info in client.walk()]
            self.history = History({info.name: (info.kind.value, info.parent) for info in infos})
            bus.add_message_handler(self.history.record_signal)
            async with run_clients(seed, bases) as processes:
                for _ in range(ROUNDS):
                    await self._round(processes, seconds, client, bus)
                if growth(self.rests[WARM_UP_ROUNDS - 1 :], CHECKED_ROUNDS):
                    for _ in range(CHECKED_ROUNDS):
                        await self._round(processes, seconds, client, bus)
                await self._command(processes, "leave", "end")
            for name in bases:
                await client.remove(name)
            await self._compare(client, bus)
            assert self.history.snapshots == {}

    async def _round(
        self, processes: Sequence[Process], seconds: float, client: Client, bus: connection
    ) -> None:
        await self._work(processes, seconds)
        await self._compare(client, bus)
        await self._rest(client)

    async def _work(self, processes: Sequence[Process], seconds: float) -> None:
        """Let all clients work for ``seconds``, and measure the daemon each second."""
        samples: list[Gauge] = []
        self.rounds.append(samples)
        end = time.monotonic() + seconds
        async with asyncio.TaskGroup() as group:
            group.create_task(self._command(processes, "work", "rest"))
            while (left := end - time.monotonic()) > 0:
                await asyncio.sleep(min(1, left))
                samples.append(Gauge.read(self._service))
                if len(samples) % 10 == 0:
                    print(f"round {len(self.rounds)}: {self._progress()}", flush=True)
            for process in processes:
                process.tell("rest")

    async def _compare(self, client: Client, bus: connection) -> None:
        """Compare the snapshots with the replies and the signals, while no call runs."""
        # Cleanup would delete the findings of Check, so Check comes first.
        assert await client.check() == []
        await client.cleanup()
        infos = [info async for info in client.walk()]
        async with asyncio.timeout(HANG_TIMEOUT):
            for info in infos:
                wanted = int(info.labels.get(STANDBY_LABEL, "0"))
                while (await client.standby(info.name)).ready != wanted:
                    await asyncio.sleep(0.01)
        assert await client.jobs() == []
        # The reply arrives after all signals before it.
        await bus.ask(interface=PEER, member="Ping")
        self.history.compare(infos)

    async def _rest(self, client: Client) -> None:
        """Measure the daemon when it has workers and does nothing in the background.

        The call of Usage starts workers. All may have ended, as those of a cancelled job do.
        """
        await client.prepare("/base/employing")
        await client.usage("/base/employing")
        await client.remove("/base/employing")
        await client.cleanup()
        await asyncio.to_thread(wait_until_asleep, self._service.pid)
        self.rests.append(Gauge.read(self._service))

    async def _command(self, processes: Sequence[Process], command: str, place: str) -> None:
        """Send a command to all processes, and wait until all clients have reached ``place``."""
        async with asyncio.TaskGroup() as group:
            for process in processes:
                process.tell(command)
                group.create_task(process.until(place, self._record))

    def _record(self, report: dict[str, Any]) -> None:
        self.refused += report["refused"]
        for what, seconds in report["seconds"].items():
            self.seconds[what] += seconds
        for tenant, change in report["changes"]:
            self.history.acknowledge(tenant, tuple(change))

    def _progress(self) -> str:
        gauge = self.rounds[-1][-1]
        p99 = percentile(self.seconds["Stat"], 99)
        return (
            f"{self.calls} calls, {self.history.total} changes, Stat p99 {p99 * 1000:.1f} ms,"
            f" {gauge.memory / MIB:.1f} MiB, {gauge.descriptors} descriptors,"
            f" {gauge.threads} threads, {gauge.workers} workers"
        )


def percentile(values: Sequence[float], percent: int) -> float:
    return sorted(values)[len(values) * percent // 100] if values else 0


def print_tables(soak: Soak) -> None:
    """Print tables for a document."""
    print(f"\n{soak.calls} calls, {soak.refused} of them refused as the contract says,")
    print(f"{soak.history.total} changes\n")
    print("| call | calls | median, ms | p99, ms | longest, ms |")
    print("| --- | --- | --- | --- | --- |")
    for what, seconds in sorted(soak.seconds.items()):
        figures = (percentile(seconds, 50), percentile(seconds, 99), max(seconds))
        print(f"| {what} | {len(seconds)} |", *(f"{value * 1000:.1f} |" for value in figures))
    print()
    print(table(soak.rests, soak.rounds))
