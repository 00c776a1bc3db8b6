"""Room at the bus for replies to clients that do not read, on a fake bus."""

from __future__ import annotations

import asyncio
import os
from collections import Counter
from collections.abc import Callable, Coroutine, Sequence
from typing import Any, cast

import pytest
from dbus_next.constants import MessageFlag
from dbus_next.signature import Variant

from snapd_native.bus import outbox
from snapd_native.bus.connection import ServiceConnection
from snapd_native.bus.incoming import Call
from snapd_native.bus.outbox import DESCRIPTOR, OWN, OWN_IN_ALL, ROOM, Outbox
from snapd_native.bus.replies import Answer
from snapd_native.errors import ResourceExhausted, Unavailable
from snapd_native.wire.values import Body
from tests.support.waiting import WAIT_TIMEOUT

SERVICE, READER, OTHER = ":1.0", ":1.1", ":1.2"
PAGE = 8 << 20


class FakeBus:
    """Counts the bytes and descriptors that wait for clients, and answers questions about them.

    The interface org.freedesktop.DBus.Debug.Stats of dbus-daemon answers in the same way.
    """

    unique_name = SERVICE

    def __init__(self) -> None:
        self.sizes = Counter[str]()
        self.descriptors = Counter[str]()
        self.receiver = READER
        self.has_statistics = True

    def send_marshalled(self, data: bytearray, fds: Sequence[int] = ()) -> None:
        self.sizes[self.receiver] += len(data)
        self.descriptors[self.receiver] += len(fds)

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
        await asyncio.sleep(0)
        if not self.has_statistics:
            raise Unavailable("the bus has no statistics")
        (name,) = body or []
        if name == SERVICE:
            direction, size, fds = "Incoming", self.sizes.total(), self.descriptors.total()
        else:
            direction, size, fds = "Outgoing", self.sizes[name], self.descriptors[name]
        return [{f"{direction}Bytes": Variant("u", size), f"{direction}FDs": Variant("u", fds)}]


class OutboxOnFakeBus:
    """An outbox, and the bus that its replies go to."""

    def __init__(self) -> None:
        self.bus = FakeBus()
        self.outbox = Outbox(cast(ServiceConnection, self.bus))
        self.begun = 0
        """The number of calls that have begun."""

    async def send(
        self,
        receiver: str,
        size: int,
        room: int | None = None,
        *,
        fds: Sequence[int] = (),
        end: asyncio.Event | None = None,
    ) -> bool:
        """Reply to a call when it may begin and ``end`` is set; return whether there was room.

        The call reserves ``room``, or the size of the reply.
        """
        client = self.outbox.account(call(receiver))
        answer = Answer(bytearray(size), fds)
        room = size + DESCRIPTOR * len(fds) if room is None else room
        await self.outbox.turn(client)
        async with self.outbox.room(client, room) as reserved:
            self.begun += 1
            if end:
                await end.wait()
            try:
                await self.outbox.check(client, answer, reserved)
            except ResourceExhausted:
                return False
        self.bus.receiver = receiver
        self.outbox.reply(client, answer)
        return True

    def begin(
        self,
        receiver: str,
        size: int,
        room: int | None = None,
        *,
        fds: Sequence[int] = (),
        end: asyncio.Event | None = None,
    ) -> asyncio.Task[bool]:
        """Start to reply to a call as `send`, and return the task."""
        replying = self.send(receiver, size, room, fds=fds, end=end)
        return asyncio.get_running_loop().create_task(replying)

    async def fill(self, receiver: str) -> None:
        """Send pages to a client until it gets no more."""
        page = self.begin(receiver, PAGE)
        while await is_done(page) and page.result():
            page = self.begin(receiver, PAGE)
        page.cancel()

    def read(self, receiver: str) -> None:
        """Let a client read all replies that wait for it."""
        self.bus.sizes[receiver] = self.bus.descriptors[receiver] = 0


def call(sender: str, flags: MessageFlag = MessageFlag.NONE) -> Call:
    return Call(1, flags.value, sender, "/", "", "List", "", 0, b"", 0)


async def is_done(task: asyncio.Task[bool]) -> bool:
    """Tell whether a task ends within several questions to the bus."""
    for _ in range(30):
        await asyncio.sleep(0.001)
    return task.done()


@pytest.fixture(autouse=True)
def no_delays(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the service ask the bus often."""
    monkeypatch.setattr(outbox, "PAUSE", 0.001)


def scenario(
    test: Callable[[OutboxOnFakeBus], Coroutine[Any, Any, None]],
) -> Callable[[], None]:
    """Run a test with a new outbox."""

    def run() -> None:
        async def limited() -> None:
            async with asyncio.timeout(WAIT_TIMEOUT):
                await test(OutboxOnFakeBus())

        asyncio.run(limited())

    run.__name__ = test.__name__
    return run


@scenario
async def test_a_client_that_reads_gets_every_reply(fake: OutboxOnFakeBus) -> None:
    for _ in range(100):
        assert await fake.send(READER, PAGE)
        fake.read(READER)


@scenario
async def test_a_client_that_does_not_read_gets_half_of_the_room(fake: OutboxOnFakeBus) -> None:
    await fake.fill(READER)
    assert ROOM // 2 - PAGE < fake.bus.sizes[READER] <= ROOM // 2
    # Another client gets its reply at once.
    assert await fake.send(OTHER, PAGE)


@scenario
async def test_two_clients_that_do_not_read_get_a_third_of_the_room_each(
    fake: OutboxOnFakeBus,
) -> None:
    sizes = fake.bus.sizes
    calls = [fake.begin(client, 1 << 20) for _ in range(96) for client in (READER, OTHER)]
    assert not await is_done(calls[-1])
    assert sizes[READER] == sizes[OTHER] == ROOM // 3
    for one in calls:
        one.cancel()


@scenario
async def test_calls_wait_until_their_client_has_read(fake: OutboxOnFakeBus) -> None:
    await fake.fill(READER)
    calls = [fake.begin(READER, OWN) for _ in range(100)]
    large = fake.begin(READER, PAGE)
    assert not await is_done(calls[0]) or fake.bus.sizes[READER] <= ROOM // 2
    assert not await is_done(large)
    fake.read(READER)
    assert all(await asyncio.gather(*calls, large))


@scenario
async def test_a_client_that_reads_slowly_gets_every_reply(fake: OutboxOnFakeBus) -> None:
    calls = [fake.begin(READER, PAGE) for _ in range(50)]
    while not all(one.done() for one in calls):
        await asyncio.sleep(0)
        fake.bus.sizes[READER] = max(fake.bus.sizes[READER] - PAGE // 10, 0)
    assert all(one.result() for one in calls)


@scenario
async def test_running_calls_reserve_room_for_their_replies(fake: OutboxOnFakeBus) -> None:
    end = asyncio.Event()
    calls = [fake.begin(READER, PAGE, end=end) for _ in range(20)]
    assert not await is_done(calls[0])
    assert fake.begun == ROOM // 2 // PAGE
    # The replies are smaller than what was reserved.
    small = [fake.begin(OTHER, 100, room=1 << 20) for _ in range(1000)]
    assert all(await asyncio.gather(*small))
    end.set()
    while not all(one.done() for one in calls):
        await asyncio.sleep(0)
        fake.read(READER)
    assert all(one.result() for one in calls)


@scenario
async def test_a_client_that_reads_may_begin_a_call_whatever_others_have_left(
    fake: OutboxOnFakeBus,
) -> None:
    others = [f":2.{number}" for number in range(100)]
    calls = [fake.begin(other, OWN) for other in others * 20]
    assert not await is_done(calls[-1])
    assert ROOM * 0.9 < fake.bus.sizes.total() <= ROOM + OWN_IN_ALL
    assert await fake.send(READER, 100, room=PAGE)
    # There is no room for a large reply.
    assert not await fake.send(READER, PAGE)
    assert not await fake.send(READER, 0, fds=[os.open(os.devnull, os.O_RDONLY)])
    fake.read(READER)
    assert await fake.send(READER, OWN)
    for one in calls:
        one.cancel()


@scenario
async def test_large_replies_wait_for_the_running_calls_of_others(fake: OutboxOnFakeBus) -> None:
    """Otherwise a reply could be refused although every client reads."""
    end = asyncio.Event()
    others = [fake.begin(f":2.{number}", 100, room=PAGE, end=end) for number in range(12)]
    page = fake.begin(READER, PAGE)
    assert not await is_done(page)
    end.set()
    assert all(await asyncio.gather(page, *others))


@scenario
async def test_the_own_bytes_of_all_clients_are_limited(fake: OutboxOnFakeBus) -> None:
    for number in range(20):
        await fake.fill(f":2.{number}")
    calls = [fake.begin(f":3.{number}", OWN) for number in range(500)]
    assert not await is_done(calls[-1])
    assert ROOM < fake.bus.sizes.total() <= ROOM + OWN_IN_ALL
    for one in calls:
        one.cancel()


@scenario
async def test_a_waiting_descriptor_counts_as_2_mib(fake: OutboxOnFakeBus) -> None:
    calls = [fake.begin(READER, 0, fds=[0]) for _ in range(50)]
    assert not await is_done(calls[-1])
    assert fake.bus.descriptors[READER] == ROOM // DESCRIPTOR // 2
    while not all(one.done() for one in calls):
        await asyncio.sleep(0)
        fake.read(READER)
    assert all(one.result() for one in calls)


@scenario
async def test_a_call_without_a_reply_does_not_wait(fake: OutboxOnFakeBus) -> None:
    await fake.fill(READER)
    silent = fake.outbox.account(call(READER, MessageFlag.NO_REPLY_EXPECTED))
    async with fake.outbox.room(silent, PAGE):
        pass


@pytest.mark.parametrize("how", ["close", "forget"])
def test_calls_do_not_wait_when_the_client_leaves_or_the_service_stops(how: str) -> None:
    async def test(fake: OutboxOnFakeBus) -> None:
        await fake.fill(READER)
        waiting = [fake.begin(READER, PAGE) for _ in range(20)]
        assert not await is_done(waiting[0])
        if how == "close":
            fake.outbox.close()
        else:
            fake.outbox.forget(READER)
        assert all(await asyncio.gather(*waiting))

    scenario(test)()


def test_calls_do_not_wait_on_a_bus_without_statistics(caplog: pytest.LogCaptureFixture) -> None:
    async def test(fake: OutboxOnFakeBus) -> None:
        fake.bus.has_statistics = False
        for _ in range(20):
            assert await fake.send(READER, PAGE)

    scenario(test)()
    assert "no limit for clients that do not read" in caplog.text
    assert len(caplog.records) == 1


def test_a_client_that_does_not_read_is_logged_once(caplog: pytest.LogCaptureFixture) -> None:
    async def test(fake: OutboxOnFakeBus) -> None:
        await fake.fill(READER)
        await fake.fill(READER)

    scenario(test)()
    (record,) = caplog.records
    assert record.getMessage().startswith(f"{READER} reads its replies")
