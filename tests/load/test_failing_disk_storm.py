"""Acknowledged commits survive disk failures at random instants under a mixed load.

``FAILURES`` is the number of failures on each file system. The seed of a run repeats its choices,
but not the instants.
"""

from __future__ import annotations

import os
import random
import signal
import sqlite3
from collections.abc import Iterator
from contextlib import closing, suppress
from pathlib import Path

import pytest

from snapd_native.client import BlockingClient
from snapd_native.errors import DataLoss, ResourceExhausted
from tests.support.failing_disk import KINDS, FailingDisk, failing_disk
from tests.support.oracle import InstanceOracle, Oracle
from tests.support.service import run_daemon
from tests.support.storm import inspect_service, interrupt_load

FAILURES = int(os.environ.get("FAILURES", "2"))
CLIENTS = 4


@pytest.fixture(params=KINDS)
def disk(request: pytest.FixtureRequest, loop_directory: Path) -> Iterator[FailingDisk]:
    with failing_disk(request.param, loop_directory) as made:
        yield made


@pytest.mark.timeout(300 + 30 * FAILURES)
@pytest.mark.long
def test_acknowledged_commits_survive_random_disk_failures(
    on_bus: str, disk: FailingDisk, run_seed: int
) -> None:
    chance = random.Random(run_seed)
    state = disk.root / "state"
    oracle = Oracle(("",))
    (expected,) = oracle.instances.values()
    for number in range(FAILURES):
        is_killed = chance.random() < 0.5
        with run_daemon(on_bus, state, status=-signal.SIGKILL if is_killed else 0) as service:
            assert expected.compare(inspect_service()) == [], f"after failure {number}"
            disk.trim()
            order = oracle.load_input(number, CLIENTS)
            commits, seconds = chance.randrange(3, 15), chance.uniform(0, 0.05)
            interrupt_load(oracle, service, order, commits, seconds, disk.fail)
            check_errors(expected, number)
            if is_killed:
                service.daemon.process.kill()
        disk.mount_again(heal=True)
        end_boot(state)
    with run_daemon(on_bus, state):
        assert expected.compare(inspect_service()) == []
        with BlockingClient() as client:
            assert client.check() == []
            client.prepare("afterwards")
            client.commit("all is well", "afterwards")
    print(f"{FAILURES} failures, {expected.acknowledged} commits acknowledged")
    # With fewer commits the failures could lose nothing.
    assert expected.acknowledged >= FAILURES


def check_errors(expected: InstanceOracle, number: int) -> None:
    """Check that reads succeed, and that changes fail only with errors of the contract."""
    with BlockingClient() as client:
        for info in list(client.walk()):
            client.stat(info.name)
        for attempt in range(3):
            key, name = f"doomed {number} {attempt}", f"unheard of {number} {attempt}"
            with suppress(DataLoss, ResourceExhausted):
                expected.begin({"operation": "prepare", "key": key, "parent": ""})
                client.prepare(key)
                call = {"operation": "commit", "key": key, "name": name, "files": {}}
                expected.begin(call)
                client.commit(name, key)
                expected.done(call)


def end_boot(state: Path) -> None:
    """Make the records those of an earlier boot, as if the machine had lost its memory."""
    with closing(sqlite3.connect(state / "metadata.db")) as db, db:
        db.execute("UPDATE snapshots SET boot = 'another' WHERE boot IS NOT NULL")
