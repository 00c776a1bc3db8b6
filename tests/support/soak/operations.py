"""The operations of tenants in the soak test, with the results that each must have."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Awaitable, Callable
from functools import partial

from dbus_next.signature import Variant

from snapd_native.errors import (
    AlreadyExists,
    FailedPrecondition,
    InvalidArgument,
    NotFound,
    SnapdError,
)
from snapd_native.model import DIGEST_LABEL, STANDBY_LABEL, Info, Kind, Usage
from snapd_native.wire.names import BUS_NAME, JOB_PATH, MANAGER, OBJECT_PATH
from tests.support.soak.mount_operations import mount, open_tree, reconnect, unmount
from tests.support.soak.tenants import REPLY, KnownSnapshot, Signal, Tenant, expect

MAX_SNAPSHOTS = 10
"""The approximate maximum number of a tenant's snapshots."""

MAX_INODES = 12_000
"""The maximum number of a tenant's inodes, with removed ones that may not be deleted yet."""

SMALL_TREE = 1500
"""The number of inodes below which a tree is small: it may be read as a whole or kept as clones."""

TenantOperation = Callable[[Tenant], Awaitable[None]]


async def prepare(tenant: Tenant) -> None:
    parent = await _find_room(tenant)
    key, labels = tenant.new_name(), _choose_labels(tenant)
    mount = await tenant.expect_success(
        "Prepare",
        tenant.client.prepare(key, parent, labels),
        _added_signal(key, Kind.ACTIVE, parent),
    )
    tenant.snapshots[key] = KnownSnapshot(Kind.ACTIVE, parent, labels, tenant.inodes(parent))
    expect(mount.options, ("rbind", "rw"), f"the mount of {key}")
    if tenant.random.random() < 0.5:
        tenant.write(key, mount.source)


async def prepare_by_job(tenant: Tenant) -> None:
    parent = await _find_room(tenant)
    key = tenant.new_name()
    inodes = tenant.inodes(parent)
    change = _added_signal(key, Kind.ACTIVE, parent)
    if await _run_job(tenant, "PrepareJob", key, parent, {}, change):
        tenant.snapshots[key] = KnownSnapshot(Kind.ACTIVE, parent, {}, inodes)
    else:
        tenant.undeleted_inodes += inodes


async def view(tenant: Tenant) -> None:
    parent = _choose_parent(tenant, {**tenant.bases, "": 1})
    key, labels = tenant.new_name(), _choose_labels(tenant)
    mount = await tenant.expect_success(
        "View", tenant.client.view(key, parent, labels), _added_signal(key, Kind.VIEW, parent)
    )
    tenant.snapshots[key] = KnownSnapshot(Kind.VIEW, parent, labels, 0)
    expect(mount.options, ("rbind", "ro"), f"the mount of {key}")


async def commit(tenant: Tenant) -> None:
    key = tenant.choose(lambda _, known: known.kind is Kind.ACTIVE)
    if key is None:
        return
    name, labels = tenant.new_name(), _choose_labels(tenant)
    digest = tenant.random.random() < 0.3 and tenant.snapshots[key].inodes < SMALL_TREE
    committing = tenant.client.commit(name, key, labels, digest=digest)
    what = "Commit with digest" if digest else "Commit"
    await tenant.expect_success(what, committing, ("SnapshotCommitted", name, key))
    _record_commit(tenant, key, name, labels)
    if digest:
        info = await tenant.expect_success("Stat of one's own", tenant.client.stat(name))
        tenant.snapshots[name].labels[DIGEST_LABEL] = info.labels[DIGEST_LABEL]
        tenant.check_info(info)
        _check_digest(tenant, name)


async def commit_by_job(tenant: Tenant) -> None:
    key = tenant.choose(lambda _, known: known.kind is Kind.ACTIVE)
    if key is None:
        return
    name, labels = tenant.new_name(), _choose_labels(tenant)
    options = {"labels": Variant("a{ss}", labels)}
    if await _run_job(tenant, "CommitJob", name, key, options, ("SnapshotCommitted", name, key)):
        _record_commit(tenant, key, name, labels)


async def update(tenant: Tenant) -> None:
    name = tenant.choose(lambda *_: True)
    if name is None:
        return
    labels = tenant.snapshots[name].labels
    await _update(tenant, name, "note", "" if "note" in labels else f"{tenant.random.random()}")


async def set_standby_clones(tenant: Tenant) -> None:
    """Set the number of standby clones of a small committed snapshot to 0, 1 or 2."""
    name = tenant.choose(
        lambda _, known: known.kind is Kind.COMMITTED and known.inodes < SMALL_TREE
    )
    if name is None:
        return
    number = tenant.random.randrange(3)
    await _update(tenant, name, STANDBY_LABEL, f"{number}" if number else "")
    standby = await tenant.expect_success("Standby", tenant.client.standby(name))
    expect(standby.wanted, number, f"the standby clones of {name}")
    # The service deletes superfluous clones a while later.
    assert standby.ready <= 2


async def stat(tenant: Tenant) -> None:
    name = tenant.choose(lambda *_: True)
    if name is not None:
        tenant.check_info(
            await tenant.expect_success("Stat of one's own", tenant.client.stat(name))
        )


async def usage(tenant: Tenant) -> None:
    name = tenant.choose(lambda *_: True)
    if name is None:
        return
    known = tenant.snapshots[name]
    found = await tenant.expect_success(f"Usage, {known.kind}", tenant.client.usage(name))
    expect(found.inodes, known.inodes, f"the usage of {name}")
    expect(found == Usage(0, 0), known.kind is Kind.VIEW, f"whether {name} has no usage")


async def mounts(tenant: Tenant) -> None:
    name = tenant.choose(lambda *_: True)
    if name is None:
        return
    asking = tenant.client.mounts(name)
    if tenant.snapshots[name].kind is Kind.COMMITTED:
        await tenant.expect_error(FailedPrecondition, "Mounts", asking)
    else:
        assert os.path.isdir((await tenant.expect_success("Mounts", asking)).source)


async def select(tenant: Tenant) -> None:
    """List snapshots with filters that select only snapshots of the tenant."""
    kind = tenant.random.choice([*Kind])
    chosen: list[tuple[list[str], Callable[[KnownSnapshot], bool]]] = [
        ([f"labels.owner=={tenant.number},kind=={kind}"], lambda known: known.kind is kind),
        ([f'name~="^{tenant.prefix}",labels.note'], lambda known: "note" in known.labels),
    ]
    parent = tenant.choose(lambda _, known: known.kind is Kind.COMMITTED)
    if parent:
        chosen.append(([f'parent=="{parent}"'], lambda known: known.parent == parent))
    filters, fits = tenant.random.choice(chosen)
    found = await tenant.expect_success("List with filters", tenant.client.list(filters))
    named = filters[0].startswith("labels.owner")
    expected = sorted(
        name
        for name, known in tenant.snapshots.items()
        if fits(known) and (not named or "owner" in known.labels)
    )
    expect([info.name for info in found], expected, f"List with {filters}")
    for info in found:
        tenant.check_info(info)


async def walk(tenant: Tenant) -> None:
    """Read all pages of List, and change the tenant's snapshots between some of them."""
    limit = tenant.random.choice([20, 60, 150, 1000])
    always, ever, names = {*tenant.snapshots}, {*tenant.snapshots}, list[str]()
    page: list[Info] | None = None
    while page is None or len(page) == limit:
        if page is not None and tenant.random.random() < 0.2:
            await tenant.random.choice([prepare, view, commit, remove])(tenant)
            always &= {*tenant.snapshots}
            ever |= {*tenant.snapshots}
        after = names[-1] if names else ""
        page = await tenant.expect_success("List, a page", tenant.client.list([], after, limit))
        tenant.check_page(page, after, limit)
        names += [info.name for info in page]
    encoded = [name.encode() for name in names]
    expect(encoded, sorted({*encoded}), "the order of a walk")
    own = {name for name in names if name.startswith(tenant.prefix)}
    assert always <= own <= ever, f"a walk lacks {always - own}, and has also {own - ever}"
    expect({*tenant.bases} - {*names}, set(), "missing in a walk")


async def remove(tenant: Tenant) -> None:
    name = tenant.choose(lambda *_: True)
    if name is None:
        return
    removing = tenant.client.remove(name)
    if tenant.has_children(name) or tenant.is_mounted(name):
        await tenant.expect_error(FailedPrecondition, "Remove", removing)
        return
    await tenant.expect_success("Remove", removing, ("SnapshotRemoved", name))
    tenant.undeleted_inodes += tenant.snapshots.pop(name).inodes


async def clean_up(tenant: Tenant) -> None:
    await tenant.expect_success("Cleanup", tenant.client.cleanup())
    tenant.undeleted_inodes = 0


async def verify(tenant: Tenant) -> None:
    name = tenant.choose(lambda _, known: DIGEST_LABEL in known.labels)
    if name is not None:
        digest = await tenant.expect_success("Verify", tenant.client.verify(name))
        expect(digest, tenant.snapshots[name].labels[DIGEST_LABEL], f"the digest of {name}")


async def check(tenant: Tenant) -> None:
    expect(await tenant.expect_success("Check", tenant.client.check()), [], "found by Check")


async def repair(tenant: Tenant) -> None:
    expect(await tenant.expect_success("Repair", tenant.client.repair()), [], "repaired by Repair")


async def read_jobs_and_properties(tenant: Tenant) -> None:
    for job in await tenant.expect_success("ListJobs", tenant.client.jobs()):
        assert job.uid == os.geteuid()
    found = await tenant.expect_success("Properties.GetAll", tenant.client.service())
    assert os.path.isdir(found.state_directory)


async def make_invalid_call(tenant: Tenant) -> None:
    """Make a call with invalid arguments, which must fail."""
    client, name = tenant.client, tenant.choose(lambda *_: True)
    wrong: list[tuple[type[SnapdError], str, Callable[[], Awaitable[object]]]] = [
        (NotFound, "Stat", partial(client.stat, f"{tenant.prefix}none")),
        (NotFound, "Prepare", partial(client.prepare, f"{tenant.prefix}new", "none")),
        (NotFound, "Job.Cancel", partial(client.cancel, 1 << 30)),
        (InvalidArgument, "List", partial(client.list, ["=bad"])),
        (InvalidArgument, "Mount", partial(client.mount, f"{tenant.prefix}new", "relative")),
    ]
    if name is not None:
        wrong.append((AlreadyExists, "Prepare", partial(client.prepare, name)))
        wrong.append((AlreadyExists, "View", partial(client.view, name)))
        if tenant.snapshots[name].kind is not Kind.COMMITTED:
            asked = partial(client.prepare, f"{tenant.prefix}new", name)
            wrong.append((InvalidArgument, "Prepare", asked))
    kind, what, call = tenant.random.choice(wrong)
    await tenant.expect_error(kind, what, call())


OPERATIONS: dict[TenantOperation, int] = {
    prepare: 12,
    prepare_by_job: 5,
    view: 8,
    commit: 8,
    commit_by_job: 4,
    update: 6,
    set_standby_clones: 1,
    stat: 12,
    usage: 4,
    mounts: 4,
    select: 6,
    walk: 2,
    mount: 4,
    unmount: 4,
    open_tree: 3,
    reconnect: 1,
    remove: 16,
    clean_up: 1,
    verify: 1,
    check: 1,
    repair: 1,
    read_jobs_and_properties: 2,
    make_invalid_call: 6,
}
"""The relative frequency of each operation."""


async def leave(tenant: Tenant) -> None:
    """Remove all mounts and snapshots of the tenant, and disconnect."""
    for target in [*tenant.mounted]:
        await tenant.expect_success("Unmount", tenant.client.unmount(target))
        del tenant.mounted[target]
    while tenant.snapshots:
        await remove(tenant)
    await tenant.close()


async def _find_room(tenant: Tenant) -> str:
    """Choose a parent for a new snapshot, or ``""``; remove snapshots until its copy fits."""
    while len(tenant.snapshots) > MAX_SNAPSHOTS:
        await tenant.random.choice([remove, unmount])(tenant)
    parent = _choose_parent(tenant, {**tenant.bases, "": 1})
    inodes = tenant.inodes(parent)
    while (
        sum(known.inodes for known in tenant.snapshots.values()) + tenant.undeleted_inodes + inodes
        > MAX_INODES
    ):
        smaller = clean_up if tenant.undeleted_inodes else tenant.random.choice([remove, unmount])
        await smaller(tenant)
        if parent and parent not in tenant.bases and parent not in tenant.snapshots:
            return ""
    return parent


def _choose_parent(tenant: Tenant, others: dict[str, int]) -> str:
    """Choose a committed snapshot of the tenant, or one of ``others``: large ones more rarely."""
    own = tenant.choose(lambda _, known: known.kind is Kind.COMMITTED)
    if own and tenant.random.random() < 0.4:
        return own
    weights = [1 / inodes**0.5 for inodes in others.values()]
    return tenant.random.choices([*others], weights)[0]


async def _run_job(
    tenant: Tenant, member: str, one: str, other: str, options: dict[str, Variant], change: Signal
) -> bool:
    """Start a job that makes one change, and sometimes cancel it; return whether it was done."""
    arguments = [one, other, options]
    calling = tenant.bus.request(BUS_NAME, OBJECT_PATH, MANAGER, member, "ssa{sv}", arguments)
    tenant.signal_log.begin()
    (path,) = await tenant.time(member, calling)
    number = int(str(path).removeprefix(f"{JOB_PATH}/"))
    arrived = tenant.signal_log.arrived
    assert ("JobNew", number, path) in arrived[: arrived.index(REPLY)]
    cancelled = False
    if tenant.random.random() < 0.3:
        await asyncio.sleep(tenant.random.choice([0, 0.01, 0.1]))
        try:
            await tenant.time("Job.Cancel", tenant.client.cancel(number))
            cancelled = True
        except (NotFound, FailedPrecondition):
            pass  # The job was done already.
    end = await tenant.signal_log.end_of(path)
    *_, result, error, text = end
    expected = "cancelled" if cancelled else "done"
    expect(result, expected, f"the end of {member} with {error} {text}")
    expect(
        tenant.signal_log.changes(end),
        [change] * (not cancelled),
        f"signals before the end of {member}",
    )
    tenant.acknowledge(*[change] * (not cancelled))
    return not cancelled


async def _update(tenant: Tenant, name: str, label: str, value: str) -> None:
    """Set one label, or delete it."""
    labels = {label: value} if value else {}
    updating = tenant.client.update(name, labels, [f"labels.{label}"])
    info = await tenant.expect_success("Update", updating, ("SnapshotUpdated", name))
    tenant.snapshots[name].labels.pop(label, None)
    tenant.snapshots[name].labels.update(labels)
    tenant.check_info(info)


def _record_commit(tenant: Tenant, key: str, name: str, labels: dict[str, str]) -> None:
    """Record that the active snapshot ``key`` was committed as ``name``."""
    known = tenant.snapshots.pop(key)
    known.kind, known.labels = Kind.COMMITTED, labels
    tenant.snapshots[name] = known
    tenant.mounted = {
        target: (name if mounted == key else mounted, lifetime)
        for target, (mounted, lifetime) in tenant.mounted.items()
    }


def _check_digest(tenant: Tenant, name: str) -> None:
    """Check that an unchanged copy has the same digest as its parent."""
    known = tenant.snapshots[name]
    parent = tenant.snapshots.get(known.parent)
    if parent and not known.changed and DIGEST_LABEL in parent.labels:
        expect(known.labels[DIGEST_LABEL], parent.labels[DIGEST_LABEL], f"the digest of {name}")


def _choose_labels(tenant: Tenant) -> dict[str, str]:
    labels = {"owner": f"{tenant.number}"}
    return labels if tenant.random.random() < 0.7 else {}


def _added_signal(key: str, kind: Kind, parent: str) -> Signal:
    return ("SnapshotAdded", key, kind.value, parent)
