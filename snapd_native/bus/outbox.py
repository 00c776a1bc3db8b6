"""Send replies and signals, so that a client that does not read them delays no other client.

dbus-daemon reads nothing more from a connection while 127 MiB of its messages, or 64 descriptors,
wait for their receivers (``max_incoming_bytes`` and ``max_incoming_unix_fds`` in dbus-daemon(1)).
So the bytes that may wait for one client are limited to the bytes that are still free. One client
that does not read gets half of the whole, two get a third each. Switches that share one memory
among their ports do the same (Choudhury and Hahne, Dynamic Queue Length Thresholds, 1998), and
reserve a little for each port.

A call begins when there is room for its reply, and waits until then. So no reply waits in the
service, no result of a change is lost, and a client that reads slowly gets every reply. Replies are
counted when they are sent, as if no client read them. While a call waits, the service asks the bus
how much really waits there, which root may.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field

from snapd_native.bus.connection import ServiceConnection, close
from snapd_native.bus.incoming import Call
from snapd_native.bus.replies import Answer
from snapd_native.errors import ResourceExhausted, SnapdError
from snapd_native.wire.names import DRIVER, DRIVER_PATH

log = logging.getLogger(__name__)

ROOM = 96 << 20
"""Bytes that may wait for all clients together, in addition to `OWN`."""

OWN = 64 << 10
"""Bytes that may always wait for a client, however much waits for others."""

OWN_IN_ALL = 16 << 20
"""Bytes of `OWN` for all clients together; the rest of the bus's limit is for signals."""

DESCRIPTOR = ROOM // 48
"""Bytes for which a waiting file descriptor counts."""

LAST_PAUSE = 0.5
"""Seconds of the last pause before descriptors are refused: about a second in all.

The bus may not know yet that a client has left, whose replies have used the room.
"""

PAUSE = 1.0
"""Seconds at most between two questions to the bus about a client that does not read."""


@dataclass(eq=False, slots=True)
class Account:
    """What may wait at the bus for one client, or for all."""

    name: str
    sent: int = 0
    read: int = 0
    """A lower bound."""
    reserved: int = 0
    """Bytes for the replies to running calls."""
    is_limited: bool = True
    is_reported: bool = False
    queue: asyncio.Lock = field(default_factory=asyncio.Lock)
    """Is held by the call that waits for room; later calls wait behind it."""

    @property
    def waiting(self) -> int:
        """Return an upper bound of the bytes that wait."""
        return self.sent - self.read

    @property
    def used(self) -> int:
        """Return the bytes that wait and those that are reserved."""
        return self.waiting + self.reserved


class Outbox:
    """Sends every reply and signal."""

    def __init__(self, connection: ServiceConnection) -> None:
        self._connection = connection
        self._all = Account("")
        self._clients: dict[str, Account] = {}
        self._freed = asyncio.Event()
        self._closed = asyncio.Event()

    def account(self, call: Call) -> Account:
        """Return the account of the caller; that of a call without a reply has no limit."""
        if not call.wants_reply:
            return Account(call.sender, is_limited=False)
        return self._clients.setdefault(call.sender, Account(call.sender))

    async def turn(self, client: Account) -> None:
        """Wait until a client that has much to read has read some of it."""
        async with client.queue:
            await self._wait(client, OWN)

    @asynccontextmanager
    async def room(self, client: Account, size: int) -> AsyncIterator[int]:
        """Wait for room for a reply of ``size`` bytes, and reserve it for the block.

        Yield how much is reserved. That is less than ``size`` if others have left too little room:
        they cannot keep a client that reads from calling.
        """
        async with client.queue:
            reserved = await self._wait(client, size)
            client.reserved += reserved
            self._all.reserved += reserved
        try:
            yield reserved
        finally:
            client.reserved -= reserved
            self._all.reserved -= reserved
            self._freed.set()

    async def check(self, client: Account, answer: Answer, reserved: int) -> None:
        """Refuse a large reply that finds no room in time; its descriptors are closed.

        Raises:
            ResourceExhausted: it has more bytes than are reserved and free.
        """
        size = _size(answer)
        if size <= max(reserved, OWN) or self._fits(client, size - reserved):
            return
        # A page of List takes memory while it waits here, and descriptors take none.
        pause = 0.001 if answer.fds else LAST_PAUSE
        await self._ask(client)
        while not self._fits(client, size - reserved) and pause < LAST_PAUSE:
            await asyncio.sleep(pause)
            pause *= 2
            await self._ask(client)
        if not self._fits(client, size - reserved):
            close(answer.fds)
            raise ResourceExhausted(
                "the bus has no space for the reply, because clients do not read theirs:"
                " ask for less, or try again later"
            )

    def reply(self, client: Account, answer: Answer) -> None:
        """Send a reply."""
        client.sent += _size(answer)
        self._all.sent += _size(answer)
        self._connection.send_marshalled(*answer)

    def signal(self, data: bytearray) -> None:
        """Send a signal."""
        self._all.sent += len(data)
        self._connection.send_marshalled(data)

    def forget(self, sender: str) -> None:
        """End the limit of a connection that has left; the bus discards what waits for it."""
        if client := self._clients.pop(sender, None):
            client.is_limited = False
            self._freed.set()

    def close(self) -> None:
        """End all limits."""
        self._closed.set()
        self._freed.set()

    def _fits(self, client: Account, size: int, *, with_running: bool = True) -> bool:
        """Tell whether there is room, with or without what is reserved for running calls."""
        if self._closed.is_set() or not client.is_limited:
            return True
        own, of_all = client.waiting, self._all.waiting
        if with_running:
            own, of_all = client.used, self._all.used
        left = ROOM - of_all - size
        return own + size <= max(left, OWN) and left > -OWN_IN_ALL

    async def _wait(self, client: Account, size: int) -> int:
        """Wait until there is room for a reply, and return how much to reserve for it."""
        pause = 0.001
        while not self._fits(client, size):
            if self._fits(client, size, with_running=False):
                # The running calls end soon.
                self._freed.clear()
                await self._freed.wait()
                continue
            await self._ask(client)
            if self._fits(client, size, with_running=False):
                continue
            if client.used <= OWN and self._fits(client, OWN):
                return OWN
            if pause == PAUSE and client.waiting > OWN and not client.is_reported:
                client.is_reported = True
                log.warning("%s reads its replies slowly, or not: its calls wait", client.name)
            with suppress(TimeoutError):
                await asyncio.wait_for(self._closed.wait(), pause)
            pause = min(2 * pause, PAUSE)
        return size

    async def _ask(self, client: Account) -> None:
        """Ask the bus how much waits for a client, and for all."""
        try:
            await self._update(self._all, self._connection.unique_name or "", "Incoming")
        except SnapdError as error:
            if not self._closed.is_set():
                log.warning("no limit for clients that do not read their replies: %s", error)
            self.close()
        # A client that has left has no statistics; the bus tells that it has left, too.
        with suppress(SnapdError):
            await self._update(client, client.name, "Outgoing")

    async def _update(self, account: Account, name: str, direction: str) -> None:
        # The question arrives at the bus after all replies that were sent before.
        sent = account.sent
        (stats,) = await self._connection.request(
            DRIVER, DRIVER_PATH, f"{DRIVER}.Debug.Stats", "GetConnectionStats", "s", [name]
        )
        size, fds = (int(stats[f"{direction}{what}"].value) for what in ("Bytes", "FDs"))
        account.read = sent - size - DESCRIPTOR * fds


def _size(answer: Answer) -> int:
    return len(answer.data) + DESCRIPTOR * len(answer.fds)
