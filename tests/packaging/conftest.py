"""The packages under test."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.support.package import Packages, build_packages


@pytest.fixture(scope="session")
def built(tmp_path_factory: pytest.TempPathFactory) -> Packages:
    """Build the packages once."""
    return build_packages(tmp_path_factory.mktemp("package"))


@pytest.fixture(scope="session")
def package(built: Packages) -> Path:
    """Return the package of the service."""
    return built.service


@pytest.fixture(scope="session")
def plugin_package(built: Packages) -> Path:
    """Return the package of containerd's plugin."""
    return built.plugin
