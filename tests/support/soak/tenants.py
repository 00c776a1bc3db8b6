"""Clients that know what there must be: the keys below its own prefix are one tenant's alone.

So each answer has one right value, each call one right outcome, and each change one signal.
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

WORDS = ("a b", "z", "~", "é", "Ω", "豈", "😀")
"""What keys begin with, so that their order is told from that of any other encoding."""


def expect(found: object, expected: object, what: str) -> None:
    """Compare; a process of its own has no pytest that shows what an assertion was about."""
    if found != expected:
        raise AssertionError(f"{what}: {found} was found where {expected} was expected")


@dataclass
class Known:
    """A snapshot of a tenant, as the tenant knows it."""

    kind: Kind
    parent: str
    labels: dict[str, str]
    inodes: int
    changed: bool = False
    """Whether its tree is another than its parent's."""


class Ear:
    """What one connection hears of a tenant's snapshots, and of jobs, in the order of arrival."""

    def __init__(self, prefix: str) -> None:
        self._prefix = prefix
        self.arrived: list[Signal] = []
        self._more = asyncio.Event()

    async def open(self, bus: Connection) -> None:
        """Listen on a connection from now on."""
        rule = f"type='signal',sender='{BUS_NAME}',interface='{MANAGER}'"
        for more in (f"arg0path='{self._prefix}'", f"arg2path='{self._prefix}'", "member='JobNew'"):
            await bus.ask_driver("AddMatch", "s", [f"{rule},{more}"])
        bus.add_message_handler(self._hear)

    def _hear(self, message: Message) -> None:
        if message.message_type is MessageType.SIGNAL:
            if message.interface == MANAGER:
                self.arrived.append((message.member, *message.body))
                self._more.set()
        elif message.reply_serial:
            self.arrived.append(REPLY)

    def begin(self) -> None:
        """Begin a call; nothing may have been sent since the last one was answered."""
        expect(self.changes(), [], "heard after the answer")
        self.arrived.clear()

    def changes(self, until: Signal | None = None) -> list[Signal]:
        """Return the changes that were heard of since `begin`, or those before one signal."""
        end = len(self.arrived) if until is None else self.arrived.index(until)
        return [heard for heard in self.arrived[:end] if str(heard[0]).startswith("Snapshot")]

    async def end_of(self, job: str) -> Signal:
        """Wait for the signal that a job of the tenant has ended."""
        while True:
            self._more.clear()
            for heard in self.arrived:
                if heard[0] == "JobRemoved" and heard[2] == job:
                    return heard
            await self._more.wait()


@dataclass
class Report:
    """The operations of tenants since the last report."""

    seconds: defaultdict[str, list[float]] = field(default_factory=lambda: defaultdict(list))
    """How long calls took, by what was called."""
    changes: list[tuple[int, Signal]] = field(default_factory=list)
    """Every change that was acknowledged, with the tenant's number."""
    refused: int = 0


class Tenant:
    """A client with a connection of its own, and books of all that it has."""

    def __init__(self, number: int, bases: Mapping[str, int], seed: int, report: Report) -> None:
        """Own the keys below ``/<number>/``; ``bases`` are everybody's, with their inodes."""
        self.number = number
        self.prefix = f"/{number}/"
        self.bases = bases
        self.chance = random.Random(f"{seed} {number}")
        self.there: dict[str, Known] = {}
        self.mounted: dict[str, tuple[str, Lifetime]] = {}
        """Keys by targets."""
        self.garbage = 0
        """Inodes that were removed and perhaps not deleted yet."""
        self.recent: deque[str] = deque(maxlen=12)
        """The last call, for the message of a failure."""
        self._report = report
        self._numbers = count(1)

    async def open(self) -> None:
        """Connect."""
        self.client = await Client().__aenter__()
        self.bus = self.client._connected()
        self.ear = Ear(self.prefix)
        await self.ear.open(self.bus)

    async def close(self) -> None:
        """Leave the bus."""
        await self.client.__aexit__(None, None, None)

    async def ask(self, what: str, coming: Awaitable[_T], *changes: Signal) -> _T:
        """Make a call that must succeed, and before its answer be told of ``changes`` alone."""
        self.ear.begin()
        answer = await self.time(what, coming)
        expect(self.ear.changes(REPLY), [*changes], f"heard before the answer to {what}")
        self.acknowledge(*changes)
        return answer

    async def refused(self, kind: type[SnapdError], what: str, coming: Awaitable[object]) -> None:
        """Make a call that must fail, with ``kind`` and without any change."""
        self.ear.begin()
        self._report.refused += 1
        try:
            answer = await self.time(f"{what}, refused", coming)
        except kind:
            changes = self.ear.changes()
        else:
            raise AssertionError(f"{what} was to fail with {kind.__name__}, and returned {answer}")
        expect(changes, [], f"heard of what was refused, {what}")

    async def time(self, what: str, coming: Awaitable[_T]) -> _T:
        """Make a call, and report how long it took."""
        self.recent.append(what)
        begun = time.perf_counter()
        try:
            return await coming
        finally:
            self._report.seconds[what].append(time.perf_counter() - begun)

    def acknowledge(self, *changes: Signal) -> None:
        """Book changes that were both answered and heard of."""
        self._report.changes += [(self.number, change) for change in changes]
        for change in changes:
            self.ear.arrived.remove(change)

    def new_name(self) -> str:
        """Return a name that nobody has ever had."""
        return f"{self.prefix}{self.chance.choice(WORDS)} {next(self._numbers)}"

    def choose(self, fits: Callable[[str, Known], bool]) -> str | None:
        """Return one of the own snapshots that fit, if any does."""
        found = [name for name, known in self.there.items() if fits(name, known)]
        return self.chance.choice(found) if found else None

    def has_children(self, name: str) -> bool:
        return any(known.parent == name for known in self.there.values())

    def is_mounted(self, name: str) -> bool:
        return any(key == name for key, _ in self.mounted.values())

    def inodes(self, parent: str) -> int:
        """Return what a copy of ``parent`` has."""
        if not parent:
            return 1
        return self.bases.get(parent) or self.there[parent].inodes

    def write(self, key: str, source: str) -> None:
        """Add a directory with some files to an active snapshot."""
        root = os.path.join(source, f"{len(os.listdir(source))} of {self.number}")
        files = self.chance.randrange(1, 10)
        os.mkdir(root)
        for number in range(files):
            with open(os.path.join(root, f"{number}"), "wb") as file:
                file.write(self.chance.randbytes(self.chance.randrange(6000)))
        self.there[key].inodes += files + 1
        self.there[key].changed = True

    def check_info(self, info: Info) -> None:
        """Compare the record of an own snapshot with the books."""
        known = self.there[info.name]
        found = (info.kind, info.parent, dict(info.labels))
        expect(found, (known.kind, known.parent, known.labels), f"the record of {info.name}")
        assert info.created <= info.updated

    def check_page(self, page: list[Info], after: str, limit: int) -> None:
        """Compare a page of all snapshots with the books, and with itself."""
        names = [info.name for info in page]
        encoded = [name.encode() for name in names]
        expect(encoded, sorted(set(encoded)), "the order of a page")
        last = names[-1] if len(page) == limit else ""

        def on_page(name: str) -> bool:
            return name > after and (not last or name <= last)

        own = [name for name in names if name.startswith(self.prefix)]
        expected = sorted(name for name in self.there if on_page(name))
        expect(own, expected, f"the page after {after} up to {last}")
        for info in page:
            if info.name in self.there:
                self.check_info(info)
            # A page shows one moment, and a parent exists as long as its children.
            if info.parent and on_page(info.parent):
                assert info.parent in names, f"{info.name} without its parent {info.parent}"
