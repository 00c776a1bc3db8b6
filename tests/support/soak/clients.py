"""A process with some clients of a soak, which work in rounds and rest between them.

Run as ``python -m tests.support.soak.clients``. The process reads one JSON object from stdin, an
`Order`. Then it reads two lines for each round: ``work`` begins the round, and ``rest`` ends it.
The last line is ``leave``. The process prints JSON lines: reports of the calls since the last
report, failures, and a line when all of its clients rest or have left.
"""

from __future__ import annotations

import asyncio
import json
import random
import sys
import traceback
from collections.abc import Awaitable, Callable, Sequence
from typing import Any, TypedDict

from snapd_native.client import Client
from tests.support.soak.operations import OPERATIONS, leave
from tests.support.soak.tenants import Report, Tenant

PAUSE = 0.25
"""The average pause between two operations of a tenant, in seconds. A real client also pauses, to
use the results. On overloaded processors, the durations of calls show nothing about the service."""

STAT_PAUSE = 0.03
"""Seconds between two calls of a client that calls only Stat."""


class Order(TypedDict):
    """The input of a client process."""

    seed: int
    bases: dict[str, int]
    """Snapshots that always exist, with their numbers of inodes."""
    tenants: list[int]
    """The numbers of the tenants."""
    stat_clients: int
    """The number of clients that call only Stat."""


class ClientGroup:
    """All clients of one process."""

    def __init__(self, order: Order) -> None:
        self._order = order
        self._report = Report()
        self._resting = asyncio.Event()
        self._tenants = [
            Tenant(number, order["bases"], order["seed"], self._report)
            for number in order["tenants"]
        ]
        self._stat_clients = [Client() for _ in range(order["stat_clients"])]

    async def run(self) -> None:
        """Execute the commands from stdin."""
        for tenant in self._tenants:
            await tenant.open()
        for client in self._stat_clients:
            await client.__aenter__()
        while (command := await _line()) == "work":
            self._resting.clear()
            work = [
                *map(self._run_tenant, self._tenants),
                *map(self._call_stat, self._stat_clients),
            ]
            reporting = asyncio.ensure_future(self._report_each_second())
            working = asyncio.ensure_future(_all(work))
            assert await _line() == "rest"
            self._resting.set()
            await working
            reporting.cancel()
            self._flush()
            say(at="rest")
        assert command == "leave"
        await _all([self._run_or_exit(tenant, leave) for tenant in self._tenants])
        self._flush()
        say(at="end")

    async def _run_tenant(self, tenant: Tenant) -> None:
        await self._run_or_exit(tenant, self._run_operations)

    async def _run_operations(self, tenant: Tenant) -> None:
        while not self._resting.is_set():
            (operation,) = tenant.random.choices([*OPERATIONS], [*OPERATIONS.values()])
            await operation(tenant)
            await asyncio.sleep(tenant.random.uniform(0, 2 * PAUSE))

    async def _run_or_exit(self, tenant: Tenant, work: Callable[[Tenant], Awaitable[None]]) -> None:
        """Run ``work`` for a tenant; if that fails, print the error and end the process."""
        try:
            await work(tenant)
        except Exception as error:
            where = "".join(traceback.format_exception(error)[-4:])
            say(failed=f"tenant {tenant.number}, after {[*tenant.recent]}:\n{where}")
            sys.exit(1)

    async def _call_stat(self, client: Client) -> None:
        loop = asyncio.get_running_loop()
        while not self._resting.is_set():
            name = random.choice([*self._order["bases"]])
            begun = loop.time()
            info = await client.stat(name)
            self._report.seconds["Stat"].append(loop.time() - begun)
            assert info.name == name
            await asyncio.sleep(STAT_PAUSE)

    async def _report_each_second(self) -> None:
        while True:
            await asyncio.sleep(1)
            self._flush()

    def _flush(self) -> None:
        """Print the report, and clear it."""
        report = self._report
        say(seconds=report.seconds, changes=report.changes, refused=report.refused)
        report.seconds.clear()
        report.changes.clear()
        report.refused = 0


def say(**fields: Any) -> None:  # noqa: ANN401 - whatever JSON can carry
    sys.stdout.write(json.dumps(fields) + "\n")
    sys.stdout.flush()


async def _all(work: Sequence[Awaitable[None]]) -> None:
    await asyncio.gather(*work)


async def _line() -> str:
    line: str = await asyncio.to_thread(sys.stdin.readline)
    return line.strip()


if __name__ == "__main__":
    asyncio.run(ClientGroup(json.loads(sys.stdin.readline())).run())
