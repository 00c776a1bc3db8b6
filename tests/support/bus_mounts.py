"""Helpers for mounts over the bus."""

from __future__ import annotations

import os
from collections.abc import AsyncIterator, Iterator
from contextlib import (
    asynccontextmanager,
    contextmanager,
)
from pathlib import Path

import pytest
from dbus_next.auth import AuthExternal

from snapd_native.client import BlockingClient
from tests.support.kernel_mounts import mounted_on
from tests.support.service import (
    NOBODY,
    Service,
    committed,
    connection,
    request,
)

MOUNT, UNMOUNT, OPEN_TREE = "ssa{sv}", "sa{sv}", "sa{sv}"


def stock(client: BlockingClient) -> None:
    """Make the committed `base`, and from it the active `work` and the view `look`."""
    committed(client, "base", files={"file": "text"})
    client.prepare("work", "base")
    client.view("look", "base")


@contextmanager
def stocked_with_snapshots(service: Service) -> Iterator[Service]:
    """Yield a service with the snapshots of `stock`, and unmount everything at the end."""
    with BlockingClient() as client:
        stock(client)
    try:
        yield service
    finally:
        with BlockingClient() as client:
            for mounted in client.list_mounts():
                client.unmount(mounted.target, lazy=True)


@pytest.fixture
def stocked(shared: Service) -> Iterator[Service]:
    with stocked_with_snapshots(shared) as service:
        yield service


def listed() -> list[list[object]]:
    (rows,) = request("ListMounts", "s", "")
    assert isinstance(rows, list)
    return rows


def is_gone(path: Path) -> bool:
    return mounted_on(path) is None and listed() == []


class _AsNobody(AuthExternal):
    def _authentication_start(self, negotiate_unix_fd: bool = False) -> str:
        super()._authentication_start(negotiate_unix_fd)
        return f"AUTH EXTERNAL {str(NOBODY).encode().hex()}"


@asynccontextmanager
async def stranger() -> AsyncIterator[connection]:
    """Connect as a user without any permission."""
    os.seteuid(NOBODY)
    try:
        made = connection()
    finally:
        os.seteuid(0)
    made._auth = _AsNobody()  # type: ignore[has-type]
    async with made as bus:
        yield bus
