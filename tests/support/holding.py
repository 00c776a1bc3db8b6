"""Hold up work in the middle, and let it continue.

`hold_at_files` holds up other processes when they open a file, `hold_function` holds up threads of
this process when they call a function, and `stop_processes` stops whole processes. None of them
depends on the speed or the load of the machine.
"""

from __future__ import annotations

import ctypes
import os
import select
import signal
import struct
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest

from snapd_native.trees.relay import NORMAL
from tests.support.descriptors import Process, max_workers, wait_until_idle, worker_pids
from tests.support.waiting import WAIT_TIMEOUT

_FAN_CLOEXEC, _FAN_NONBLOCK, _FAN_CLASS_CONTENT = 0x1, 0x2, 0x4
_FAN_MARK_ADD, _FAN_OPEN_PERM = 0x1, 0x10000
_FAN_ONDIR, _FAN_EVENT_ON_CHILD = 0x40000000, 0x08000000
_FAN_ALLOW = 1
_AT_FDCWD = -100
_EVENT = struct.Struct("=IBBHQii")
"""``struct fanotify_event_metadata``."""


class HeldProcesses:
    """The processes that `hold_at_files` holds up."""

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
            assert self._changed.wait_for(lambda: len(self._waiting) >= count, WAIT_TIMEOUT)

    def release(self, count: int = 1) -> None:
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
def hold_at_files(*paths: Path, after: int = 0) -> Iterator[HeldProcesses]:
    """Hold up other processes that open one of ``paths``, or an entry of a directory in ``paths``.

    The first ``after`` opens do not wait. A waiting process can be killed. This process never
    waits. See fanotify(7).
    """
    libc = ctypes.CDLL(None, use_errno=True)
    notifications = libc.fanotify_init(
        _FAN_CLASS_CONTENT | _FAN_CLOEXEC | _FAN_NONBLOCK, os.O_RDONLY
    )
    if notifications < 0:
        raise OSError(ctypes.get_errno(), "fanotify_init")
    held = HeldProcesses(notifications, after)
    end, ending = os.pipe()
    listener = threading.Thread(target=held.listen, args=[end])
    listener.start()
    try:
        for path in paths:
            directory = _FAN_ONDIR | _FAN_EVENT_ON_CHILD if path.is_dir() else 0
            mask = ctypes.c_uint64(_FAN_OPEN_PERM | directory)
            name = os.fsencode(path)
            if libc.fanotify_mark(notifications, _FAN_MARK_ADD, mask, _AT_FDCWD, name) < 0:
                raise OSError(ctypes.get_errno(), "fanotify_mark", str(path))
        yield held
    finally:
        os.close(ending)
        listener.join()
        os.close(end)
        held.close()


class HeldCalls:
    """The calls that `hold_function` holds up."""

    def __init__(self) -> None:
        self.count = 0
        """The number of calls so far."""
        self._is_released = False
        self._changed = threading.Condition()

    def wait_until_reached(self, count: int = 1) -> None:
        """Wait until ``count`` calls were made."""
        with self._changed:
            assert self._changed.wait_for(lambda: self.count >= count, WAIT_TIMEOUT)

    def release(self) -> None:
        """Let all calls continue, also later ones."""
        with self._changed:
            self._is_released = True
            self._changed.notify_all()

    def wait(self) -> None:
        """Wait in a call until it may continue."""
        with self._changed:
            self.count += 1
            self._changed.notify_all()
            assert self._changed.wait_for(lambda: self._is_released, WAIT_TIMEOUT)


@contextmanager
def hold_function(owner: object, name: str) -> Iterator[HeldCalls]:
    """Hold up all calls of a function of a module, or of a method of a class."""
    held, real = HeldCalls(), getattr(owner, name)

    def wait(*arguments: object, **options: object) -> object:
        held.wait()
        return real(*arguments, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(owner, name, wait)
        try:
            yield held
        finally:
            held.release()


@contextmanager
def stop_processes(*pids: int) -> Iterator[None]:
    """Stop processes by SIGSTOP during the block. They may end in it."""
    try:
        for pid in pids:
            os.kill(pid, signal.SIGSTOP)
        yield
    finally:
        for pid in pids:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGCONT)


@contextmanager
def hold_workers(daemon: Process, priority: str = NORMAL) -> Iterator[None]:
    """Stop the idle workers of a daemon, so that the next job does not proceed in the block.

    A job uses the workers of the job before it, unless both run at once. So the caller must have
    run a job before, for instance a Commit. Verify and BackgroundUsage use workers of the priority
    `IDLE`: before one of them, the caller must have run the same call. The workers of a cancelled
    job end.
    """
    wait_until_idle(daemon)
    idle = worker_pids(daemon, priority)
    # The next job would start missing workers, and they would not be stopped.
    assert len(idle) >= (max_workers(daemon) if priority == NORMAL else 1)
    with stop_processes(*idle):
        yield
