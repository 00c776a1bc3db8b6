"""A load in the guest, and a check that all acknowledged changes are kept."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable

from tests.support import PROJECT
from tests.support.oracle import Oracle
from tests.vm.guest import STEP_TIMEOUT, Guest

WORKERS = 3
"""The number of clients of each instance."""


class Load:
    """The clients in the guest, and a thread that reads their reports."""

    def __init__(self, guest: Guest, oracle: Oracle, seed: int, patient: bool = False) -> None:
        """Start the clients; ``patient`` ones continue when a disk has failed or is full."""
        self._oracle = oracle
        self._lock = threading.Lock()
        guest.run("cat >/run/load.py", stdin=(PROJECT / "tests/support/storm_load.py").read_text())
        self._process = guest.start("python3 -u /run/load.py")
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()
        assert self._process.stdin is not None
        self._process.stdin.write(oracle.load_input(seed, WORKERS, patient) + "\n")
        self._process.stdin.flush()

    def _read(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            # The last line can be incomplete.
            if line.endswith("\n"):
                with self._lock:
                    self._oracle.read(line)

    def until_acknowledged(self, commits: int) -> None:
        """Wait until each instance has acknowledged ``commits`` commits in all."""
        self.until(lambda: self._oracle.acknowledged() >= commits)

    def until(self, condition: Callable[[], bool]) -> None:
        """Wait until the reports of the clients make ``condition`` true."""
        end = time.monotonic() + STEP_TIMEOUT
        while True:
            with self._lock:
                if condition():
                    return
            self.check()
            assert time.monotonic() < end, "the load gets nothing done"
            time.sleep(0.02)

    def accept_open_calls(self) -> None:
        """Accept that open calls have happened, whatever their answers are."""
        with self._lock:
            self._oracle.accept_open_calls()

    def check(self) -> None:
        """Fail if the load has ended before the call of `end`."""
        if self._process.poll() is not None:
            assert self._process.stderr is not None
            raise AssertionError(f"the load has ended: {self._process.stderr.read()}")

    def end(self) -> None:
        """Kill the clients, read the reports that they have sent, and forget the open calls."""
        self._process.kill()
        self._reader.join(30)
        self._process.wait()
        self._oracle.end()


def differences(guest: Guest, oracle: Oracle) -> list[str]:
    """Return all differences from the acknowledged changes, and all findings of Check."""
    program = (PROJECT / "tests/support/inspection.py").read_text()
    out = guest.run(f"python3 - {' '.join(oracle.instances)}", stdin=program)
    found = json.loads(out)
    listed = []
    for instance, expected in oracle.instances.items():
        listed += [f"{instance}: {difference}" for difference in expected.compare(found[instance])]
        checked = guest.attempt(f"snapd-native --instance {instance} check")
        if checked.returncode != 0 or checked.stdout:
            listed.append(f"{instance}: check: {checked.stdout}{checked.stderr}")
    return listed
