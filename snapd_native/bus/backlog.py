"""Limit the messages that wait at the bus for clients that do not read them.

dbus-daemon reads nothing more from a connection while 127 MiB of its messages, or 64 descriptors,
wait for their receivers (``max_incoming_bytes`` and ``max_incoming_unix_fds`` in dbus-daemon(1)).
Then one client that does not read could delay the replies to all others. So the bytes that may wait
for one client are limited to the bytes that are still free. One client that does not read gets half
of the whole, two get a third each. Switches that share one memory among their ports do the same
(Choudhury and Hahne, Dynamic Queue Length Thresholds, 1998), and reserve a little for each port.

Replies are counted when they are sent, as if no client read them. When the count comes near the
limit, the service asks the bus how much really waits, which root may.
"""

from __future__ import annotations

import asyncio
import logging
from collections import deque
from collections.abc import Coroutine
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol

from snapd_native.bus.incoming import Call
from snapd_native.bus.replies import Answer
from snapd_native.errors import ResourceExhausted, SnapdError
from snapd_native.wire.names import DRIVER, DRIVER_PATH
from snapd_native.wire.values import Body

log = logging.getLogger(__name__)

ROOM = 96 << 20
"""Bytes that may wait for all clients together, in addition to `OWN`."""

OWN = 64 << 10
"""Bytes that may always wait for a client, however much waits for others."""

OWN_IN_ALL = 16 << 20
"""Bytes of `OWN` for all clients together; the rest of the bus's limit is for signals."""

DESCRIPTOR = ROOM // 48
"""Bytes for which a waiting file descriptor counts."""

LARGE = 64 << 10
"""Bytes from which a reply may be dropped, unless it is the result of a change."""

READ_WITHIN = 0.5
"""Seconds within which a client must read enough that a waiting reply can be sent."""

PAUSE = 0.1
"""Seconds at most between two questions to the bus while no client reads."""


class Bus(Protocol):
    """The part of a connection that calls other services."""

    @property
    def unique_name(self) -> str | None:
        """Return the name that the bus has given the connection."""

    def request(
        self,
        destination: str,
        path: str,
        interface: str,
        member: str,
        signature: str = "",
        body: Body | None = None,
    ) -> Coroutine[Any, Any, Body]:
        """Call a method and return what it answers."""


class _Held(NamedTuple):
    cost: int
    may_drop: bool
    is_sent: asyncio.Future[bool]


@dataclass(slots=True)
class _Account:
    sent: int = 0
    read: int = 0
    """A lower bound."""

    @property
    def waiting(self) -> int:
        """Return an upper bound of the bytes that wait at the bus."""
        return self.sent - self.read


@dataclass(slots=True)
class _Client(_Account):
    held: deque[_Held] = field(default_factory=deque)
    """Replies that are sent when the client has read others."""
    kept: int = 0
    """Bytes of the replies that must not be dropped."""
    since: float | None = None
    """When the bus first said that the client has much to read and its first reply no room."""
    is_behind: bool = False
    """Whether the client has not read enough in time."""


class Backlog:
    """Admits replies while there is room for them at the bus."""

    def __init__(self, bus: Bus) -> None:
        self._bus = bus
        self._all = _Account()
        self._clients: dict[str, _Client] = {}
        self._suspects: set[str] = set()
        """The clients about which the service asks the bus repeatedly."""
        self._asking: asyncio.Task[None] | None = None
        self._closed = False

    def meet(self, call: Call) -> None:
        """Start to count what is sent to a client, at its first call."""
        if call.sender not in self._clients:
            self._clients[call.sender] = _Client()

    def check(self, call: Call) -> None:
        """Refuse the call of a client that must read its replies first.

        Raises:
            ResourceExhausted: it has not read enough in time, or too much waits for it here.
        """
        client = self._clients.get(call.sender)
        if call.wants_reply and client and (client.is_behind or client.kept > OWN):
            raise ResourceExhausted(
                f"{call.member} was not called: answers to {call.sender} wait at the bus,"
                " read them and call again"
            )

    def count(self, size: int) -> None:
        """Note that a signal of ``size`` bytes is sent."""
        self._all.sent += size

    async def admit(self, receiver: str, answer: Answer, *, may_drop: bool = False) -> bool:
        """Wait until there is room for a reply, and return true.

        With ``may_drop`` wait at most `READ_WITHIN`, and return false if there is no room then.
        """
        client = self._clients.get(receiver)
        if self._closed or client is None:
            return True
        cost = len(answer.data) + DESCRIPTOR * len(answer.fds)
        if self._fits(client, cost) and not client.held:
            self._add(client, cost)
            if self._has_much(client):
                self._suspect(receiver)
            return True
        if may_drop and client.is_behind:
            return False
        held = _Held(cost, may_drop, asyncio.get_running_loop().create_future())
        client.held.append(held)
        client.kept += 0 if may_drop else cost
        self._suspect(receiver)
        return await held.is_sent

    def forget(self, receiver: str) -> None:
        """Send what waits for a connection that has left; the bus discards it."""
        self._suspects.discard(receiver)
        if client := self._clients.pop(receiver, None):
            for held in client.held:
                self._decide(client, held, is_sent=True)

    def close(self) -> None:
        """Admit every reply from now on."""
        self._closed = True
        for receiver in [*self._clients]:
            self.forget(receiver)

    def _fits(self, client: _Client, cost: int) -> bool:
        left = ROOM - self._all.waiting - cost
        return client.waiting + cost <= max(left, OWN) and left > -OWN_IN_ALL

    def _has_much(self, client: _Client) -> bool:
        """Tell whether more than half of the client's limit waits at the bus."""
        return 2 * client.waiting > max(ROOM - self._all.waiting, OWN)

    def _add(self, client: _Client, cost: int) -> None:
        client.sent += cost
        self._all.sent += cost

    def _decide(self, client: _Client, held: _Held, *, is_sent: bool) -> None:
        client.kept -= 0 if held.may_drop else held.cost
        if is_sent:
            self._add(client, held.cost)
        held.is_sent.set_result(is_sent)

    def _suspect(self, receiver: str) -> None:
        self._suspects.add(receiver)
        if self._asking is None:
            self._asking = asyncio.get_running_loop().create_task(self._ask_on())

    async def _ask_on(self) -> None:
        """Ask the bus repeatedly how much waits, and admit replies, until all are sent."""
        loop = asyncio.get_running_loop()
        try:
            while self._suspects:
                begin = loop.time()
                await self._update(self._all, self._bus.unique_name or "", "Incoming")
                have_read = [await self._ask_about(receiver) for receiver in [*self._suspects]]
                pause = 0 if any(have_read) else PAUSE
                # The questions take at most a quarter of the time.
                await asyncio.sleep(max(pause, 3 * (loop.time() - begin)))
        except SnapdError as error:
            if not self._closed:
                log.warning("nothing is held for clients that do not read: %s", error)
            self.close()
        finally:
            self._asking = None

    async def _ask_about(self, receiver: str) -> bool:
        """Ask how much waits for a client, admit replies, and return whether it has read."""
        client = self._clients.get(receiver)
        if client is None:
            return False
        read = client.read
        # If the client leaves meanwhile, the bus says so at once.
        with suppress(SnapdError):
            await self._update(client, receiver, "Outgoing")
        if self._clients.get(receiver) is client:
            self._release(receiver, client)
        return client.read > read

    async def _update(self, account: _Account, name: str, direction: str) -> None:
        # The question arrives at the bus after all replies that were sent before.
        sent = account.sent
        (stats,) = await self._bus.request(
            DRIVER, DRIVER_PATH, f"{DRIVER}.Debug.Stats", "GetConnectionStats", "s", [name]
        )
        sizes = {what: stats[f"{direction}{what}"].value for what in ("Bytes", "FDs")}
        account.read = sent - int(sizes["Bytes"] + DESCRIPTOR * sizes["FDs"])

    def _release(self, receiver: str, client: _Client) -> None:
        """Admit or drop waiting replies, after the bus has answered."""
        while client.held and self._fits(client, client.held[0].cost):
            self._decide(client, client.held.popleft(), is_sent=True)
            client.since = None
        has_much = self._has_much(client)
        now = asyncio.get_running_loop().time()
        if not (client.held and has_much):
            client.since = None
        elif client.since is None:
            client.since = now
        elif now - client.since > READ_WITHIN and not client.is_behind:
            client.is_behind = True
            log.warning("%s does not read its answers, and gets no more", receiver)
        if not has_much:
            client.is_behind = False
        if client.is_behind or not has_much:
            # If little waits for this client, the others use up the room.
            self._drop(client)
        if not client.held and not has_much:
            self._suspects.discard(receiver)

    def _drop(self, client: _Client) -> None:
        for held in [*client.held]:
            if held.may_drop:
                client.held.remove(held)
                self._decide(client, held, is_sent=False)
