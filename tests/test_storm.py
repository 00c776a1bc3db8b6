"""Kills at any instant under a mixed load, and an oracle that knows what was acknowledged.

``STORM_KILLS`` says how many; ``STORM_SEED`` repeats the choices of a storm that failed, which it
prints, though not the instants.
"""

from __future__ import annotations

import json
import os
import random
import select
import signal
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import pytest

from snapd_native.client import BlockingClient
from tests.engines import PROJECT
from tests.service import Service, serving
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
            assert ledger.compare(found()) == [], f"after kill {number}"
            total += rage(book, service, number, chance)
    with serving(on_bus, scratch / "state"):
        assert ledger.compare(found()) == []
        with BlockingClient() as client:
            assert client.check() == []
    print(f"{KILLS} kills, {total} calls acknowledged, {ledger.acknowledged} of them commits")
    # It must have had something to lose.
    assert ledger.acknowledged >= KILLS


def rage(book: Book, service: Service, number: int, chance: random.Random) -> int:
    """Have clients change all they can, and kill the daemon; return how much was acknowledged."""
    load = subprocess.Popen(
        [sys.executable, PROJECT / "tests" / "vm" / "load.py"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )
    assert load.stdin is not None
    assert load.stdout is not None
    load.stdin.write(book.order(number, CLIENTS) + "\n")
    load.stdin.flush()
    (ledger,) = book.ledgers.values()
    enough = ledger.acknowledged + chance.randrange(1, 12)
    acknowledged = 0
    while ledger.acknowledged < enough:
        line = load.stdout.readline()
        assert line, "the load has ended by itself"
        book.read(line)
        acknowledged += json.loads(line)["at"] == "done"
    # The instant is anywhere in what comes next.
    ended = os.pidfd_open(service.pid)
    assert not select.select([ended], [], [], chance.uniform(0, 0.05))[0]
    os.close(ended)
    service.daemon.process.kill()
    for line in load.stdout:
        # The last one may be cut off: it ends when the first client is refused.
        if line.endswith("\n"):
            book.read(line)
            acknowledged += json.loads(line)["at"] == "done"
    book.end()
    load.communicate()
    return acknowledged


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


def found() -> dict[str, Any]:
    """Return what there is, as `inspection` does in the machine."""
    command = [sys.executable, str(PROJECT / "tests" / "vm" / "inspection.py"), ""]
    output = subprocess.run(command, stdout=subprocess.PIPE, check=True).stdout
    (one,) = json.loads(output).values()
    return dict(one)
