"""Replies that are held for clients that do not read, on a fake bus."""

from __future__ import annotations

import asyncio

import pytest
from dbus_next.signature import Variant

from snapd_native.bus import backlog
from snapd_native.bus.backlog import DESCRIPTOR, LARGE, OWN, ROOM, Backlog
from snapd_native.bus.incoming import Call
from snapd_native.bus.replies import Answer
from snapd_native.errors import ResourceExhausted, Unavailable
from snapd_native.wire.values import Body

SERVICE, READER, OTHER = ":1.0", ":1.1", ":1.2"


class FakeBus:
    """Counts the bytes and descriptors that wait for clients, and answers questions about them.

    The interface org.freedesktop.DBus.Debug.Stats of dbus-daemon answers in the same way.
    """

    unique_name = SERVICE

    def __init__(self) -> None:
        self.waiting = {READER: 0, OTHER: 0}
        self.descriptors = {READER: 0, OTHER: 0}
        self.has_statistics = True

    async def request(
        self,
        destination: str,
        path: str,
        interface: str,
        member: str,
        signature: str = "",
        body: Body | None = None,
    ) -> Body:
        assert (member, signature) == ("GetConnectionStats", "s")
        if not self.has_statistics:
            raise Unavailable("the bus has no statistics")
        (name,) = body or []
        direction, clients = "Outgoing", [str(name)]
        if name == SERVICE:
            direction, clients = "Incoming", [*self.waiting]
        size = sum(self.waiting[client] for client in clients)
        fds = sum(self.descriptors[client] for client in clients)
        return [{f"{direction}Bytes": Variant("u", size), f"{direction}FDs": Variant("u", fds)}]


class BacklogOnFakeBus:
    """A backlog of two clients, and the bus that its answers go to."""

    def __init__(self) -> None:
        self.bus = FakeBus()
        self.backlog = Backlog(self.bus)
        for client in (READER, OTHER):
            self.backlog.meet(call(client))

    async def send(self, receiver: str, size: int, *, may_drop: bool = False) -> bool:
        """Send an answer when there is room for it; return whether it was sent."""
        sent = await self.backlog.admit(receiver, Answer(bytearray(size)), may_drop=may_drop)
        self.bus.waiting[receiver] += size if sent else 0
        return sent

    def begin(self, receiver: str, size: int, *, may_drop: bool = False) -> asyncio.Task[bool]:
        """Start to send an answer, and return the task."""
        return asyncio.get_running_loop().create_task(self.send(receiver, size, may_drop=may_drop))

    def read(self, receiver: str) -> None:
        """Let a client read all answers that wait for it."""
        self.bus.waiting[receiver] = 0


def call(sender: str) -> Call:
    return Call(1, 0, sender, "/", "", "List", "", 0, b"", 0)


@pytest.fixture(autouse=True)
def no_delays(monkeypatch: pytest.MonkeyPatch) -> None:
    """Count a client that does not read as behind at the second question to the bus."""
    monkeypatch.setattr(backlog, "READ_WITHIN", 0)
    monkeypatch.setattr(backlog, "PAUSE", 0)


async def wait_for(condition: asyncio.Task[bool]) -> bool:
    async with asyncio.timeout(60):
        return await condition


def test_answers_are_sent_at_once_while_there_is_room() -> None:
    async def scenario() -> None:
        sending = BacklogOnFakeBus()
        for _ in range(10):
            assert await sending.send(READER, 1 << 20)
        assert await sending.send(OTHER, 1 << 20)

    asyncio.run(scenario())


def test_a_client_that_reads_nothing_gets_half_of_the_room() -> None:
    async def scenario() -> None:
        sending = BacklogOnFakeBus()
        assert await sending.send(READER, ROOM // 2)
        held = sending.begin(READER, LARGE)
        # Another client gets its answer at once.
        assert await sending.send(OTHER, 1 << 20)
        await asyncio.sleep(0)
        assert not held.done()
        sending.read(READER)
        assert await wait_for(held)

    asyncio.run(scenario())


def test_an_answer_that_can_be_dropped_is_dropped_for_a_client_that_does_not_read() -> None:
    async def scenario() -> None:
        sending = BacklogOnFakeBus()
        assert await sending.send(READER, ROOM // 2)
        assert not await wait_for(sending.begin(READER, 1 << 20, may_drop=True))
        # The client is behind: its next answer is dropped at once, and its calls are refused.
        assert not await sending.send(READER, 1 << 20, may_drop=True)
        with pytest.raises(ResourceExhausted, match="wait at the bus"):
            sending.backlog.check(call(READER))
        sending.backlog.check(call(OTHER))

    asyncio.run(scenario())


def test_a_client_that_reads_again_is_served_again() -> None:
    async def scenario() -> None:
        sending = BacklogOnFakeBus()
        assert await sending.send(READER, ROOM // 2)
        assert not await wait_for(sending.begin(READER, 1 << 20, may_drop=True))
        sending.read(READER)
        assert await wait_for(sending.begin(READER, OWN))
        async with asyncio.timeout(60):
            while sending.backlog._suspects:
                await asyncio.sleep(0)
        sending.backlog.check(call(READER))
        assert await sending.send(READER, 1 << 20, may_drop=True)

    asyncio.run(scenario())


def test_calls_are_refused_while_many_answers_that_must_be_sent_wait() -> None:
    async def scenario() -> None:
        sending = BacklogOnFakeBus()
        assert await sending.send(READER, ROOM // 2)
        held = [sending.begin(READER, OWN) for _ in range(2)]
        await asyncio.sleep(0)
        with pytest.raises(ResourceExhausted):
            sending.backlog.check(call(READER))
        sending.backlog.forget(READER)
        assert [await wait_for(one) for one in held] == [True, True]

    asyncio.run(scenario())


def test_a_descriptor_counts_as_a_part_of_the_room() -> None:
    async def scenario() -> None:
        sending = BacklogOnFakeBus()
        answer = Answer(bytearray(), [0])
        for _ in range(ROOM // DESCRIPTOR // 2):
            assert await sending.backlog.admit(READER, answer)
            sending.bus.descriptors[READER] += 1
        held = asyncio.ensure_future(sending.backlog.admit(READER, answer))
        await asyncio.sleep(0)
        assert not held.done()
        sending.bus.descriptors[READER] = 0
        assert await wait_for(asyncio.ensure_future(held))

    asyncio.run(scenario())


@pytest.mark.parametrize("how", ["close", "forget"])
def test_held_answers_are_sent_when_the_client_leaves_or_the_service_stops(how: str) -> None:
    async def scenario() -> None:
        sending = BacklogOnFakeBus()
        assert await sending.send(READER, ROOM // 2)
        held = sending.begin(READER, 1 << 20)
        await asyncio.sleep(0)
        if how == "close":
            sending.backlog.close()
        else:
            sending.backlog.forget(READER)
        assert await wait_for(held)
        # Later answers are not held.
        assert await sending.send(READER, ROOM)

    asyncio.run(scenario())


def test_no_answer_is_held_on_a_bus_without_statistics(caplog: pytest.LogCaptureFixture) -> None:
    async def scenario() -> None:
        sending = BacklogOnFakeBus()
        sending.bus.has_statistics = False
        assert await sending.send(READER, ROOM // 2)
        assert await wait_for(sending.begin(READER, ROOM))
        assert await sending.send(READER, ROOM)

    asyncio.run(scenario())
    assert "nothing is held for clients that do not read" in caplog.text
