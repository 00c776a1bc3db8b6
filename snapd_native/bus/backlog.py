"""Limit the messages that wait at the bus for clients that do not read them.

dbus-daemon takes nothing more from a connection while 127 MiB of its messages, or 64 descriptors,
wait for others to read them (``max_incoming_bytes`` and ``max_incoming_unix_fds`` in
dbus-daemon(1)): one client that reads nothing could hold up the answers to everybody. So as much
may wait for each as is left free for all. A client that reads nothing gets half of the whole, two
get a third each. Switches that share one memory among their ports do the same (Choudhury and Hahne,
Dynamic Queue Length Thresholds, 1998), and keep a little for each that nobody else gets.

Answers are counted as they are sent, as if nobody read any. When that comes near to what may wait,
the bus is asked what does wait, which root may.
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
"""Bytes that may wait in all, beside what each client has of its own."""

OWN = 64 << 10
"""Bytes that may always wait for each client, however much waits for others."""

OWN_IN_ALL = 16 << 20
"""Bytes that all clients together may have of `OWN`; the rest of the bus's limit is for signals."""

DESCRIPTOR = ROOM // 48
"""Bytes that a waiting file descriptor counts as."""

LARGE = 64 << 10
"""Bytes beyond which an answer is better dropped than kept, unless it tells of a change."""

READ_WITHIN = 0.5
"""Seconds within which a client has to read so much that what waits here can be sent."""

PAUSE = 0.1
"""Longest time, in seconds, between two questions to the bus while no client reads."""


class Bus(Protocol):
    """The part of a connection that asks others on it."""

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
    """At least."""

    @property
    def waiting(self) -> int:
        """Return what waits at the bus at most."""
        return self.sent - self.read


@dataclass(slots=True)
class _Client(_Account):
    held: deque[_Held] = field(default_factory=deque)
    """Answers that are sent when it has read others."""
    kept: int = 0
    """Bytes of those that cannot be dropped."""
    since: float | None = None
    """When the bus has first said that it has much to read, and no room for the first of them."""
    is_behind: bool = False
    """Whether it has not read on in time."""


class Backlog:
    """Lets answers pass as long as there is room at the bus for them."""

    def __init__(self, bus: Bus) -> None:
        self._bus = bus
        self._all = _Account()
        self._clients: dict[str, _Client] = {}
        self._suspects: set[str] = set()
        """Those about whom the bus is asked again and again."""
        self._asking: asyncio.Task[None] | None = None
        self._closed = False

    def meet(self, call: Call) -> None:
        """Count what is sent to a client from its first call on, until it is forgotten."""
        if call.sender not in self._clients:
            self._clients[call.sender] = _Client()

    def check(self, call: Call) -> None:
        """Refuse the call of a client that has to read first.

        Raises:
            ResourceExhausted: it has not read on in time, or too much waits here for it.
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
        """Wait until there is room for an answer, and return true.

        With ``may_drop`` wait `READ_WITHIN` at most, and return false if there is none by then.
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
        """Let pass what is held for a connection that has left: the bus throws it away."""
        self._suspects.discard(receiver)
        if client := self._clients.pop(receiver, None):
            for held in client.held:
                self._decide(client, held, is_sent=True)

    def close(self) -> None:
        """Let everything pass from now on."""
        self._closed = True
        for receiver in [*self._clients]:
            self.forget(receiver)

    def _fits(self, client: _Client, cost: int) -> bool:
        left = ROOM - self._all.waiting - cost
        return client.waiting + cost <= max(left, OWN) and left > -OWN_IN_ALL

    def _has_much(self, client: _Client) -> bool:
        """Tell whether more than half of what may wait for a client does."""
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
        """Ask the bus how much waits, and admit answers as there is room, until all is sent."""
        loop = asyncio.get_running_loop()
        try:
            while self._suspects:
                begin = loop.time()
                await self._update(self._all, self._bus.unique_name or "", "Incoming")
                have_read = [await self._ask_about(receiver) for receiver in [*self._suspects]]
                pause = 0 if any(have_read) else PAUSE
                # Three quarters of the time it is not asked.
                await asyncio.sleep(max(pause, 3 * (loop.time() - begin)))
        except SnapdError as error:
            if not self._closed:
                log.warning("nothing is held for clients that do not read: %s", error)
            self.close()
        finally:
            self._asking = None

    async def _ask_about(self, receiver: str) -> bool:
        """Ask what waits for a client, let pass what can, and return whether it has read on."""
        client = self._clients.get(receiver)
        if client is None:
            return False
        read = client.read
        # If it leaves meanwhile, the bus says so at once.
        with suppress(SnapdError):
            await self._update(client, receiver, "Outgoing")
        if self._clients.get(receiver) is client:
            self._release(receiver, client)
        return client.read > read

    async def _update(self, account: _Account, name: str, direction: str) -> None:
        # All that was sent before has reached the bus when it is asked.
        sent = account.sent
        (stats,) = await self._bus.request(
            DRIVER, DRIVER_PATH, f"{DRIVER}.Debug.Stats", "GetConnectionStats", "s", [name]
        )
        sizes = {what: stats[f"{direction}{what}"].value for what in ("Bytes", "FDs")}
        account.read = sent - int(sizes["Bytes"] + DESCRIPTOR * sizes["FDs"])

    def _release(self, receiver: str, client: _Client) -> None:
        """Decide about what is held, now that the bus has been asked."""
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
            # If it has not much, others have left no room.
            self._drop(client)
        if not client.held and not has_much:
            self._suspects.discard(receiver)

    def _drop(self, client: _Client) -> None:
        for held in [*client.held]:
            if held.may_drop:
                client.held.remove(held)
                self._decide(client, held, is_sent=False)
