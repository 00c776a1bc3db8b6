"""Kills at any instant under a mixed load, and an oracle that knows what was acknowledged.

``STORM_KILLS`` says how many; ``STORM_SEED`` repeats the choices of a storm that failed, which it
prints, though not the instants.
"""

from __future__ import annotations

import os
import random
import select
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from snapd_native.client import BlockingClient
from tests.service import serving
from tests.storms import found, rage
from tests.vm.ledger import Book

KILLS = int(os.environ.get("STORM_KILLS", "20"))
SEED = int(os.environ.get("STORM_SEED", str(random.SystemRandom().randrange(1 << 32))))
CLIENTS = 8


@pytest.mark.timeout(60 + 20 * KILLS)
def test_kills_at_any_instant(on_bus: str, scratch: Path) -> None:
    chance = random.Random(SEED)
    print(f"STORM_SEED={SEED}")
    book = Book(("",))
    (ledger,) = book.ledgers.values()
    total = 0
    for number in range(KILLS):
        if chance.random() < 0.1:
            kill_while_it_starts(on_bus, scratch / "state", chance.uniform(0, 0.8))
        with serving(on_bus, scratch / "state", status=-signal.SIGKILL) as service:
            troubles = ledger.compare(found())
            assert troubles == [], f"after kill {number}\n{book.story(troubles)}"
            order = book.order(number, CLIENTS)
            commits, seconds = chance.randrange(1, 12), chance.uniform(0, 0.05)
            total += rage(book, service, order, commits, seconds, service.daemon.process.kill)
    with serving(on_bus, scratch / "state"):
        troubles = ledger.compare(found())
        assert troubles == [], book.story(troubles)
        with BlockingClient() as client:
            assert client.check() == []
    print(f"{KILLS} kills, {total} calls acknowledged, {ledger.acknowledged} of them commits")
    # It must have had something to lose.
    assert ledger.acknowledged >= KILLS


def kill_while_it_starts(address: str, state: Path, seconds: float) -> None:
    with tempfile.TemporaryDirectory() as runtime:
        starting = subprocess.Popen(
            [
                *(sys.executable, "-P", "-m", "snapd_native", "daemon", "--quiet"),
                *("--state-directory", str(state), "--runtime-directory", runtime),
            ],
            env={**os.environ, "DBUS_SYSTEM_BUS_ADDRESS": address},
        )
        ended = os.pidfd_open(starting.pid)
        select.select([ended], [], [], seconds)
        os.close(ended)
        starting.kill()
        assert starting.wait() == -signal.SIGKILL
