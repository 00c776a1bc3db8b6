"""Translate errors of the operating system to errors of the contract."""

from __future__ import annotations

import errno
import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager

from snapd_native.errors import (
    DataLoss,
    FailedPrecondition,
    Internal,
    NotFound,
    ResourceExhausted,
    SnapdError,
)
from snapd_native.metastore import Metastore, Record
from snapd_native.model import quote

log = logging.getLogger(__name__)

_EXHAUSTED = {
    errno.ENOSPC: "free space or inodes",
    errno.EDQUOT: "raise the quota or free space",
    errno.ENOMEM: "free memory",
    errno.EMFILE: "let other calls end first",
    errno.ENFILE: "let other programs close files",
    errno.EAGAIN: "let other processes end first",
}
_KILLED = {errno.ECHILD, errno.EPIPE}
_DAMAGED = {
    errno.EIO,
    # ext4 and xfs report damage like this; ext4 is read-only from then on.
    errno.EUCLEAN,
    errno.EBADMSG,
    errno.EROFS,
    # Write-back tells what the device has said; the kernel's table is in block/blk-core.c.
    errno.ENODEV,
    errno.ENODATA,
    errno.ENOLINK,
    errno.EREMOTEIO,
    errno.ETIMEDOUT,
    errno.EILSEQ,
    errno.ESHUTDOWN,
}


@contextmanager
def explained(doing: str) -> Iterator[None]:
    """Turn an `OSError` into the contract's error that begins with "cannot <doing>"."""
    try:
        yield
    except DataLoss as error:
        raise DataLoss(f"cannot {doing}: {error}") from error
    except OSError as error:
        raise _meaning(error, f"cannot {doing}") from error


@contextmanager
def unless_removed(store: Metastore, record: Record) -> Iterator[None]:
    """Raise NotFound instead if a snapshot was removed, or committed to another name, meanwhile."""
    try:
        yield
    finally:
        key = record.info.name
        if store.get(key).id != record.id:
            raise NotFound(f"the snapshot {quote(key)} was removed meanwhile: try again")


def _meaning(error: OSError, what: str) -> SnapdError:
    # The path in an OSError is the service's own; only its number leaves.
    code = error.errno or 0
    reason = os.strerror(code).lower()
    if code in _EXHAUSTED:
        return ResourceExhausted(f"{what}: {reason}, {_EXHAUSTED[code]} and try again")
    if code in _KILLED:
        return ResourceExhausted(
            f"{what}: a process that helped was killed, perhaps for want of memory, try again"
        )
    if code in _DAMAGED:
        return DataLoss(f"{what}: {reason}, check the disk and the kernel's log")
    if code == errno.ESTALE:
        return FailedPrecondition(f"{what}: its tree was being changed, try again when it rests")
    if code == errno.E2BIG:
        return FailedPrecondition(
            f"{what}: something in it has more extended attributes than the kernel lists,"
            " remove some"
        )
    if code in (errno.EEXIST, errno.ENOTEMPTY):
        return FailedPrecondition(
            f"{what}: something that is not the service's is in its way, see what Check finds"
        )
    if code == errno.EBUSY:
        return FailedPrecondition(f"{what}: something is mounted in it, unmount that first")
    log.error("%s: %s", what, error, exc_info=error)
    return Internal(f"{what}: {reason}, see the service's log")
