"""A load that a failure interrupts at a random moment, and the contents after it."""

from __future__ import annotations

import json
import os
import select
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import IO, Any

from tests.support import PROJECT
from tests.support.oracle import Oracle
from tests.support.service import Service


def interrupt_load(
    oracle: Oracle,
    service: Service,
    load_input: str,
    commits: int,
    seconds: float,
    end: Callable[[], None],
) -> int:
    """Run a load, and call ``end`` some ``seconds`` after ``commits`` acknowledged commits.

    The load ends when a call fails because of ``end``. Return the number of acknowledged calls.
    """
    enough = oracle.acknowledged() + commits
    acknowledged = 0
    with run_load(load_input) as lines:
        while oracle.acknowledged() < enough:
            line = lines.readline()
            assert line, "the load has ended by itself"
            oracle.read(line)
            acknowledged += json.loads(line)["at"] == "done"
        # Tests choose ``seconds`` at random, so that ``end`` interrupts any step.
        ended = os.pidfd_open(service.pid)
        assert not select.select([ended], [], [], seconds)[0]
        os.close(ended)
        end()
        for line in lines:
            # The load ends when the first call fails, so the last line may be incomplete.
            if line.endswith("\n"):
                oracle.read(line)
                acknowledged += json.loads(line)["at"] == "done"
    oracle.end()
    return acknowledged


@contextmanager
def run_load(load_input: str) -> Iterator[IO[str]]:
    """Run the clients of `storm_load`, and yield their output."""
    with subprocess.Popen(
        [sys.executable, PROJECT / "tests" / "support" / "storm_load.py"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    ) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        try:
            print(load_input, file=process.stdin, flush=True)
            yield process.stdout
        finally:
            process.kill()


def inspect_service() -> dict[str, Any]:
    """Return the contents of the default instance, as `inspection` prints them."""
    command = [sys.executable, str(PROJECT / "tests" / "support" / "inspection.py"), ""]
    output = subprocess.run(command, stdout=subprocess.PIPE, check=True).stdout
    (one,) = json.loads(output).values()
    return dict(one)
