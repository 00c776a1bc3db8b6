"""The connections that the authority knows, on a bus for which the test answers."""

from __future__ import annotations

import asyncio

from snapd_native.bus.authority import Authority
from snapd_native.errors import AccessDenied, NotFound
from snapd_native.wire.values import Body


class Bus:
    """The bus driver: keeps each question until the test answers it."""

    def __init__(self) -> None:
        self.questions: list[asyncio.Future[Body]] = []

    async def ask_driver(self, member: str, signature: str, body: Body) -> Body:
        question: asyncio.Future[Body] = asyncio.get_running_loop().create_future()
        self.questions.append(question)
        return await question

    async def request(self, *_: object, **__: object) -> Body:
        raise AssertionError("this test sends no question to polkit")

    def tell(self, *_: object, **__: object) -> None:
        raise AssertionError("this test sends nothing to polkit")


async def wait_for_question(bus: Bus, number: int) -> asyncio.Future[Body]:
    while len(bus.questions) < number:
        await asyncio.sleep(0)
    return bus.questions[number - 1]


def test_a_late_call_does_not_make_a_connection_known_that_has_left() -> None:
    async def scenario() -> None:
        bus = Bus()
        authority = Authority(bus)
        first = asyncio.ensure_future(authority.uid(":1.7"))
        (await wait_for_question(bus, 1)).set_result([1000])
        assert await first == 1000
        assert authority.knows(":1.7")
        authority.forget(":1.7")
        assert not authority.knows(":1.7")
        late = asyncio.ensure_future(authority.uid(":1.7"))
        question = await wait_for_question(bus, 2)
        assert not authority.knows(":1.7")
        question.set_exception(NotFound("there is no such connection"))
        try:
            await late
        except AccessDenied:
            assert not authority.knows(":1.7")
        else:
            raise AssertionError("a connection that has left was identified")

    asyncio.run(scenario())


def test_one_question_to_the_bus_identifies_all_calls_of_a_connection() -> None:
    async def scenario() -> None:
        bus = Bus()
        authority = Authority(bus)
        calls = [asyncio.ensure_future(authority.uid(":1.7")) for _ in range(3)]
        question = await wait_for_question(bus, 1)
        assert not authority.knows(":1.7")
        question.set_result([0])
        assert await asyncio.gather(*calls) == [0, 0, 0]
        assert len(bus.questions) == 1
        assert authority.knows(":1.7")

    asyncio.run(scenario())
