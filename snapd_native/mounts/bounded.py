"""System calls whose path leads over other people's file systems, which may never answer.

A FUSE file system answers when its process does, and NFS when its server does. Until then, a
thread that looks up a path there cannot go on.
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
"""How long to wait for an answer."""

MOST = 64
"""Threads that may be left waiting for the targets of one kind of caller."""

_NO_LINKS = linux.RESOLVE_NO_SYMLINKS | linux.RESOLVE_NO_MAGICLINKS

_T = TypeVar("_T")

_ended = threading.Condition()
_running: Counter[Hashable] = Counter()
"""The threads for each thing that is asked for."""


def bounded(
    work: Callable[[], _T],
    undo: Callable[[_T], object] = lambda _: None,
    *,
    of: Hashable,
    most: int = 1,
) -> _T:
    """Return what ``work`` returns, or raise what it raises; it runs in a thread of its own.

    At most ``most`` threads run for the same ``of``, so that a file system that does not answer is
    not asked again and again, and calls that do not ask it are not refused.

    Raises:
        TimeoutError: it takes longer than `SECONDS`, or none of ``most`` threads ends in that time.
            If ``work`` ends later, ``undo`` is called with its result.
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

    # A daemon thread: the end of the process does not wait for it.
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
    # The next call may come at once, and the thread must not count for it any more.
    thread.join()
    return outcome.result()


def _release(of: Hashable) -> None:
    with _ended:
        _running[of] -= 1
        if not _running[of]:
            del _running[of]
        _ended.notify_all()


def open_path(path: str, flags: int = 0, *, of: Hashable, most: int = 1) -> int:
    """Open what is at a path without a symbolic link, with O_PATH; for ``of`` see `bounded`.

    Raises:
        OSError: the kernel's; TimeoutError if a file system does not answer.
    """
    return bounded(partial(open_path_here, path, flags), os.close, of=of, most=most)


def open_path_here(path: str, flags: int = 0) -> int:
    """Do the same in the thread of the caller, however long it takes."""
    return linux.openat2(linux.AT_FDCWD, path, flags | os.O_PATH | os.O_CLOEXEC, _NO_LINKS)


def _no_answer() -> TimeoutError:
    return TimeoutError(errno.ETIMEDOUT, "its file system does not answer")
