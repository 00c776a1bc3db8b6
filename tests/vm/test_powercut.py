"""Power cuts under load: what was acknowledged stands, and the rest is whole or not there."""

from __future__ import annotations

import json
import random
import threading
import time

import pytest

from tests.vm.guest import HERE, Guest, VolatileDisks, clear
from tests.vm.ledger import Book

INSTANCES = ("ext4", "xfs")
WORKERS = 3
UNITS = " ".join(f"snapd-native@{instance}" for instance in INSTANCES)
NO_SYNC = "SystemCallFilter=~fsync:0 fdatasync:0 syncfs:0 sync:0 sync_file_range:0 msync:0"
"""They do nothing and return 0."""


class Load:
    """The clients in the guest, and what they tell."""

    def __init__(self, guest: Guest, book: Book, seed: int) -> None:
        self._book = book
        self._lock = threading.Lock()
        self.failure = ""
        guest.run("cat >/run/load.py", stdin=(HERE / "load.py").read_text())
        self._process = guest.start("python3 -u /run/load.py")
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()
        assert self._process.stdin is not None
        self._process.stdin.write(book.order(seed, WORKERS) + "\n")
        self._process.stdin.flush()

    def _read(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            # The last one may be cut off too.
            if line.endswith("\n"):
                with self._lock:
                    self._book.read(line)

    def until_acknowledged(self, commits: int, limit: float = 90) -> None:
        """Wait until each instance has acknowledged so many commits in all."""
        end = time.monotonic() + limit
        while True:
            with self._lock:
                if self._book.acknowledged() >= commits:
                    return
            self.check()
            assert time.monotonic() < end, "the load gets nothing done"
            time.sleep(0.02)

    def check(self) -> None:
        """Fail if it has ended: it is to run until the power is cut."""
        if self._process.poll() is not None:
            assert self._process.stderr is not None
            raise AssertionError(f"the load has ended: {self._process.stderr.read()}")

    def end(self) -> None:
        """Hear what has been sent, and forget the rest."""
        self._process.kill()
        self._reader.join(30)
        self._process.wait()
        self._book.end()


def cut(guest: Guest, disks: VolatileDisks, load: Load) -> str:
    load.check()
    guest.power_cut()
    load.end()
    return ", ".join(
        f"{name}: of {loss.unflushed} unflushed writes {loss.kept} kept, {loss.torn} torn"
        for name, loss in zip(INSTANCES, disks.losses(), strict=True)
    )


def troubles(guest: Guest, book: Book) -> list[str]:
    """Compare what is there with what was promised, and ask the service itself."""
    program = (HERE / "inspection.py").read_text()
    out = guest.run(f"python3 - {' '.join(INSTANCES)}", stdin=program, limit=300)
    found = json.loads(out)
    listed = []
    for instance, ledger in book.ledgers.items():
        listed += [f"{instance}: {trouble}" for trouble in ledger.compare(found[instance])]
        checked = guest.attempt(f"snapd-native --instance {instance} check", limit=240)
        if checked.returncode != 0 or checked.stdout:
            listed.append(f"{instance}: check: {checked.stdout}{checked.stderr}")
    return listed


@pytest.mark.timeout(3600)
def test_what_was_acknowledged_survives(machine: Guest, request: pytest.FixtureRequest) -> None:
    seed = int(time.time())
    chance = random.Random(seed)
    clear(machine, *INSTANCES)
    book = Book(INSTANCES)
    with machine.volatile_disks() as disks:
        for number in range(request.config.getoption("--cuts")):
            begin = time.monotonic()
            done = book.acknowledged()
            load = Load(machine, book, seed + number)
            load.until_acknowledged(done + 2)
            time.sleep(chance.uniform(0, 5))
            loss = cut(machine, disks, load)
            machine.power_on()
            listed = troubles(machine, book)
            print(
                f"cut {number + 1}: {book.acknowledged()} commits each, at least; {loss};"
                f" {time.monotonic() - begin:.0f} s",
                flush=True,
            )
            assert listed == []
        clear(machine, *INSTANCES)


@pytest.mark.timeout(1200)
def test_without_syncs_something_is_lost(machine: Guest) -> None:
    """The test above could fail."""
    clear(machine, *INSTANCES)
    drop_in = "/etc/systemd/system/snapd-native@.service.d/no-sync.conf"
    with machine.volatile_disks() as disks:
        try:
            machine.run(f"""
                mkdir -p $(dirname {drop_in})
                printf '[Service]\\n{NO_SYNC}\\n' >{drop_in}
                systemctl daemon-reload
                systemctl restart {UNITS}
                sync""")
            book = Book(INSTANCES)
            load = Load(machine, book, seed=0)
            load.until_acknowledged(4)
            print(cut(machine, disks, load))
            machine.power_on(whole=False)
            listed = troubles(machine, book)
            print("\n".join(listed[:10]))
            assert any(" is lost" in one or " differs" in one or "error" in one for one in listed)
        finally:
            machine.run(f"""
                rm -f {drop_in}
                systemctl daemon-reload
                systemctl stop {UNITS}
                rm -rf /srv/ext4/snapd-native /srv/xfs/snapd-native
                systemctl reset-failed
                systemctl start {UNITS}""")
