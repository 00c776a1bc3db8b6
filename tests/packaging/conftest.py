"""The package under test."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.support.package import build_package


@pytest.fixture(scope="session")
def package(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Build the package once."""
    return build_package(tmp_path_factory.mktemp("package"))
