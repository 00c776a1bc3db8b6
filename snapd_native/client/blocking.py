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

    It is not thread-safe: use one client for each thread.
    """

    def __init__(self, instance: str = "") -> None:
        """Use an instance of the service; see `Client`."""
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
        """Create an active snapshot and return its mount.

        ``progress`` is called some times a second. With it, Ctrl-C cancels the work.
        """
        return self._wait(self._client.prepare(key, parent, labels, progress))

    def view(self, key: str, parent: str = "", labels: Mapping[str, str] | None = None) -> Mount:
        """Create a view and return its mount."""
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
        """Turn the active snapshot ``key`` into the committed snapshot ``name``, durably.

        With ``digest`` the digest of the tree is recorded for `verify`. For ``progress`` see
        `prepare`.
        """
        self._wait(self._client.commit(name, key, labels, parent, progress, digest))

    def mounts(self, key: str) -> Mount:
        """Return the mount of an active snapshot or a view."""
        return self._wait(self._client.mounts(key))

    def stat(self, key: str) -> Info:
        """Return the record of a snapshot."""
        return self._wait(self._client.stat(key))

    def update(self, name: str, labels: Mapping[str, str], fieldpaths: Sequence[str] = ()) -> Info:
        """Set labels and return the new record."""
        return self._wait(self._client.update(name, labels, fieldpaths))

    def usage(self, key: str) -> Usage:
        """Return the usage of a snapshot."""
        return self._wait(self._client.usage(key))

    def background_usage(self, key: str) -> Usage:
        """Return the usage of a snapshot, measured at idle priority of processor and disk."""
        return self._wait(self._client.background_usage(key))

    def remove(self, key: str) -> None:
        """Remove a snapshot; its data is deleted in the background."""
        self._wait(self._client.remove(key))

    def cleanup(self) -> None:
        """Wait until all pending deletions are done."""
        self._wait(self._client.cleanup())

    def check(self) -> Sequence[Finding]:
        """Return the faults of records, directories and mounts; nothing is changed."""
        return self._wait(self._client.check())

    def repair(self) -> Sequence[Finding]:
        """Repair what can be repaired without loss or guess; return what was repaired."""
        return self._wait(self._client.repair())

    def verify(self, name: str, progress: Callable[[Progress], None] | None = None) -> str:
        """Compare the tree of a committed snapshot with the recorded digest; return that.

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
        """Mount an active snapshot or a view, and return the target.

        If the target is empty, a directory is created for the mount. A mount with the lifetime
        ``client`` lasts as long as this client is connected.
        """
        return self._wait(self._client.mount(key, target, read_only, lifetime))

    def unmount(self, target: str, lazy: bool = False) -> None:
        """Unmount what `mount` has mounted on ``target``; with ``lazy`` also if it is in use."""
        self._wait(self._client.unmount(target, lazy))

    def list_mounts(self, key: str = "") -> Sequence[Mounted]:
        """Return the mounts of one snapshot or of all."""
        return self._wait(self._client.list_mounts(key))

    def open_tree(self, key: str, read_only: bool | None = None) -> int:
        """Return a detached mount of an active snapshot or a view.

        The caller closes the fd, and can attach it in any mount namespace with move_mount(2).
        """
        return self._wait(self._client.open_tree(key, read_only))

    def jobs(self) -> Sequence[Job]:
        """Return the jobs of the service."""
        return self._wait(self._client.jobs())

    def progress(self, job: int) -> Progress:
        """Return the progress of a job."""
        return self._wait(self._client.progress(job))

    def cancel(self, job: int) -> None:
        """Cancel a job, and wait until its work is undone."""
        self._wait(self._client.cancel(job))

    def service(self) -> Service:
        """Return the properties of the service."""
        return self._wait(self._client.service())

    def list(
        self, filters: Sequence[str] = (), after: str = "", limit: int | None = None
    ) -> list[Info]:
        """Return a page of snapshots, in byte order of names."""
        return self._wait(self._client.list(filters, after, limit))

    def walk(self, filters: Sequence[str] = ()) -> Iterator[Info]:
        """Iterate over all matching snapshots, in byte order of names."""
        infos = self._client.walk(filters)
        while (info := self._wait(anext(infos, None))) is not None:
            yield info

    def _wait(self, coming: Awaitable[_T]) -> _T:
        async def wait() -> _T:
            return await coming

        return self._runner.run(wait())
