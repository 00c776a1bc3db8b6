"""The interface ``org.snapdnative1.Manager``: calls of the bus become calls of the engine.

Members have their D-Bus names; their types are in ``org.snapdnative1.xml``.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from dbus_next.signature import Variant

from snapd_native import __version__
from snapd_native.bus.authority import Action
from snapd_native.bus.jobs import Jobs
from snapd_native.bus.lanes import Lane
from snapd_native.bus.options import unpack
from snapd_native.bus.outbox import DESCRIPTOR
from snapd_native.errors import InvalidArgument
from snapd_native.jobs import Job
from snapd_native.metastore.listing import MAX_PAGE
from snapd_native.model import (
    MAX_LABELS,
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


@dataclass(frozen=True, slots=True)
class Caller:
    """The caller of a method."""

    uid: int
    owner: str
    """An id of its connection that is unique, also for later buses."""
    is_there: Callable[[], bool]
    """Tells whether the caller is still on the bus."""
    only_own: bool = False
    """Whether the caller may change only what is its own."""


@dataclass(frozen=True, slots=True)
class Method:
    """A method: the permission that it needs, its lane, and its function."""

    action: Action
    lane: Lane
    run: Callable[..., Body]
    """Gets the arguments of the call; before them a job in a lane that can take long, and the
    caller in that of mounts."""
    room: int = 4 << 10
    """Bytes of the reply, for which there must be room before the call begins."""
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
            "Stat": Method(Action.READ, Lane.READ, self._stat, room=MAX_LABELS),
            "Update": Method(Action.MANAGE, Lane.CHANGE, self._update, room=MAX_LABELS),
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
            "ListMounts": Method(Action.READ, Lane.MOUNT, self._list_mounts),
            "OpenTree": Method(Action.MOUNT, Lane.MOUNT, self._open_tree, room=DESCRIPTOR),
            "PrepareJob": Method(Action.MANAGE, Lane.TREE, self._prepare, returns_job=True),
            "CommitJob": Method(Action.MANAGE, Lane.TREE, self._commit, returns_job=True),
            "VerifyJob": Method(Action.READ, Lane.VERIFY, self._verify, returns_job=True),
            "Standby": Method(Action.READ, Lane.READ, self._standby),
            "ListJobs": Method(Action.READ, Lane.READ, self._list_jobs),
        }
        self.properties = {
            "Version": Variant("s", __version__),
            "StateDirectory": Variant("s", str(snapshotter.state_directory)),
            "FilesystemType": Variant("s", snapshotter.filesystem_type),
            "Reflink": Variant("b", snapshotter.reflink),
        }

    def _prepare(self, job: Job, key: str, parent: str, options: Options) -> Body:
        given = unpack(options, labels="a{ss}")
        return [[mount_to_wire(self._snapshotter.prepare(key, parent, **given, job=job))]]

    def _view(self, key: str, parent: str, options: Options) -> Body:
        given = unpack(options, labels="a{ss}")
        return [[mount_to_wire(self._snapshotter.view(key, parent, **given))]]

    def _commit(self, job: Job, name: str, key: str, options: Options) -> Body:
        given = unpack(options, labels="a{ss}", parent="s", digest="b")
        self._snapshotter.commit(name, key, **given, job=job)
        return []

    def _mounts(self, key: str) -> Body:
        return [[mount_to_wire(self._snapshotter.mounts(key))]]

    def _stat(self, key: str) -> Body:
        return [info_to_wire(self._snapshotter.stat(key))]

    def _standby(self, name: str) -> Body:
        return [*self._snapshotter.standby(name)]

    def _update(self, name: str, labels: Mapping[str, str], fieldpaths: list[str]) -> Body:
        return [info_to_wire(self._snapshotter.update(name, labels, fieldpaths))]

    def _usage(self, job: Job, key: str) -> Body:
        usage = self._snapshotter.usage(key, job)
        return [usage.size, usage.inodes]

    def _background_usage(self, job: Job, key: str, options: Options) -> Body:
        unpack(options)
        usage = self._snapshotter.usage(key, job, idle=True)
        return [usage.size, usage.inodes]

    def _list(self, caller: Caller, filters: list[str], options: Options) -> Body:
        given = unpack(options, after="s", limit="u")
        found = self._snapshotter.list(filters, **given, is_wanted=caller.is_there)
        return [[info_to_wire(info) for info in found]]

    def _remove(self, key: str, options: Options) -> Body:
        unpack(options)
        self._snapshotter.remove(key)
        return []

    def _cleanup(self, job: Job, options: Options) -> Body:
        unpack(options)
        self._upkeep.cleanup(job)
        return []

    def _check(self, job: Job, options: Options) -> Body:
        unpack(options)
        return [[finding_to_wire(finding) for finding in self._upkeep.check(job)]]

    def _repair(self, job: Job, options: Options) -> Body:
        unpack(options)
        return [[finding_to_wire(finding) for finding in self._upkeep.repair(job)]]

    def _verify(self, job: Job, name: str, options: Options) -> Body:
        unpack(options)
        return [self._upkeep.verify(name, job)]

    def _mount(self, caller: Caller, key: str, target: str, options: Options) -> Body:
        given = unpack(options, read_only="b", lifetime="s")
        lifetime = _lifetime(given.pop("lifetime", Lifetime.PERSISTENT))
        owner = caller.owner if lifetime is Lifetime.CLIENT else ""
        return [self._mounter.mount(key, target, **given, uid=caller.uid, owner=owner)]

    def _unmount(self, caller: Caller, target: str, options: Options) -> Body:
        given = unpack(options, lazy="b")
        self._mounter.unmount(target, **given, uid=caller.uid if caller.only_own else None)
        return []

    def _list_mounts(self, _: Caller, key: str) -> Body:
        return [[mounted_to_wire(mounted) for mounted in self._mounter.list_mounts(key)]]

    def _open_tree(self, _: Caller, key: str, options: Options) -> Body:
        return [self._mounter.open_tree(key, **unpack(options, read_only="b"))]

    def _list_jobs(self) -> Body:
        return [self._jobs.listing()]


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
