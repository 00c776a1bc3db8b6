"""Those who are compared: each prepares copies of trees, and some keep snapshots."""

from __future__ import annotations

import os
import subprocess
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from pathlib import Path
from typing import Protocol

from bench.memory import Peak
from snapd_native.client import BlockingClient
from snapd_native.errors import Unavailable
from snapd_native.private import private_bus, private_daemon

LABELS = {"containerd.io/gc.root": "2024-01-01T00:00:00Z"}
"""Of every snapshot, with everybody; without it containerd would collect them."""

PATIENCE = 120.0
"""Seconds until something that does not come is given up."""


class Copier(Protocol):
    """Makes private copies of trees."""

    @property
    def name(self) -> str:
        """How it is called in the results."""
        ...

    def prepare(self, key: str, parent: str) -> Path:
        """Make a copy of the tree ``parent``, or an empty one; return where it lies."""
        ...

    def remove(self, key: str) -> None:
        """Forget a copy."""
        ...

    def settle(self) -> None:
        """Return when what was removed is deleted."""
        ...


class Keeper(Copier, Protocol):
    """A service that keeps snapshots; containerd's words are meant."""

    @property
    def memory(self) -> Peak:
        """The peak memory of its processes."""
        ...

    def view(self, key: str, parent: str) -> None:
        """Make a read-only view."""
        ...

    def commit(self, name: str, key: str) -> None:
        """Make the copy ``key`` a parent for others."""
        ...

    def stat(self, key: str) -> None:
        """Ask for one record."""
        ...

    def list(self) -> int:
        """Ask for all records; return how many there are."""
        ...

    def another(self) -> AbstractContextManager[Keeper]:
        """Connect once more, for another thread, which has to enter this itself."""
        ...


class Cp:
    """The command ``cp -a --reflink=auto``; what it copies lies in ``originals``."""

    name = "cp"

    def __init__(self, originals: Path, copies: Path) -> None:
        self._originals = originals
        self._copies = copies

    def prepare(self, key: str, parent: str) -> Path:
        """Copy a tree."""
        target = self._copies / key
        copy(f"{self._originals / parent}", target)
        return target

    def remove(self, key: str) -> None:
        """Delete a copy."""
        subprocess.run(["rm", "-rf", "--", self._copies / key], check=True)

    def settle(self) -> None:
        """Return: nothing is deferred."""


class Native:
    """Our service, by one connected client."""

    name = "snapd-native"

    def __init__(self, client: BlockingClient, memory: Peak) -> None:
        self._client = client
        self.memory = memory

    def prepare(self, key: str, parent: str) -> Path:
        """Call Prepare."""
        return Path(self._client.prepare(key, parent, LABELS).source)

    def view(self, key: str, parent: str) -> None:
        """Call View."""
        self._client.view(key, parent, LABELS)

    def commit(self, name: str, key: str) -> None:
        """Call Commit."""
        self._client.commit(name, key, LABELS)

    def stat(self, key: str) -> None:
        """Call Stat."""
        self._client.stat(key)

    def list(self) -> int:
        """Call List."""
        return len(self._client.list())

    def remove(self, key: str) -> None:
        """Call Remove."""
        self._client.remove(key)

    def settle(self) -> None:
        """Call Cleanup."""
        self._client.cleanup()

    @contextmanager
    def another(self) -> Iterator[Native]:
        """Connect once more."""
        with BlockingClient() as client:
            yield Native(client, self.memory)

    def keep_ready(self, name: str, clones: int) -> None:
        """Ask for standby clones of a committed snapshot, or for none."""
        label = "snapd-native.standby"
        self._client.update(name, {label: str(clones) if clones else ""}, [f"labels.{label}"])

    def await_ready(self, name: str) -> None:
        """Return when there are as many standby clones as were asked for.

        Raises:
            Unavailable: they do not come.
        """
        deadline = time.monotonic() + PATIENCE
        while (standby := self._client.standby(name)).ready != standby.wanted:
            if time.monotonic() > deadline:
                raise Unavailable(f"the standby clones of {name} do not come")
            time.sleep(0.02)


@contextmanager
def native(state: Path) -> Iterator[Native]:
    """Run our service on a bus of its own, and connect to it."""
    with ExitStack() as stack:
        address = stack.enter_context(private_bus())
        daemon = stack.enter_context(private_daemon(address, state))
        stack.callback(os.environ.pop, "DBUS_SYSTEM_BUS_ADDRESS", None)
        os.environ["DBUS_SYSTEM_BUS_ADDRESS"] = address
        client = stack.enter_context(BlockingClient())
        yield Native(client, Peak(daemon.process.pid))


def copy(source: str, target: Path) -> None:
    """Copy as cp does."""
    subprocess.run(["cp", "-a", "--reflink=auto", "--", source, target], check=True)
