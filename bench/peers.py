"""The peers that are compared: all copy trees, and some keep snapshots."""

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
"""Labels of every snapshot. Without them containerd would delete the snapshots."""

PATIENCE = 120.0
"""Seconds to wait before giving up."""


class Copier(Protocol):
    """Makes private copies of trees."""

    @property
    def name(self) -> str:
        """Its name in the results."""
        ...

    def prepare(self, key: str, parent: str) -> Path:
        """Copy the tree ``parent``, or make an empty tree; return the path."""
        ...

    def remove(self, key: str) -> None:
        """Remove a copy."""
        ...

    def settle(self) -> None:
        """Wait until removed copies are deleted."""
        ...


class Keeper(Copier, Protocol):
    """A service that keeps snapshots, in containerd's terms."""

    @property
    def memory(self) -> Peak:
        """The peak memory of its processes."""
        ...

    def view(self, key: str, parent: str) -> None:
        """Make a read-only view."""
        ...

    def commit(self, name: str, key: str) -> None:
        """Commit the copy ``key``, so that it can be a parent."""
        ...

    def stat(self, key: str) -> None:
        """Read one record."""
        ...

    def list(self) -> int:
        """Read all records; return the number."""
        ...

    def another(self) -> AbstractContextManager[Keeper]:
        """Open another connection for another thread, which enters it."""
        ...


class Cp:
    """The command ``cp -a --reflink=auto`` on the trees in ``originals``."""

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
        """Do nothing: cp has no pending deletions."""


class Native:
    """The service itself, by one connected client."""

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
        """Open another connection."""
        with BlockingClient() as client:
            yield Native(client, self.memory)

    def keep_ready(self, name: str, clones: int) -> None:
        """Set the number of standby clones of a committed snapshot."""
        label = "snapd-native.standby"
        self._client.update(name, {label: str(clones) if clones else ""}, [f"labels.{label}"])

    def await_ready(self, name: str) -> None:
        """Wait until all standby clones are complete.

        Raises:
            Unavailable: they are not made in time.
        """
        deadline = time.monotonic() + PATIENCE
        while (standby := self._client.standby(name)).ready != standby.wanted:
            if time.monotonic() > deadline:
                raise Unavailable(f"the standby clones of {name} do not come")
            time.sleep(0.02)


@contextmanager
def native(state: Path) -> Iterator[Native]:
    """Run the service itself on a private bus, and connect to it."""
    with ExitStack() as stack:
        address = stack.enter_context(private_bus())
        daemon = stack.enter_context(private_daemon(address, state))
        stack.callback(os.environ.pop, "DBUS_SYSTEM_BUS_ADDRESS", None)
        os.environ["DBUS_SYSTEM_BUS_ADDRESS"] = address
        client = stack.enter_context(BlockingClient())
        yield Native(client, Peak(daemon.process.pid))


def copy(source: str, target: Path) -> None:
    """Copy with cp."""
    subprocess.run(["cp", "-a", "--reflink=auto", "--", source, target], check=True)
