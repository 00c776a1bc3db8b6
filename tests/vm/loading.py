"""A load in the guest, and whether the machine stands by what it was told."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable

from tests.support import PROJECT
from tests.support.oracle import Book
from tests.vm.guest import PATIENCE, Guest

WORKERS = 3
"""Clients of each instance."""


class Load:
    """The clients in the guest, and what they tell."""

    def __init__(self, guest: Guest, book: Book, seed: int, patient: bool = False) -> None:
        """Start them; those that are patient go on when a disk has failed or is full."""
        self._book = book
        self._lock = threading.Lock()
        guest.run("cat >/run/load.py", stdin=(PROJECT / "tests/support/storm_load.py").read_text())
        self._process = guest.start("python3 -u /run/load.py")
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()
        assert self._process.stdin is not None
        self._process.stdin.write(book.order(seed, WORKERS, patient) + "\n")
        self._process.stdin.flush()

    def _read(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            # The last one may be cut off too.
            if line.endswith("\n"):
                with self._lock:
                    self._book.read(line)

    def until_acknowledged(self, commits: int) -> None:
        """Wait until each instance has acknowledged so many commits in all."""
        self.until(lambda: self._book.acknowledged() >= commits)

    def until(self, condition: Callable[[], bool]) -> None:
        """Wait until what was told is such that a condition holds."""
        end = time.monotonic() + PATIENCE
        while True:
            with self._lock:
                if condition():
                    return
            self.check()
            assert time.monotonic() < end, "the load gets nothing done"
            time.sleep(0.02)

    def doubt(self) -> None:
        """Take it that what is under way may have happened, whatever will be answered."""
        with self._lock:
            self._book.doubt()

    def check(self) -> None:
        """Fail if it has ended: it is to run until it is ended."""
        if self._process.poll() is not None:
            assert self._process.stderr is not None
            raise AssertionError(f"the load has ended: {self._process.stderr.read()}")

    def end(self) -> None:
        """Hear what has been sent, and forget the rest."""
        self._process.kill()
        self._reader.join(30)
        self._process.wait()
        self._book.end()


def troubles(guest: Guest, book: Book) -> list[str]:
    """Compare what is there with what was promised, and ask the service itself."""
    program = (PROJECT / "tests/support/inspection.py").read_text()
    out = guest.run(f"python3 - {' '.join(book.ledgers)}", stdin=program)
    found = json.loads(out)
    listed = []
    for instance, ledger in book.ledgers.items():
        listed += [f"{instance}: {trouble}" for trouble in ledger.compare(found[instance])]
        checked = guest.attempt(f"snapd-native --instance {instance} check")
        if checked.returncode != 0 or checked.stdout:
            listed.append(f"{instance}: check: {checked.stdout}{checked.stderr}")
    return listed
