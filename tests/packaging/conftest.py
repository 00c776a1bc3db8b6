"""The package under test."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.support.package import build


@pytest.fixture(scope="session")
def package(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Build the package once."""
    return build(tmp_path_factory.mktemp("package"))
