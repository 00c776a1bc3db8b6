"""Acknowledged changes survive kills of the daemon at random instants under a mixed load.

``STORM_KILLS`` is the number of kills on each file system. The seed of a run repeats its choices,
but not the instants.
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
from tests.support.oracle import Oracle
from tests.support.service import run_daemon
from tests.support.storm import inspect_service, interrupt_load

KILLS = int(os.environ.get("STORM_KILLS", "20"))
CLIENTS = 8


@pytest.mark.timeout(300 + 20 * KILLS)
@pytest.mark.long
def test_acknowledged_changes_survive_kills_at_random_instants(
    on_bus: str, scratch: Path, run_seed: int
) -> None:
    chance = random.Random(run_seed)
    oracle = Oracle(("",))
    (expected,) = oracle.instances.values()
    total = 0
    for number in range(KILLS):
        if chance.random() < 0.1:
            kill_while_it_starts(on_bus, scratch / "state", chance.uniform(0, 0.8))
        with run_daemon(on_bus, scratch / "state", status=-signal.SIGKILL) as service:
            differences = expected.compare(inspect_service())
            assert differences == [], f"after kill {number}\n{oracle.lines_about(differences)}"
            order = oracle.load_input(number, CLIENTS)
            commits, seconds = chance.randrange(1, 12), chance.uniform(0, 0.05)
            total += interrupt_load(
                oracle, service, order, commits, seconds, service.daemon.process.kill
            )
    with run_daemon(on_bus, scratch / "state"):
        differences = expected.compare(inspect_service())
        assert differences == [], oracle.lines_about(differences)
        with BlockingClient() as client:
            assert client.check() == []
    print(f"{KILLS} kills, {total} calls acknowledged, {expected.acknowledged} of them commits")
    # With fewer commits the kills could lose nothing.
    assert expected.acknowledged >= KILLS


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
