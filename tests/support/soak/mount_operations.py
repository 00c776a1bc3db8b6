"""The operations of tenants on mounts, with the results that each must have."""

from __future__ import annotations

import asyncio
import os

from snapd_native.errors import AlreadyExists, FailedPrecondition, NotFound
from snapd_native.model import Kind, Lifetime
from tests.support.soak.tenants import Tenant, expect


async def mount(tenant: Tenant) -> None:
    key = tenant.choose(lambda _, known: known.kind is not Kind.COMMITTED)
    if key is None:
        return
    lifetime = tenant.random.choice([*Lifetime])
    mounting = tenant.client.mount(key, lifetime=lifetime)
    if any(name == key for name, _ in tenant.mounted.values()):
        await tenant.expect_error(AlreadyExists, "Mount", mounting)
        return
    target = await tenant.expect_success("Mount", mounting)
    tenant.mounted[target] = (key, lifetime)
    source = (await tenant.expect_success("Mounts", tenant.client.mounts(key))).source
    assert os.path.samestat(os.stat(target), os.stat(source))
    await _check_mounts(tenant)
    await tenant.expect_error(FailedPrecondition, "Remove", tenant.client.remove(key))
    if tenant.snapshots[key].kind is Kind.ACTIVE:
        with open(os.path.join(target, "open"), "wb"):
            taking = tenant.client.commit(tenant.new_name(), key)
            await tenant.expect_error(FailedPrecondition, "Commit", taking)
        os.unlink(os.path.join(target, "open"))
        tenant.snapshots[key].changed = True


async def unmount(tenant: Tenant) -> None:
    if not tenant.mounted:
        return
    target = tenant.random.choice([*tenant.mounted])
    await tenant.expect_success(
        "Unmount", tenant.client.unmount(target, lazy=tenant.random.random() < 0.2)
    )
    del tenant.mounted[target]
    assert not os.path.exists(target)
    await tenant.expect_error(NotFound, "Unmount", tenant.client.unmount(target))


async def open_tree(tenant: Tenant) -> None:
    key = tenant.choose(lambda _, known: known.kind is not Kind.COMMITTED)
    if key is None:
        return
    fd = await tenant.expect_success("OpenTree", tenant.client.open_tree(key))
    try:
        read_only = bool(os.fstatvfs(fd).f_flag & os.ST_RDONLY)
        expect(read_only, tenant.snapshots[key].kind is Kind.VIEW, f"whether {key} is read-only")
    finally:
        os.close(fd)


async def reconnect(tenant: Tenant) -> None:
    """Disconnect from the bus and connect again; the mounts of the connection must disappear."""
    await tenant.close()
    await tenant.open()
    tenant.mounted = {
        target: (key, lifetime)
        for target, (key, lifetime) in tenant.mounted.items()
        if lifetime is Lifetime.PERSISTENT
    }
    while len(await _listed_mounts(tenant)) > len(tenant.mounted):
        await asyncio.sleep(0.01)
    await _check_mounts(tenant)


async def _check_mounts(tenant: Tenant) -> None:
    expected = {target: key for target, (key, _) in tenant.mounted.items()}
    expect(await _listed_mounts(tenant), expected, "mounted")


async def _listed_mounts(tenant: Tenant) -> dict[str, str]:
    """Return the keys of the tenant's mounts by target, as the service lists them."""
    found = await tenant.expect_success("ListMounts", tenant.client.list_mounts())
    return {one.target: one.key for one in found if one.key.startswith(tenant.prefix)}
