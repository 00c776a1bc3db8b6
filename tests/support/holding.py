"""Block other processes when they open a file or a directory; see fanotify(7).

A copy, a deletion or a digest always waits at the chosen file. This does not depend on the speed or
the load of the machine.
"""

from __future__ import annotations

import ctypes
import os
import select
import struct
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tests.support.waiting import WAIT

_FAN_CLOEXEC, _FAN_NONBLOCK, _FAN_CLASS_CONTENT = 0x1, 0x2, 0x4
_FAN_MARK_ADD, _FAN_OPEN_PERM = 0x1, 0x10000
_FAN_ONDIR, _FAN_EVENT_ON_CHILD = 0x40000000, 0x08000000
_FAN_ALLOW = 1
_AT_FDCWD = -100
_EVENT = struct.Struct("=IBBHQii")
"""``struct fanotify_event_metadata``."""


class Held:
    """The waiting processes."""

    def __init__(self, notifications: int, after: int) -> None:
        self._notifications = notifications
        self._passing = after
        self._waiting: list[tuple[int, int]] = []
        """The waiting processes, each with a descriptor of the file that it opens."""
        self._changed = threading.Condition()

    @property
    def pids(self) -> list[int]:
        """The pids of the waiting processes, once for each waiting thread."""
        with self._changed:
            return [pid for pid, _ in self._waiting]

    def wait_until_reached(self, count: int = 1) -> None:
        """Wait until ``count`` processes wait."""
        with self._changed:
            assert self._changed.wait_for(lambda: len(self._waiting) >= count, WAIT)

    def let_pass(self, count: int = 1) -> None:
        """Let the first ``count`` waiting processes continue."""
        with self._changed:
            self._passing += count
            self._serve()

    def listen(self, end: int) -> None:
        """Receive events until ``end`` becomes readable."""
        while end not in select.select([self._notifications, end], [], [])[0]:
            try:
                data = os.read(self._notifications, 4096)
            except BlockingIOError:
                # The process was killed before its event was read.
                continue
            for *_, descriptor, pid in _EVENT.iter_unpack(data):
                with self._changed:
                    # The test itself can access the held files.
                    if pid == os.getpid():
                        self._allow(descriptor)
                    else:
                        self._waiting.append((pid, descriptor))
                        self._serve()
                        self._changed.notify_all()

    def _serve(self) -> None:
        while self._waiting and self._passing > 0:
            self._passing -= 1
            _, descriptor = self._waiting.pop(0)
            self._allow(descriptor)

    def _allow(self, descriptor: int) -> None:
        os.write(self._notifications, struct.pack("=iI", descriptor, _FAN_ALLOW))
        os.close(descriptor)

    def close(self) -> None:
        """Let all processes continue."""
        os.close(self._notifications)
        for _, descriptor in self._waiting:
            os.close(descriptor)


@contextmanager
def held(*paths: Path, after: int = 0) -> Iterator[Held]:
    """Block other processes that open one of ``paths``, or an entry of a directory in ``paths``.

    The first ``after`` opens do not wait. A waiting process can be killed. This process never
    waits.
    """
    libc = ctypes.CDLL(None, use_errno=True)
    notifications = libc.fanotify_init(
        _FAN_CLASS_CONTENT | _FAN_CLOEXEC | _FAN_NONBLOCK, os.O_RDONLY
    )
    if notifications < 0:
        raise OSError(ctypes.get_errno(), "fanotify_init")
    waiting = Held(notifications, after)
    end, ending = os.pipe()
    listener = threading.Thread(target=waiting.listen, args=[end])
    listener.start()
    try:
        for path in paths:
            directory = _FAN_ONDIR | _FAN_EVENT_ON_CHILD if path.is_dir() else 0
            mask = ctypes.c_uint64(_FAN_OPEN_PERM | directory)
            name = os.fsencode(path)
            if libc.fanotify_mark(notifications, _FAN_MARK_ADD, mask, _AT_FDCWD, name) < 0:
                raise OSError(ctypes.get_errno(), "fanotify_mark", str(path))
        yield waiting
    finally:
        os.close(ending)
        listener.join()
        os.close(end)
        waiting.close()
