"""Messages that say why an Unmount, a Commit or a Remove is refused."""

from __future__ import annotations

import errno
from collections.abc import Sequence

from snapd_native import mounts
from snapd_native.errors import DataLoss, FailedPrecondition, SnapdError
from snapd_native.model import quote, quote_path
from snapd_native.mounts import Entry, Table

_NAMED = 5
"""Processes or paths that a message names at most."""


def not_frozen(key: str, entry: Entry, error: OSError) -> SnapdError:
    """Return the error of a Commit, if a mount cannot be made read-only."""
    target = quote_path(entry.target)
    if error.errno == errno.EBUSY:
        writers = named(mounts.users(entry, writing=True)) or "somebody"
        return FailedPrecondition(
            f"cannot commit {quote(key)}: {writers} has a file open for writing on {target},"
            " close it first"
        )
    if why := _out_of_reach(entry.target, error):
        return FailedPrecondition(f"cannot commit {quote(key)}, mounted on {target}: {why}")
    return DataLoss(f"cannot commit {quote(key)}: {target} cannot be made read-only ({error})")


def not_unmounted(target: str, error: OSError) -> SnapdError | OSError:
    """Return the error of an Unmount, if the kernel refuses it."""
    if why := _out_of_reach(target, error):
        return FailedPrecondition(f"cannot unmount {quote_path(target)}: {why}")
    return error


def in_the_way(targets: Sequence[str], overlays: Sequence[str], inside: Sequence[str]) -> str:
    """Say why a snapshot cannot be removed, and what to do; empty if it can.

    It is mounted on ``targets``, ``overlays`` show it, and ``inside`` are mounts in its tree.
    """
    if targets:
        return f"it is mounted, unmount {enumerated(targets)} first"
    if overlays:
        return f"the overlay on {enumerated(overlays)} shows it, unmount that first"
    if inside:
        return f"something is mounted in it on {enumerated(inside)}, unmount that first"
    return ""


def _out_of_reach(target: str, error: OSError) -> str:
    """Say why the path does not lead to the mount, and what to do; empty if it does."""
    if error.errno == errno.ETIMEDOUT:
        return "its file system does not answer, try again when it does"
    if error.errno not in {errno.ESTALE, *mounts.MOVED}:
        return ""
    if over := Table.read().covering(target):
        return (
            f"{enumerated([other.target for other in over])} is mounted over it, unmount that first"
        )
    return "it is being moved, try again"


def is_written(key: str, processes: Sequence[tuple[int, str]]) -> FailedPrecondition:
    """Return the error of a Commit, if somebody can write to a file of the tree."""
    who = named(processes) or "something that was not found, such as a loop device or swap,"
    return FailedPrecondition(
        f"cannot commit {quote(key)}: {who} has a file in it open for writing, end that first"
    )


def in_use(entry: Entry) -> str:
    """Say what uses a mount, and what to do."""
    if inside := Table.read().on(entry):
        return f"unmount {enumerated([other.target for other in inside])} first"
    processes = named(mounts.users(entry))
    return f"it is in use by {processes or 'something that was not found'}, end that first"


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
