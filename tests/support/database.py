"""The database of a running service, which no other process can open."""

from __future__ import annotations

import os
import shutil
import sqlite3
import tempfile
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path

_FILES = ("metadata.db", "metadata.db-wal")


@contextmanager
def open_copy(state: Path) -> Iterator[sqlite3.Connection]:
    """Open a copy of the database as it was at one moment."""
    with tempfile.TemporaryDirectory() as directory:
        copy = Path(directory)
        while True:
            before = _changed(state)
            for name in _FILES:
                shutil.copyfile(state / name, copy / name)
            if _changed(state) == before:
                break
        with closing(sqlite3.connect(copy / _FILES[0])) as db:
            yield db


def _changed(state: Path) -> list[tuple[int, int]]:
    found = (os.stat(state / name) for name in _FILES)
    return [(status.st_mtime_ns, status.st_size) for status in found]
