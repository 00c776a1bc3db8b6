"""A plugin on the service that tests share, and a client of it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.containerd_plugin import Plugin, Stub, connected, plugin
from tests.support.service import Service


@pytest.fixture(scope="session")
def lasting_plugin(
    lasting_service: Service, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Plugin]:
    with plugin(lasting_service.address, tmp_path_factory.mktemp("plugin")) as running:
        yield running


@pytest.fixture
def stub(shared_service: Service, lasting_plugin: Plugin) -> Iterator[Stub]:
    """Yield a client of a plugin on the shared service."""
    with connected(lasting_plugin.socket) as client:
        yield client


@pytest.fixture
def base(stub: Stub, tmp_path: Path) -> str:
    """Commit a snapshot of containerd with one file, and return its name."""
    tree = Path(stub.prepare("making").source)
    (tree / "file").write_text("text")
    stub.commit("base", "making")
    return "base"
