"""The interface ``org.snapdnative1.Manager``: calls of the bus become calls of the engine.

Members have their D-Bus names; their types are in ``org.snapdnative1.xml``.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from dbus_next.signature import Variant

from snapd_native import __version__
from snapd_native.bus.authority import Action
from snapd_native.bus.jobs import Jobs
from snapd_native.bus.lanes import Lane
from snapd_native.bus.outbox import DESCRIPTOR
from snapd_native.errors import InvalidArgument
from snapd_native.jobs import Job
from snapd_native.metastore.listing import MAX_PAGE
from snapd_native.model import (
    Added,
    Change,
    Committed,
    Lifetime,
    Removed,
    Updated,
    quote,
)
from snapd_native.snapshotter import Snapshotter
from snapd_native.wire.values import (
    Body,
    finding_to_wire,
    info_to_wire,
    mount_to_wire,
    mounted_to_wire,
)

Options = Mapping[str, Variant]

LARGE = 1 << 20
"""Bytes of a reply with the labels of a snapshot, or with many rows."""


@dataclass(frozen=True, slots=True)
class Caller:
    """The caller of a method."""

    uid: int
    owner: str
    """An id of its connection that is unique, also for later buses."""
    is_connected: Callable[[], bool]
    """Tells whether the caller is still on the bus."""
    only_own: bool = False
    """Whether the caller may change only what is its own."""


@dataclass(frozen=True, slots=True)
class Context:
    """What a method is called with, in addition to its arguments."""

    caller: Caller
    job: Job


@dataclass(frozen=True, slots=True)
class Method:
    """A method: the permission that it needs, its lane, and its function."""

    action: Action
    lane: Lane
    run: Callable[..., Body]
    """Gets a `Context` and the arguments of the call."""
    room: int = 0
    """Bytes of the reply if it can be large: there must be room for it before the call begins."""
    returns_job: bool = False
    """Whether the reply is the path of the job, as soon as the work has begun."""
    user: Callable[..., int | None] | None = None
    """Gets the leading text arguments, and returns the uid of the owner, who may call."""

    @property
    def changes(self) -> bool:
        """Whether it can change anything."""
        return self.action is not Action.READ


class Manager:
    """The methods and properties of the contract, for one engine."""

    def __init__(self, snapshotter: Snapshotter, jobs: Jobs) -> None:
        self._snapshotter = snapshotter
        self._mounter = snapshotter.mounter
        self._upkeep = snapshotter.upkeep
        self._jobs = jobs
        self.methods = {
            "Prepare": Method(Action.MANAGE, Lane.TREE, self._prepare),
            "View": Method(Action.MANAGE, Lane.CHANGE, self._view),
            "Commit": Method(Action.MANAGE, Lane.TREE, self._commit),
            "Mounts": Method(Action.READ, Lane.READ, self._mounts),
            "Stat": Method(Action.READ, Lane.READ, self._stat, room=LARGE),
            "Update": Method(Action.MANAGE, Lane.CHANGE, self._update, room=LARGE),
            "Usage": Method(Action.READ, Lane.SURVEY, self._usage),
            "BackgroundUsage": Method(Action.READ, Lane.SURVEY, self._background_usage),
            "List": Method(Action.READ, Lane.LIST, self._list, room=MAX_PAGE),
            "Remove": Method(Action.MANAGE, Lane.CHANGE, self._remove),
            "Cleanup": Method(Action.MANAGE, Lane.TREE, self._cleanup),
            "Check": Method(Action.READ, Lane.SURVEY, self._check),
            "Repair": Method(Action.MANAGE, Lane.TREE, self._repair),
            "Verify": Method(Action.READ, Lane.VERIFY, self._verify),
            "Mount": Method(Action.MOUNT, Lane.MOUNT, self._mount),
            "Unmount": Method(
                Action.MOUNT, Lane.MOUNT, self._unmount, user=snapshotter.mounter.user
            ),
            "ListMounts": Method(Action.READ, Lane.MOUNT, self._list_mounts, room=LARGE),
            "OpenTree": Method(Action.MOUNT, Lane.MOUNT, self._open_tree, room=DESCRIPTOR),
            "PrepareJob": Method(Action.MANAGE, Lane.TREE, self._prepare, returns_job=True),
            "CommitJob": Method(Action.MANAGE, Lane.TREE, self._commit, returns_job=True),
            "VerifyJob": Method(Action.READ, Lane.VERIFY, self._verify, returns_job=True),
            "Standby": Method(Action.READ, Lane.READ, self._standby),
            "ListJobs": Method(Action.READ, Lane.READ, self._list_jobs, room=LARGE),
        }
        self.properties = {
            "Version": Variant("s", __version__),
            "StateDirectory": Variant("s", str(snapshotter.state_directory)),
            "FilesystemType": Variant("s", snapshotter.filesystem_type),
            "Reflink": Variant("b", snapshotter.reflink),
        }

    def _prepare(self, context: Context, key: str, parent: str, options: Options) -> Body:
        given = _unpack(options, labels="a{ss}")
        return [[mount_to_wire(self._snapshotter.prepare(key, parent, **given, job=context.job))]]

    def _view(self, _: Context, key: str, parent: str, options: Options) -> Body:
        given = _unpack(options, labels="a{ss}")
        return [[mount_to_wire(self._snapshotter.view(key, parent, **given))]]

    def _commit(self, context: Context, name: str, key: str, options: Options) -> Body:
        given = _unpack(options, labels="a{ss}", parent="s", digest="b")
        self._snapshotter.commit(name, key, **given, job=context.job)
        return []

    def _mounts(self, _: Context, key: str) -> Body:
        return [[mount_to_wire(self._snapshotter.mounts(key))]]

    def _stat(self, _: Context, key: str) -> Body:
        return [info_to_wire(self._snapshotter.stat(key))]

    def _standby(self, _: Context, name: str) -> Body:
        return [*self._snapshotter.standby(name)]

    def _update(
        self, _: Context, name: str, labels: Mapping[str, str], fieldpaths: list[str]
    ) -> Body:
        return [info_to_wire(self._snapshotter.update(name, labels, fieldpaths))]

    def _usage(self, context: Context, key: str) -> Body:
        usage = self._snapshotter.usage(key, context.job)
        return [usage.size, usage.inodes]

    def _background_usage(self, context: Context, key: str, options: Options) -> Body:
        _unpack(options)
        usage = self._snapshotter.usage(key, context.job, idle=True)
        return [usage.size, usage.inodes]

    def _list(self, context: Context, filters: list[str], options: Options) -> Body:
        given = _unpack(options, after="s", limit="u")
        found = self._snapshotter.list(filters, **given, is_wanted=context.caller.is_connected)
        return [[info_to_wire(info) for info in found]]

    def _remove(self, _: Context, key: str, options: Options) -> Body:
        _unpack(options)
        self._snapshotter.remove(key)
        return []

    def _cleanup(self, context: Context, options: Options) -> Body:
        _unpack(options)
        self._upkeep.cleanup(context.job)
        return []

    def _check(self, context: Context, options: Options) -> Body:
        _unpack(options)
        return [[finding_to_wire(finding) for finding in self._upkeep.check(context.job)]]

    def _repair(self, context: Context, options: Options) -> Body:
        _unpack(options)
        return [[finding_to_wire(finding) for finding in self._upkeep.repair(context.job)]]

    def _verify(self, context: Context, name: str, options: Options) -> Body:
        _unpack(options)
        return [self._upkeep.verify(name, context.job)]

    def _mount(self, context: Context, key: str, target: str, options: Options) -> Body:
        given = _unpack(options, read_only="b", lifetime="s")
        lifetime = _lifetime(given.pop("lifetime", Lifetime.PERSISTENT))
        caller = context.caller
        owner = caller.owner if lifetime is Lifetime.CLIENT else ""
        return [self._mounter.mount(key, target, **given, uid=caller.uid, owner=owner)]

    def _unmount(self, context: Context, target: str, options: Options) -> Body:
        given = _unpack(options, lazy="b")
        caller = context.caller
        self._mounter.unmount(target, **given, uid=caller.uid if caller.only_own else None)
        return []

    def _list_mounts(self, _: Context, key: str) -> Body:
        return [[mounted_to_wire(mounted) for mounted in self._mounter.list_mounts(key)]]

    def _open_tree(self, _: Context, key: str, options: Options) -> Body:
        return [self._mounter.open_tree(key, **_unpack(options, read_only="b"))]

    def _list_jobs(self, _: Context) -> Body:
        return [self._jobs.listing()]


def _unpack(options: Options, **signatures: str) -> dict[str, Any]:
    """Return the values of ``options``; ``signatures`` contains the valid ones with their types.

    A hyphen in the name of an option becomes an underscore.

    Raises:
        InvalidArgument: an option is unknown, or has another type.
    """
    values = {}
    types = {name.replace("_", "-"): signature for name, signature in signatures.items()}
    for name, variant in options.items():
        signature = types.get(name)
        if signature is None:
            known = ", ".join(sorted(types)) or "none"
            raise InvalidArgument(
                f"there is no option {quote(name)} here: leave it out (known: {known})"
            )
        if variant.signature != signature:
            raise InvalidArgument(
                f"the option {name} has the type {quote(variant.signature)}: give {signature}"
            )
        values[name.replace("-", "_")] = variant.value
    return values


def _lifetime(text: str) -> Lifetime:
    try:
        return Lifetime(text)
    except ValueError:
        known = " or ".join(Lifetime)
        raise InvalidArgument(f"invalid lifetime {quote(text)}: give {known}") from None


def signal(change: Change) -> tuple[str, Body]:
    """Return the name and the arguments of the signal of a change."""
    match change:
        case Added(key, kind, parent):
            return "SnapshotAdded", [key, kind.value, parent]
        case Committed(name, key):
            return "SnapshotCommitted", [name, key]
        case Updated(name):
            return "SnapshotUpdated", [name]
        case Removed(key):
            return "SnapshotRemoved", [key]
