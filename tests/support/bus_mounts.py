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
    call_method,
    commit_snapshot,
    connection,
)

MOUNT, UNMOUNT, OPEN_TREE = "ssa{sv}", "sa{sv}", "sa{sv}"


def populate_service(client: BlockingClient) -> None:
    """Make the committed `base`, and from it the active `work` and the view `look`."""
    commit_snapshot(client, "base", files={"file": "text"})
    client.prepare("work", "base")
    client.view("look", "base")


@contextmanager
def populate_and_unmount(service: Service) -> Iterator[Service]:
    """Call `populate_service`, and unmount everything at the end of the block."""
    with BlockingClient() as client:
        populate_service(client)
    try:
        yield service
    finally:
        with BlockingClient() as client:
            for mounted in client.list_mounts():
                client.unmount(mounted.target, lazy=True)


@pytest.fixture
def populated_service(shared_service: Service) -> Iterator[Service]:
    with populate_and_unmount(shared_service) as service:
        yield service


def list_mounts() -> list[list[object]]:
    (rows,) = call_method("ListMounts", "s", "")
    assert isinstance(rows, list)
    return rows


def is_unmounted(path: Path) -> bool:
    return mounted_on(path) is None and list_mounts() == []


class _AuthAsNobody(AuthExternal):
    def _authentication_start(self, negotiate_unix_fd: bool = False) -> str:
        super()._authentication_start(negotiate_unix_fd)
        return f"AUTH EXTERNAL {str(NOBODY).encode().hex()}"


@asynccontextmanager
async def connect_as_nobody() -> AsyncIterator[connection]:
    """Connect as a user without any permission."""
    os.seteuid(NOBODY)
    try:
        made = connection()
    finally:
        os.seteuid(0)
    made._auth = _AuthAsNobody()  # type: ignore[has-type]
    async with made as bus:
        yield bus
