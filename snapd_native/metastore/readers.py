"""The connections of readers, and pauses in which nobody reads."""

from __future__ import annotations

import sqlite3
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager


class Readers:
    """Lends connections to threads, and keeps them open for the next reader."""

    def __init__(self, connect: Callable[[], sqlite3.Connection]) -> None:
        """``connect`` opens a connection."""
        self._connect = connect
        self._idle: list[sqlite3.Connection] = []
        self._reading = 0
        self._paused = False
        self._changed = threading.Condition()

    def close(self) -> None:
        """Close all connections. No thread may be reading."""
        while self._idle:
            self._idle.pop().close()

    @contextmanager
    def reading(self) -> Iterator[sqlite3.Connection]:
        """Lend a connection. A thread that has one must not ask for another."""
        with self._changed:
            self._changed.wait_for(lambda: not self._paused)
            self._reading += 1
            db = self._idle.pop() if self._idle else None
        try:
            db = db or self._connect()
            yield db
        finally:
            with self._changed:
                self._reading -= 1
                if db:
                    self._idle.append(db)
                self._changed.notify_all()

    @contextmanager
    def paused(self, seconds: float) -> Iterator[bool]:
        """Hold back new readers in the block; yield whether the others ended within ``seconds``."""
        try:
            with self._changed:
                self._paused = True
                nobody_reads = self._changed.wait_for(lambda: not self._reading, seconds)
            yield nobody_reads
        finally:
            with self._changed:
                self._paused = False
                self._changed.notify_all()
