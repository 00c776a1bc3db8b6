"""The Manager's methods for programs without an event loop."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from types import TracebackType
from typing import Self, TypeVar

from snapd_native.client.asynchronous import Client
from snapd_native.client.values import Job, Progress, Service, Standby
from snapd_native.model import (
    Finding,
    Info,
    Lifetime,
    Mount,
    Mounted,
    Usage,
)

_T = TypeVar("_T")


class BlockingClient:
    """`Client` for programs without an event loop; use it as ``with BlockingClient() as client``.

    Not for several threads: each takes a client of its own.
    """

    def __init__(self, instance: str = "") -> None:
        """Speak to an instance; see `Client`."""
        self._client = Client(instance)
        self._runner = asyncio.Runner()

    def __enter__(self) -> Self:
        """Connect to the system bus.

        Raises:
            Unavailable: it cannot be reached.
        """
        try:
            self._wait(self._client.__aenter__())
        except BaseException:
            self._runner.close()
            raise
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Disconnect."""
        self._wait(self._client.__aexit__(kind, error, trace))
        self._runner.close()

    def prepare(
        self,
        key: str,
        parent: str = "",
        labels: Mapping[str, str] | None = None,
        progress: Callable[[Progress], None] | None = None,
    ) -> Mount:
        """Make an active snapshot and return its mount.

        Where ``progress`` is given, it is told some times a second, and Ctrl-C cancels the work.
        """
        return self._wait(self._client.prepare(key, parent, labels, progress))

    def view(self, key: str, parent: str = "", labels: Mapping[str, str] | None = None) -> Mount:
        """Make a view and return its mount."""
        return self._wait(self._client.view(key, parent, labels))

    def commit(
        self,
        name: str,
        key: str,
        labels: Mapping[str, str] | None = None,
        parent: str = "",
        progress: Callable[[Progress], None] | None = None,
        digest: bool = False,
    ) -> None:
        """Make the active snapshot ``key`` the committed snapshot ``name``, durably.

        With ``digest`` one of its tree is recorded, for `verify`. For ``progress`` see `prepare`.
        """
        self._wait(self._client.commit(name, key, labels, parent, progress, digest))

    def mounts(self, key: str) -> Mount:
        """Return the mount of an active snapshot or a view."""
        return self._wait(self._client.mounts(key))

    def stat(self, key: str) -> Info:
        """Return a snapshot's record."""
        return self._wait(self._client.stat(key))

    def update(self, name: str, labels: Mapping[str, str], fieldpaths: Sequence[str] = ()) -> Info:
        """Set labels and return the record as it is then."""
        return self._wait(self._client.update(name, labels, fieldpaths))

    def usage(self, key: str) -> Usage:
        """Return what a snapshot takes."""
        return self._wait(self._client.usage(key))

    def remove(self, key: str) -> None:
        """Forget a snapshot; its data is deleted in the background."""
        self._wait(self._client.remove(key))

    def cleanup(self) -> None:
        """Return when every deferred deletion is done."""
        self._wait(self._client.cleanup())

    def check(self) -> Sequence[Finding]:
        """Return what is wrong with records, directories and mounts; nothing is changed."""
        return self._wait(self._client.check())

    def repair(self) -> Sequence[Finding]:
        """Mend what can be mended without a loss or a guess; return what was wrong of that."""
        return self._wait(self._client.repair())

    def verify(self, name: str, progress: Callable[[Progress], None] | None = None) -> str:
        """Compare a committed snapshot's tree with the digest that Commit recorded; return that.

        For ``progress`` see `prepare`.
        """
        return self._wait(self._client.verify(name, progress))

    def standby(self, name: str) -> Standby:
        """Return how many standby clones of a snapshot are complete, and how many it wants."""
        return self._wait(self._client.standby(name))

    def mount(
        self,
        key: str,
        target: str = "",
        read_only: bool | None = None,
        lifetime: Lifetime = Lifetime.PERSISTENT,
    ) -> str:
        """Mount an active snapshot or a view on a directory, or on one that is made for it.

        Return where. With the lifetime ``client`` it stands as long as this client is connected.
        """
        return self._wait(self._client.mount(key, target, read_only, lifetime))

    def unmount(self, target: str, lazy: bool = False) -> None:
        """Take away what `mount` has mounted on ``target``, if ``lazy`` also while it is in use."""
        self._wait(self._client.unmount(target, lazy))

    def list_mounts(self, key: str = "") -> Sequence[Mounted]:
        """Return what `mount` has mounted and still stands, of one snapshot or of all."""
        return self._wait(self._client.list_mounts(key))

    def open_tree(self, key: str, read_only: bool | None = None) -> int:
        """Return a mount of an active snapshot or a view that is attached nowhere yet.

        The fd is the caller's, for move_mount(2) in any mount namespace.
        """
        return self._wait(self._client.open_tree(key, read_only))

    def jobs(self) -> Sequence[Job]:
        """Return what the service is doing that takes long."""
        return self._wait(self._client.jobs())

    def progress(self, job: int) -> Progress:
        """Return how far a job is."""
        return self._wait(self._client.progress(job))

    def cancel(self, job: int) -> None:
        """Have a job undone, and return when it is."""
        self._wait(self._client.cancel(job))

    def service(self) -> Service:
        """Return what the service says of itself."""
        return self._wait(self._client.service())

    def list(
        self, filters: Sequence[str] = (), after: str = "", limit: int | None = None
    ) -> list[Info]:
        """Return a page of snapshots, by name in byte order."""
        return self._wait(self._client.list(filters, after, limit))

    def walk(self, filters: Sequence[str] = ()) -> Iterator[Info]:
        """Iterate over all snapshots that match, by name in byte order."""
        infos = self._client.walk(filters)
        while (info := self._wait(anext(infos, None))) is not None:
            yield info

    def _wait(self, coming: Awaitable[_T]) -> _T:
        async def wait() -> _T:
            return await coming

        return self._runner.run(wait())
