"""The snapshots of one containerd, in a store that it shares with others.

containerd's garbage collection removes every snapshot that it finds and does not know. So it finds
only its own: their names in the store begin with the name of the containerd, and the label
`OWNER_LABEL` has that name as its value. All other snapshots do not exist for it.
"""

from __future__ import annotations

import asyncio
import re
from collections.abc import (
    AsyncIterator,
    Awaitable,
    Callable,
    Collection,
    Coroutine,
    Mapping,
    Sequence,
)
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from dataclasses import replace
from typing import Any, TypeVar

from snapd_native.client import Client
from snapd_native.errors import InvalidArgument, NotFound, SnapdError
from snapd_native.filters import parse
from snapd_native.model import Info, Kind, Mount, Usage, check_name, quote
from snapd_native.tasks import undisturbed

OWNER_LABEL = "snapd-native.containerd"
"""The label with the name of the containerd that made a snapshot."""

_HIDDEN = "snapd-native."
"""The prefix of labels that containerd neither sees nor changes."""

_NAME = re.compile("[A-Za-z0-9][A-Za-z0-9._-]{0,63}", re.ASCII)

SHORT_CALLS = 64
LONG_CALLS = 32
"""Calls of the service at a time, at most; more wait here.

Together they stay below the 128 replies that dbus-daemon lets a connection wait for. The long
calls, Prepare and Commit, also stay below the 64 that the service runs at a time.
"""

MEASUREMENTS = 2
"""Active snapshots that are measured at a time."""

CANCEL_SECONDS = 0.1
"""Seconds after which a call that was cancelled is cancelled again: it can have no job yet."""

_T = TypeVar("_T")


class Snapshots:
    """containerd's ``Snapshotter`` on the service: all methods raise the errors of the contract."""

    def __init__(self, instance: str, name: str, usage_age: float) -> None:
        """Use an instance of the service for the containerd ``name``.

        The usage of an active snapshot is measured again after ``usage_age`` seconds.

        Raises:
            InvalidArgument: a name is invalid.
        """
        if not _NAME.fullmatch(name):
            raise InvalidArgument(
                f"invalid name {quote(name)} of a containerd: use at most 64 letters, digits,"
                " dots, dashes and underscores, and a letter or digit first"
            )
        self._name = name
        self._prefix = f"{name}/"
        self._connection = _Connection(instance)
        self._short = asyncio.Semaphore(SHORT_CALLS)
        self._long = asyncio.Semaphore(LONG_CALLS)
        self._measurements = asyncio.Semaphore(MEASUREMENTS)
        self._usages = _Usages(usage_age)
        self._changes: set[asyncio.Task[Any]] = set()
        """The calls that change snapshots, and are undone when their callers cancel them."""

    async def close(self) -> None:
        """Cancel the calls that change snapshots, and disconnect from the bus."""
        await _cancel({*self._changes})
        await self._connection.close()

    async def prepare(self, key: str, parent: str, labels: Mapping[str, str]) -> Mount:
        """Create an active snapshot. If the caller cancels, the snapshot does not exist then."""
        stored, of, marked = await self._creation(key, parent, labels)
        # A person can have removed a snapshot with this key.
        self._usages.forget(stored)
        async with self._calling(self._long) as client:
            preparing = client.prepare(stored, of, marked)
            return await self._change(client, stored, preparing, undo=client.remove)

    async def view(self, key: str, parent: str, labels: Mapping[str, str]) -> Mount:
        """Create a view."""
        stored, of, marked = await self._creation(key, parent, labels)
        async with self._calling(self._short) as client:
            return await client.view(stored, of, marked)

    async def commit(self, name: str, key: str, labels: Mapping[str, str], parent: str) -> None:
        """Turn an active snapshot into a committed one; a cancellation undoes the work so far."""
        check_name(name, "name")
        marked = self._marked(labels)
        await self._own(key)
        if parent:
            await self._own(parent)
        old, new = self._stored(key), self._stored(name)
        of = self._stored(parent) if parent else ""
        async with self._calling(self._long) as client:
            await self._change(client, old, client.commit(new, old, marked, of))
        self._usages.forget(old)

    async def mounts(self, key: str) -> Mount:
        """Return the mount of an active snapshot or a view."""
        await self._own(key)
        async with self._calling(self._short) as client:
            return await client.mounts(self._stored(key))

    async def stat(self, key: str) -> Info:
        """Return the record of a snapshot, as containerd knows it."""
        return self._shown(await self._own(key))

    async def update(self, name: str, labels: Mapping[str, str], paths: Sequence[str]) -> Info:
        """Set labels and return the new record; see `Client.update`."""
        for key in (*labels, *(path.removeprefix("labels.") for path in paths)):
            _check_label(key)
        info = await self._own(name)
        # All labels, or some, but never the hidden ones.
        known = dict.fromkeys(key for key in (*info.labels, *labels) if not _is_hidden(key))
        expanded = [f"labels.{OWNER_LABEL}"]
        for path in paths or ("labels",):
            expanded += [f"labels.{key}" for key in known] if path == "labels" else [path]
        async with self._calling(self._short) as client:
            given = {**labels, OWNER_LABEL: self._name}
            return self._shown(await client.update(self._stored(name), given, expanded))

    async def usage(self, key: str) -> Usage:
        """Return the usage of a snapshot: as recorded, or as measured a short time ago."""
        info = await self._own(key)
        stored = self._stored(key)
        if info.kind is Kind.ACTIVE:
            return await self._usages.get(stored, lambda: self._measure(stored))
        async with self._calling(self._short) as client:
            return await client.usage(stored)

    async def walk(self, filters: Sequence[str]) -> AsyncIterator[Info]:
        """Iterate over the snapshots that match a filter, in byte order of names."""
        chosen = parse(filters)
        async with self._calling(self._short) as client:
            async for info in client.walk([f'labels."{OWNER_LABEL}"=="{self._name}"']):
                if self._owns(info) and chosen.matches(shown := self._shown(info)):
                    yield shown

    async def remove(self, key: str) -> None:
        """Remove a snapshot; its data is deleted in the background."""
        await self._own(key)
        stored = self._stored(key)
        async with self._calling(self._short) as client:
            await client.remove(stored)
        self._usages.forget(stored)

    async def cleanup(self) -> None:
        """Wait until all pending deletions are done."""
        async with self._calling(self._long) as client:
            await client.cleanup()

    @asynccontextmanager
    async def _calling(self, bound: asyncio.Semaphore) -> AsyncIterator[Client]:
        """Wait for one of the calls that ``bound`` permits, and yield a connected client."""
        async with bound:
            yield await self._connection.client()

    async def _change(
        self,
        client: Client,
        key: str,
        call: Coroutine[Any, Any, _T],
        undo: Callable[[str], Awaitable[object]] | None = None,
    ) -> _T:
        """Await a Prepare or Commit of ``key``; see `_undone_if_cancelled`."""
        task = asyncio.create_task(_undone_if_cancelled(client, key, call, undo))
        self._changes.add(task)
        task.add_done_callback(self._changes.discard)
        try:
            return await undisturbed(task)
        except asyncio.CancelledError:
            await _cancel({task})
            raise

    async def _creation(
        self, key: str, parent: str, labels: Mapping[str, str]
    ) -> tuple[str, str, Mapping[str, str]]:
        """Return key, parent and labels of a new snapshot, as they are in the store."""
        check_name(key)
        marked = self._marked(labels)
        if not parent:
            return self._stored(key), "", marked
        await self._own(parent, "parent")
        return self._stored(key), self._stored(parent), marked

    async def _own(self, key: str, what: str = "key") -> Info:
        """Return the record of a snapshot of this containerd, as it is in the store.

        Raises:
            InvalidArgument: the key is invalid.
            NotFound: the snapshot does not exist, or is not of this containerd.
        """
        check_name(key, what)
        async with self._calling(self._short) as client:
            info = await client.stat(self._stored(key))
        if not self._owns(info):
            raise NotFound(
                f"the snapshot {quote(info.name)} does not belong to the containerd {self._name}:"
                " choose another key"
            )
        return info

    def _owns(self, info: Info) -> bool:
        return info.labels.get(OWNER_LABEL) == self._name and info.name.startswith(self._prefix)

    def _stored(self, key: str) -> str:
        return self._prefix + key

    def _shown(self, info: Info) -> Info:
        """Return the record as containerd knows it."""
        labels = {key: value for key, value in info.labels.items() if not _is_hidden(key)}
        name, parent = (text.removeprefix(self._prefix) for text in (info.name, info.parent))
        return replace(info, name=name, parent=parent, labels=labels)

    def _marked(self, labels: Mapping[str, str]) -> Mapping[str, str]:
        for key in labels:
            _check_label(key)
        return {**labels, OWNER_LABEL: self._name}

    async def _measure(self, stored: str) -> Usage:
        async with self._calling(self._measurements) as client:
            return await client.background_usage(stored)


class _Connection:
    """A client of the service that connects again when the bus was lost."""

    def __init__(self, instance: str) -> None:
        self._instance = instance
        self._client: Client | None = None
        self._opening = asyncio.Lock()
        self._resources = AsyncExitStack()

    async def client(self) -> Client:
        """Return a connected client.

        Raises:
            Unavailable: the bus cannot be reached.
        """
        async with self._opening:
            if self._client is None or not self._client.is_connected:
                await self.close()
                self._client = await self._resources.enter_async_context(Client(self._instance))
            return self._client

    async def close(self) -> None:
        """Disconnect."""
        await self._resources.aclose()
        self._client = None


class _Usages:
    """The usage of active snapshots, measured a short time ago."""

    def __init__(self, age: float) -> None:
        self._age = age
        self._measuring: dict[str, asyncio.Task[Usage]] = {}
        self._measured: dict[str, tuple[float, Usage]] = {}
        """The times of the measurements, in the clock of the event loop, and their results."""

    async def get(self, key: str, measure: Callable[[], Coroutine[Any, Any, Usage]]) -> Usage:
        """Return the last measurement; measure if it is too old. All callers share the result."""
        loop = asyncio.get_running_loop()
        oldest = loop.time() - self._age
        self._measured = {k: last for k, last in self._measured.items() if last[0] > oldest}
        if key in self._measured:
            return self._measured[key][1]
        task = self._measuring.get(key)
        if task is None:
            task = self._measuring[key] = loop.create_task(self._measure(key, measure()))
        # The measurement goes on when the first caller leaves.
        return await undisturbed(task)

    def forget(self, key: str) -> None:
        """Forget the measurement of a snapshot that has gone, or is made anew."""
        self._measured.pop(key, None)

    async def _measure(self, key: str, measurement: Coroutine[Any, Any, Usage]) -> Usage:
        try:
            usage = await measurement
            self._measured[key] = asyncio.get_running_loop().time(), usage
            return usage
        finally:
            del self._measuring[key]


async def _undone_if_cancelled(
    client: Client,
    key: str,
    call: Coroutine[Any, Any, _T],
    undo: Callable[[str], Awaitable[object]] | None,
) -> _T:
    """Await a Prepare or Commit of ``key``.

    If this is cancelled, cancel the job of the call, and wait until the call has ended. If it has
    succeeded nevertheless, ``undo`` it.
    """
    task = asyncio.ensure_future(call)
    try:
        return await undisturbed(task)
    except asyncio.CancelledError:
        while not task.done():
            with suppress(SnapdError):
                for job in await client.jobs():
                    if job.key == key and job.operation in ("prepare", "commit"):
                        await client.cancel(job.id)
            await asyncio.wait({task}, timeout=CANCEL_SECONDS)
        if task.exception() is None and undo is not None:
            with suppress(SnapdError):
                await undo(key)
        raise


async def _cancel(tasks: Collection[asyncio.Task[Any]]) -> None:
    """Cancel the tasks that are not cancelled yet, and wait until all have ended."""
    for task in tasks:
        if not task.cancelling():
            task.cancel()
    if tasks:
        await asyncio.wait(tasks)


def _is_hidden(label: str) -> bool:
    return label.startswith(_HIDDEN)


def _check_label(label: str) -> None:
    if _is_hidden(label):
        raise InvalidArgument(
            f"the label {quote(label)} is the service's own: set it with snapd-native label"
        )
