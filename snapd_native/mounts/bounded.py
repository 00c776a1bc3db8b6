"""System calls on paths that lead over file systems of others, with a limit of time.

A FUSE file system answers when its process does, and NFS when its server does. Until then a thread
that looks up a path there hangs.
"""

from __future__ import annotations

import errno
import os
import threading
from collections import Counter
from collections.abc import Callable, Hashable
from concurrent.futures import Future
from functools import partial
from typing import TypeVar

from snapd_native import linux

SECONDS = 10.0
"""Seconds to wait for an answer."""

MOST = 64
"""Threads at most that hang on the targets of one kind of caller."""

_NO_LINKS = linux.RESOLVE_NO_SYMLINKS | linux.RESOLVE_NO_MAGICLINKS

_T = TypeVar("_T")

_ended = threading.Condition()
_running: Counter[Hashable] = Counter()
"""The threads that run, by what they work on."""


def bounded(
    work: Callable[[], _T],
    undo: Callable[[_T], object] = lambda _: None,
    *,
    of: Hashable,
    most: int = 1,
) -> _T:
    """Run ``work`` in a thread of its own; return its result, or raise its error.

    At most ``most`` threads run for the same ``of``. So a file system that does not answer blocks a
    bounded number of threads, and calls on other file systems are not refused.

    Raises:
        TimeoutError: ``work`` takes longer than `SECONDS`, or ``most`` threads are still running
            after that time. If ``work`` ends later, ``undo`` is called with its result.
    """
    outcome: Future[_T] = Future()

    def run() -> None:
        try:
            result = work()
        except BaseException as error:
            if outcome.set_running_or_notify_cancel():
                outcome.set_exception(error)
        else:
            if outcome.set_running_or_notify_cancel():
                outcome.set_result(result)
            else:
                undo(result)
        finally:
            _release(of)

    # Python does not wait for a daemon thread at the end of the process. The kernel does, if the
    # thread waits for a file system that does not answer.
    thread = threading.Thread(target=run, name="bounded", daemon=True)
    with _ended:
        if not _ended.wait_for(lambda: _running[of] < most, SECONDS):
            raise _no_answer()
        _running[of] += 1
    try:
        thread.start()
    except BaseException:
        _release(of)
        raise
    thread.join(SECONDS)
    if outcome.cancel():
        raise _no_answer()
    # A call that comes now must not count this thread.
    thread.join()
    return outcome.result()


def _release(of: Hashable) -> None:
    with _ended:
        _running[of] -= 1
        if not _running[of]:
            del _running[of]
        _ended.notify_all()


def open_path(path: str, flags: int = 0, *, of: Hashable, most: int = 1) -> int:
    """Open a path without symbolic links, with O_PATH; for ``of`` see `bounded`.

    Raises:
        OSError: the kernel's; TimeoutError if a file system does not answer.
    """
    return bounded(partial(open_path_here, path, flags), os.close, of=of, most=most)


def open_path_here(path: str, flags: int = 0) -> int:
    """Open as `open_path`, in this thread and without a limit of time."""
    return linux.openat2(linux.AT_FDCWD, path, flags | os.O_PATH | os.O_CLOEXEC, _NO_LINKS)


def _no_answer() -> TimeoutError:
    return TimeoutError(errno.ETIMEDOUT, "its file system does not answer")
