"""What stands in the way of an Unmount or a Commit, in words."""

from __future__ import annotations

import errno
from collections.abc import Sequence

from snapd_native import mounts
from snapd_native.errors import DataLoss, FailedPrecondition, SnapdError
from snapd_native.model import quote, quote_path
from snapd_native.mounts import Entry, Table

_NAMED = 5
"""Processes or paths that a sentence names at most."""


def not_frozen(key: str, entry: Entry, error: OSError) -> SnapdError:
    """Return what a Commit fails with whose mount cannot be made read-only."""
    target = quote_path(entry.target)
    if error.errno == errno.EBUSY:
        writers = named(mounts.users(entry, writing=True)) or "somebody"
        return FailedPrecondition(
            f"cannot commit {quote(key)}: {writers} has a file open for writing on {target},"
            " close it first"
        )
    if error.errno == errno.ESTALE:
        return FailedPrecondition(
            f"cannot commit {quote(key)}: it is mounted on {target} with something else over it,"
            " unmount that first"
        )
    if error.errno in mounts.MOVED:
        return FailedPrecondition(
            f"cannot commit {quote(key)}: its mount on {target} is being moved, try again"
        )
    return DataLoss(f"cannot commit {quote(key)}: {target} cannot be made read-only ({error})")


def in_use(entry: Entry) -> str:
    """Say who uses a mount, and what to do."""
    if inside := Table.read().on(entry):
        return f"unmount {enumerated([other.target for other in inside])} first"
    processes = named(mounts.users(entry))
    return f"it is in use by {processes or 'something that is no process'}, end that first"


def named(processes: Sequence[tuple[int, str]]) -> str:
    """Name processes."""
    names = [f"{name} (pid {pid})" for pid, name in processes[:_NAMED]]
    more = len(processes) - _NAMED
    return ", ".join(names) + (f" and {more} more" if more > 0 else "")


def enumerated(targets: Sequence[str]) -> str:
    """Name paths, each once."""
    names = [quote_path(target) for target in dict.fromkeys(targets)]
    more = len(names) - _NAMED
    return ", ".join(names[:_NAMED]) + (f" and {more} more" if more > 0 else "")
