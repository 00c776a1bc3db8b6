"""Clients that know which snapshots must exist. Only one tenant uses the keys below its prefix.

So each reply has one right value, each call has one right outcome, and each change has one signal.
"""

from __future__ import annotations

import asyncio
import os
import random
import time
from collections import defaultdict, deque
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field
from itertools import count
from typing import TypeVar

from dbus_next.constants import MessageType
from dbus_next.message import Message

from snapd_native.client import Client
from snapd_native.errors import SnapdError
from snapd_native.model import Info, Kind, Lifetime
from snapd_native.wire.connection import Connection
from snapd_native.wire.names import BUS_NAME, MANAGER

_T = TypeVar("_T")

Signal = tuple[object, ...]
"""A signal's name and its arguments."""

REPLY: Signal = ("reply",)

KEY_WORDS = ("a b", "z", "~", "é", "Ω", "豈", "😀")
"""Beginnings of keys. Their order in UTF-8 differs from their order in any other encoding."""


def expect(found: object, expected: object, what: str) -> None:
    """Raise an error that shows both values if they differ.

    The clients run outside of pytest, where a failed ``assert`` does not show the values.
    """
    if found != expected:
        raise AssertionError(f"{what}: {found} was found where {expected} was expected")


@dataclass
class KnownSnapshot:
    """A snapshot of a tenant, as the tenant knows it."""

    kind: Kind
    parent: str
    labels: dict[str, str]
    inodes: int
    changed: bool = False
    """Whether the tenant has changed its tree, so that it differs from its parent's."""


class SignalLog:
    """The replies, and the signals about a tenant's snapshots and about jobs, as they arrive."""

    def __init__(self, prefix: str) -> None:
        self._prefix = prefix
        self.arrived: list[Signal] = []
        self._more = asyncio.Event()

    async def open(self, bus: Connection) -> None:
        """Receive the signals on a connection from now on."""
        rule = f"type='signal',sender='{BUS_NAME}',interface='{MANAGER}'"
        for more in (f"arg0path='{self._prefix}'", f"arg2path='{self._prefix}'", "member='JobNew'"):
            await bus.ask_driver("AddMatch", "s", [f"{rule},{more}"])
        bus.add_message_handler(self._record)

    def _record(self, message: Message) -> None:
        if message.message_type is MessageType.SIGNAL:
            if message.interface == MANAGER:
                self.arrived.append((message.member, *message.body))
                self._more.set()
        elif message.reply_serial:
            self.arrived.append(REPLY)

    def begin(self) -> None:
        """Begin a call. No signal of a change may have arrived after the last reply."""
        expect(self.changes(), [], "signals after the last reply")
        self.arrived.clear()

    def changes(self, until: Signal | None = None) -> list[Signal]:
        """Return the signals of changes since `begin`: all, or those before ``until``."""
        end = len(self.arrived) if until is None else self.arrived.index(until)
        return [signal for signal in self.arrived[:end] if str(signal[0]).startswith("Snapshot")]

    async def end_of(self, job: str) -> Signal:
        """Wait for the signal that a job has ended, and return the signal."""
        while True:
            self._more.clear()
            for signal in self.arrived:
                if signal[0] == "JobRemoved" and signal[2] == job:
                    return signal
            await self._more.wait()


@dataclass
class Report:
    """The operations of tenants since the last report."""

    seconds: defaultdict[str, list[float]] = field(default_factory=lambda: defaultdict(list))
    """The durations of calls, by the names of the calls."""
    changes: list[tuple[int, Signal]] = field(default_factory=list)
    """All acknowledged changes, each with the tenant's number."""
    refused: int = 0


class Tenant:
    """A client with its own connection, and a record of all its snapshots and mounts."""

    def __init__(self, number: int, bases: Mapping[str, int], seed: int, report: Report) -> None:
        """Own the keys below ``/<number>/``; all tenants share ``bases``, with their inodes."""
        self.number = number
        self.prefix = f"/{number}/"
        self.bases = bases
        self.random = random.Random(f"{seed} {number}")
        self.snapshots: dict[str, KnownSnapshot] = {}
        self.mounted: dict[str, tuple[str, Lifetime]] = {}
        """Keys by targets."""
        self.undeleted_inodes = 0
        """The inodes of removed snapshots that may not be deleted yet."""
        self.recent: deque[str] = deque(maxlen=12)
        """The last calls, for the message of a failure."""
        self._report = report
        self._numbers = count(1)

    async def open(self) -> None:
        """Connect to the bus."""
        self.client = await Client().__aenter__()
        self.bus = self.client._connected()
        self.signal_log = SignalLog(self.prefix)
        await self.signal_log.open(self.bus)

    async def close(self) -> None:
        """Disconnect from the bus."""
        await self.client.__aexit__(None, None, None)

    async def expect_success(self, what: str, call: Awaitable[_T], *changes: Signal) -> _T:
        """Make a call that must succeed; before its reply, exactly ``changes`` must arrive."""
        self.signal_log.begin()
        result = await self.time(what, call)
        expect(self.signal_log.changes(REPLY), [*changes], f"signals before the reply to {what}")
        self.acknowledge(*changes)
        return result

    async def expect_error(
        self, kind: type[SnapdError], what: str, call: Awaitable[object]
    ) -> None:
        """Make a call that must fail with ``kind`` and cause no signal of a change."""
        self.signal_log.begin()
        self._report.refused += 1
        try:
            result = await self.time(f"{what}, refused", call)
        except kind:
            changes = self.signal_log.changes()
        else:
            raise AssertionError(f"{what} was to fail with {kind.__name__}, and returned {result}")
        expect(changes, [], f"signals of the refused call {what}")

    async def time(self, what: str, call: Awaitable[_T]) -> _T:
        """Make a call, and report its duration."""
        self.recent.append(what)
        begun = time.perf_counter()
        try:
            return await call
        finally:
            self._report.seconds[what].append(time.perf_counter() - begun)

    def acknowledge(self, *changes: Signal) -> None:
        """Report changes whose replies and signals have arrived, and forget the signals."""
        self._report.changes += [(self.number, change) for change in changes]
        for change in changes:
            self.signal_log.arrived.remove(change)

    def new_name(self) -> str:
        """Return a name that was never used before."""
        return f"{self.prefix}{self.random.choice(KEY_WORDS)} {next(self._numbers)}"

    def choose(self, fits: Callable[[str, KnownSnapshot], bool]) -> str | None:
        """Return one of the tenant's snapshots that fit, or None if none fits."""
        found = [name for name, known in self.snapshots.items() if fits(name, known)]
        return self.random.choice(found) if found else None

    def has_children(self, name: str) -> bool:
        return any(known.parent == name for known in self.snapshots.values())

    def is_mounted(self, name: str) -> bool:
        return any(key == name for key, _ in self.mounted.values())

    def inodes(self, parent: str) -> int:
        """Return the number of inodes that a copy of ``parent`` has."""
        if not parent:
            return 1
        return self.bases.get(parent) or self.snapshots[parent].inodes

    def write(self, key: str, source: str) -> None:
        """Add a directory with some files to an active snapshot."""
        root = os.path.join(source, f"{len(os.listdir(source))} of {self.number}")
        files = self.random.randrange(1, 10)
        os.mkdir(root)
        for number in range(files):
            with open(os.path.join(root, f"{number}"), "wb") as file:
                file.write(self.random.randbytes(self.random.randrange(6000)))
        self.snapshots[key].inodes += files + 1
        self.snapshots[key].changed = True

    def check_info(self, info: Info) -> None:
        """Compare the record of one of the tenant's snapshots with the expected one."""
        known = self.snapshots[info.name]
        found = (info.kind, info.parent, dict(info.labels))
        expect(found, (known.kind, known.parent, known.labels), f"the record of {info.name}")
        assert info.created <= info.updated

    def check_page(self, page: list[Info], after: str, limit: int) -> None:
        """Check the order of a page, its snapshots of the tenant, and that no parent is missing."""
        names = [info.name for info in page]
        encoded = [name.encode() for name in names]
        expect(encoded, sorted(set(encoded)), "the order of a page")
        last = names[-1] if len(page) == limit else ""

        def on_page(name: str) -> bool:
            return name > after and (not last or name <= last)

        own = [name for name in names if name.startswith(self.prefix)]
        expected = sorted(name for name in self.snapshots if on_page(name))
        expect(own, expected, f"the page after {after} up to {last}")
        for info in page:
            if info.name in self.snapshots:
                self.check_info(info)
            # A page shows one moment, and a parent exists as long as its children.
            if info.parent and on_page(info.parent):
                assert info.parent in names, f"{info.name} without its parent {info.parent}"
