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
    lifetime = tenant.chance.choice([*Lifetime])
    mounting = tenant.client.mount(key, lifetime=lifetime)
    if any(name == key for name, _ in tenant.mounted.values()):
        await tenant.refused(AlreadyExists, "Mount", mounting)
        return
    target = await tenant.ask("Mount", mounting)
    tenant.mounted[target] = (key, lifetime)
    source = (await tenant.ask("Mounts", tenant.client.mounts(key))).source
    assert os.path.samestat(os.stat(target), os.stat(source))
    await _check_mounts(tenant)
    await tenant.refused(FailedPrecondition, "Remove", tenant.client.remove(key))
    if tenant.there[key].kind is Kind.ACTIVE:
        with open(os.path.join(target, "open"), "wb"):
            taking = tenant.client.commit(tenant.new_name(), key)
            await tenant.refused(FailedPrecondition, "Commit", taking)
        os.unlink(os.path.join(target, "open"))
        tenant.there[key].changed = True


async def unmount(tenant: Tenant) -> None:
    if not tenant.mounted:
        return
    target = tenant.chance.choice([*tenant.mounted])
    await tenant.ask("Unmount", tenant.client.unmount(target, lazy=tenant.chance.random() < 0.2))
    del tenant.mounted[target]
    assert not os.path.exists(target)
    await tenant.refused(NotFound, "Unmount", tenant.client.unmount(target))


async def open_tree(tenant: Tenant) -> None:
    key = tenant.choose(lambda _, known: known.kind is not Kind.COMMITTED)
    if key is None:
        return
    fd = await tenant.ask("OpenTree", tenant.client.open_tree(key))
    try:
        read_only = bool(os.fstatvfs(fd).f_flag & os.ST_RDONLY)
        expect(read_only, tenant.there[key].kind is Kind.VIEW, f"whether {key} is read-only")
    finally:
        os.close(fd)


async def come_back(tenant: Tenant) -> None:
    """Disconnect from the bus and connect again; the mounts of the connection must disappear."""
    await tenant.close()
    await tenant.open()
    tenant.mounted = {
        target: (key, lifetime)
        for target, (key, lifetime) in tenant.mounted.items()
        if lifetime is Lifetime.PERSISTENT
    }
    while len(await _standing(tenant)) > len(tenant.mounted):
        await asyncio.sleep(0.01)
    await _check_mounts(tenant)


async def _check_mounts(tenant: Tenant) -> None:
    expected = {target: key for target, (key, _) in tenant.mounted.items()}
    expect(await _standing(tenant), expected, "mounted")


async def _standing(tenant: Tenant) -> dict[str, str]:
    """Return the keys of the tenant's mounts by target, as the service lists them."""
    found = await tenant.ask("ListMounts", tenant.client.list_mounts())
    return {one.target: one.key for one in found if one.key.startswith(tenant.prefix)}
