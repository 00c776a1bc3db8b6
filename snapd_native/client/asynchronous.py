"""The Manager's methods as coroutines."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import asynccontextmanager, suppress
from types import TracebackType
from typing import Self

from dbus_next.message import Message
from dbus_next.signature import Variant

from snapd_native.client.signals import changes_of, signals
from snapd_native.client.values import Job, Progress, Service, Standby
from snapd_native.errors import (
    InvalidArgument,
    NotFound,
    ResourceExhausted,
    SnapdError,
    Unavailable,
)
from snapd_native.model import (
    DIGEST_LABEL,
    Change,
    Finding,
    Info,
    Lifetime,
    Mount,
    Mounted,
    Usage,
)
from snapd_native.tasks import undisturbed
from snapd_native.wire.connection import Connection
from snapd_native.wire.names import (
    JOB,
    JOB_PATH,
    MANAGER,
    OBJECT_PATH,
    PROPERTIES,
    bus_name,
    error_from,
)
from snapd_native.wire.values import (
    Body,
    finding_from_wire,
    info_from_wire,
    mount_from_wire,
    mounted_from_wire,
)

PAGE = 1000
"""Snapshots that `Client.walk` gets at once; fewer if their records are too large."""


class Client:
    """The Manager's methods as coroutines. Use it as ``async with Client() as client``."""

    def __init__(self, instance: str = "") -> None:
        """Use an instance of the service; ``""`` is the service itself.

        Raises:
            InvalidArgument: the name of the instance is invalid.
        """
        self._name = bus_name(instance)
        self._connection: Connection | None = None

    async def __aenter__(self) -> Self:
        """Connect to the system bus.

        Raises:
            Unavailable: it cannot be reached.
        """
        self._connection = Connection()
        await self._connection.open()
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Disconnect."""
        if self._connection is not None:
            self._connection.disconnect()
            self._connection = None

    @property
    def is_connected(self) -> bool:
        """Whether the connection to the bus is there; a lost one does not come back."""
        return self._connection is not None and self._connection.connected

    async def prepare(
        self,
        key: str,
        parent: str = "",
        labels: Mapping[str, str] | None = None,
        progress: Callable[[Progress], None] | None = None,
    ) -> Mount:
        """Create an active snapshot and return its mount.

        ``progress`` is called some times a second. With it, a cancellation of this coroutine, or
        Ctrl-C in a `BlockingClient`, also cancels the work.
        """
        if progress is None:
            return await self._create("Prepare", key, parent, labels)
        await self._work(progress, "PrepareJob", "ssa{sv}", key, parent, _labels(labels))
        return await self.mounts(key)

    async def view(
        self, key: str, parent: str = "", labels: Mapping[str, str] | None = None
    ) -> Mount:
        """Create a view and return its mount."""
        return await self._create("View", key, parent, labels)

    async def commit(
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
        options = _labels(labels)
        if parent:
            options["parent"] = Variant("s", parent)
        if digest:
            options["digest"] = Variant("b", True)
        if progress is None:
            await self._call("Commit", "ssa{sv}", name, key, options)
        else:
            await self._work(progress, "CommitJob", "ssa{sv}", name, key, options)

    async def mounts(self, key: str) -> Mount:
        """Return the mount of an active snapshot or a view."""
        (mounts,) = await self._call("Mounts", "s", key)
        return mount_from_wire(mounts[0])

    async def stat(self, key: str) -> Info:
        """Return the record of a snapshot."""
        (info,) = await self._call("Stat", "s", key)
        return info_from_wire(info)

    async def update(
        self, name: str, labels: Mapping[str, str], fieldpaths: Sequence[str] = ()
    ) -> Info:
        """Set labels and return the new record."""
        (info,) = await self._call("Update", "sa{ss}as", name, dict(labels), list(fieldpaths))
        return info_from_wire(info)

    async def usage(self, key: str) -> Usage:
        """Return the usage of a snapshot."""
        size, inodes = await self._call("Usage", "s", key)
        return Usage(size, inodes)

    async def background_usage(self, key: str) -> Usage:
        """Return the usage of a snapshot, measured at idle priority of processor and disk."""
        size, inodes = await self._call("BackgroundUsage", "sa{sv}", key, {})
        return Usage(size, inodes)

    async def list(
        self, filters: Sequence[str] = (), after: str = "", limit: int | None = None
    ) -> list[Info]:
        """Return a page of snapshots, in byte order of names; `walk` reads all pages."""
        options: dict[str, Variant] = {}
        if after:
            options["after"] = Variant("s", after)
        if limit is not None:
            if not 0 <= limit < 1 << 32:
                raise InvalidArgument(f"invalid limit {limit}: give a positive number")
            options["limit"] = Variant("u", limit)
        (infos,) = await self._call("List", "asa{sv}", [*filters], options)
        return [info_from_wire(info) for info in infos]

    async def walk(self, filters: Sequence[str] = ()) -> AsyncIterator[Info]:
        """Iterate over all matching snapshots, in byte order of names."""
        after, limit = "", PAGE
        while True:
            try:
                page = await self.list(filters, after, limit)
            except ResourceExhausted:
                # The page is too large for a message.
                if limit == 1:
                    raise
                limit //= 2
                continue
            for info in page:
                yield info
            if len(page) < limit:
                return
            after = page[-1].name

    async def remove(self, key: str) -> None:
        """Remove a snapshot; its data is deleted in the background."""
        await self._call("Remove", "sa{sv}", key, {})

    async def cleanup(self) -> None:
        """Wait until all pending deletions are done."""
        await self._call("Cleanup", "a{sv}", {})

    async def check(self) -> Sequence[Finding]:
        """Return the faults of records, directories and mounts; nothing is changed."""
        (rows,) = await self._call("Check", "a{sv}", {})
        return [finding_from_wire(row) for row in rows]

    async def repair(self) -> Sequence[Finding]:
        """Repair what can be repaired without loss or guess; return what was repaired."""
        (rows,) = await self._call("Repair", "a{sv}", {})
        return [finding_from_wire(row) for row in rows]

    async def verify(self, name: str, progress: Callable[[Progress], None] | None = None) -> str:
        """Compare the tree of a committed snapshot with the recorded digest; return that.

        For ``progress`` see `prepare`.
        """
        if progress is None:
            (digest,) = await self._call("Verify", "sa{sv}", name, {})
            return str(digest)
        # The job has no result; the recorded digest is in the label.
        info = await self.stat(name)
        await self._work(progress, "VerifyJob", "sa{sv}", name, {})
        return info.labels.get(DIGEST_LABEL, "")

    async def standby(self, name: str) -> Standby:
        """Return how many standby clones of a snapshot are complete, and how many it wants."""
        return Standby(*await self._call("Standby", "s", name))

    async def mount(
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
        options = {"lifetime": Variant("s", lifetime.value), **_read_only(read_only)}
        (mounted_on,) = await self._call("Mount", "ssa{sv}", key, target, options)
        return str(mounted_on)

    async def unmount(self, target: str, lazy: bool = False) -> None:
        """Unmount what `mount` has mounted on ``target``; with ``lazy`` also if it is in use."""
        await self._call("Unmount", "sa{sv}", target, {"lazy": Variant("b", lazy)})

    async def list_mounts(self, key: str = "") -> Sequence[Mounted]:
        """Return the mounts of one snapshot or of all."""
        (rows,) = await self._call("ListMounts", "s", key)
        return [mounted_from_wire(row) for row in rows]

    async def open_tree(self, key: str, read_only: bool | None = None) -> int:
        """Return a detached mount of an active snapshot or a view.

        The caller closes the fd, and can attach it in any mount namespace with move_mount(2).
        """
        (fd,) = await self._call("OpenTree", "sa{sv}", key, _read_only(read_only))
        return int(fd)

    async def jobs(self) -> Sequence[Job]:
        """Return the jobs of the service."""
        (rows,) = await self._call("ListJobs", "")
        return [Job(id_, operation, key, uid) for id_, operation, key, uid, _ in rows]

    async def progress(self, job: int) -> Progress:
        """Return the progress of a job."""
        return _progress(await self._properties(f"{JOB_PATH}/{job}", JOB))

    async def cancel(self, job: int) -> None:
        """Cancel a job, and wait until its work is undone."""
        await self._connected().request(self._name, f"{JOB_PATH}/{job}", JOB, "Cancel")

    async def service(self) -> Service:
        """Return the properties of the service."""
        values = await self._properties(OBJECT_PATH, MANAGER)
        return Service(
            values["Version"].value,
            values["StateDirectory"].value,
            values["FilesystemType"].value,
            values["Reflink"].value,
        )

    @asynccontextmanager
    async def changes(self) -> AsyncIterator[AsyncIterator[Change]]:
        """Yield all changes from now on, in order.

        The iterator raises Unavailable when the service has ended or the bus is lost.
        """
        rule = f"interface='{MANAGER}',path='{OBJECT_PATH}'"
        async with signals(self._connected(), self._name, rule) as arrived:
            yield changes_of(arrived)

    async def _work(
        self,
        progress: Callable[[Progress], None],
        member: str,
        signature: str,
        *arguments: object,
    ) -> None:
        """Run a job, and wait until its work is done."""
        removed = f"interface='{MANAGER}',path='{OBJECT_PATH}',member='JobRemoved'"
        changed = f"interface='{PROPERTIES}',path_namespace='{JOB_PATH}'"
        async with signals(self._connected(), self._name, removed, changed) as arrived:
            begun = asyncio.ensure_future(self._call(member, signature, *arguments))
            try:
                (path,) = await undisturbed(begun)
                await self._watch(path, arrived, progress)
            except asyncio.CancelledError:
                with suppress(SnapdError):
                    (path,) = await begun
                    await self._connected().request(self._name, path, JOB, "Cancel")
                raise

    async def _watch(
        self, path: str, arrived: AsyncIterator[Message], progress: Callable[[Progress], None]
    ) -> None:
        """Wait until a job is done, and raise its error."""
        values: dict[str, Variant] = {}
        # The job can have ended before this client asks.
        with suppress(NotFound):
            values = await self._properties(path, JOB)
            progress(_progress(values))
        async for message in arrived:
            if message.path == path and values:
                # The values that were read can be newer than those of this signal.
                for name, now in message.body[1].items():
                    if now.value > values[name].value:
                        values[name] = now
                progress(_progress(values))
            elif message.member == "JobRemoved" and message.body[1] == path:
                *_, result, name, text = message.body
                if result != "done":
                    raise error_from(name, text)
                return

    async def _create(
        self, member: str, key: str, parent: str, labels: Mapping[str, str] | None
    ) -> Mount:
        (mounts,) = await self._call(member, "ssa{sv}", key, parent, _labels(labels))
        return mount_from_wire(mounts[0])

    async def _properties(self, path: str, interface: str) -> dict[str, Variant]:
        asked = self._connected().request(self._name, path, PROPERTIES, "GetAll", "s", [interface])
        (values,) = await asked
        return dict(values)

    async def _call(self, member: str, signature: str, *arguments: object) -> Body:
        return await self._connected().request(
            self._name, OBJECT_PATH, MANAGER, member, signature, [*arguments]
        )

    def _connected(self) -> Connection:
        if self._connection is None:
            raise Unavailable("the client is not connected: use it in a with statement")
        return self._connection


def _labels(labels: Mapping[str, str] | None) -> dict[str, Variant]:
    return {"labels": Variant("a{ss}", dict(labels))} if labels else {}


def _read_only(read_only: bool | None) -> dict[str, Variant]:
    return {} if read_only is None else {"read-only": Variant("b", read_only)}


def _progress(values: Mapping[str, Variant]) -> Progress:
    return Progress(
        done=Usage(values["BytesDone"].value, values["EntriesDone"].value),
        total=Usage(values["BytesTotal"].value, values["EntriesTotal"].value),
    )
