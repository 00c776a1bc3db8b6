"""Translate errors of the kernel to errors of the contract."""

from __future__ import annotations

import errno
import logging
import os
from collections.abc import Iterator, Mapping
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

_EHWPOISON = 133
"""Missing in the module `errno`."""

_DAMAGED = (DataLoss, "{reason}, check the disk and the kernel's log")
_KILLED = (
    ResourceExhausted,
    "a worker process was killed, perhaps for lack of memory, try again",
)
_TAKEN = (
    FailedPrecondition,
    "something that is not the service's is in its way, see what Check finds",
)
_DENIED = (
    FailedPrecondition,
    "{reason}, something in it is immutable, append-only or an active swap file, a security module"
    " denies it, or the service lacks a capability: see lsattr, swapon and the audit log",
)
_UNSUPPORTED = (
    FailedPrecondition,
    "{reason}, something in it cannot be stored by its file system in this place",
)

_MEANINGS: Mapping[int, tuple[type[SnapdError], str]] = {
    errno.ENOSPC: (ResourceExhausted, "{reason}, free space or inodes and try again"),
    errno.EDQUOT: (ResourceExhausted, "{reason}, raise the quota or free space and try again"),
    errno.ENOMEM: (ResourceExhausted, "{reason}, free memory and try again"),
    errno.EMFILE: (ResourceExhausted, "{reason}, let other calls end first and try again"),
    errno.ENFILE: (ResourceExhausted, "{reason}, let other programs close files and try again"),
    errno.EAGAIN: (ResourceExhausted, "{reason}, let other processes end first and try again"),
    errno.EFBIG: (ResourceExhausted, "{reason}, raise LimitFSIZE= of the unit and try again"),
    errno.EMLINK: (ResourceExhausted, "{reason}, remove some snapshots and try again"),
    errno.ECHILD: _KILLED,
    errno.EPIPE: _KILLED,
    errno.EIO: _DAMAGED,
    # ext4 and xfs report damage like this; ext4 is read-only from then on.
    errno.EUCLEAN: _DAMAGED,
    errno.EBADMSG: _DAMAGED,
    errno.EROFS: _DAMAGED,
    # Write-back reports the error of the device; the kernel's table is in block/blk-core.c.
    errno.ENODEV: _DAMAGED,
    errno.ENODATA: _DAMAGED,
    errno.ENOLINK: _DAMAGED,
    errno.EREMOTEIO: _DAMAGED,
    errno.ETIMEDOUT: _DAMAGED,
    errno.EILSEQ: _DAMAGED,
    errno.ESHUTDOWN: _DAMAGED,
    # A damaged page of memory contains a part of a file.
    _EHWPOISON: _DAMAGED,
    errno.ESTALE: (
        FailedPrecondition,
        "its tree was being changed, try again when nobody changes it",
    ),
    errno.E2BIG: (
        FailedPrecondition,
        "something in it has more extended attributes than the kernel lists, remove some",
    ),
    errno.EEXIST: _TAKEN,
    errno.ENOTEMPTY: _TAKEN,
    errno.EBUSY: (FailedPrecondition, "something is mounted in it, unmount that first"),
    errno.EPERM: _DENIED,
    errno.EACCES: _DENIED,
    errno.ETXTBSY: (
        FailedPrecondition,
        "{reason}, something in it is an active swap file or a program that runs: end that first",
    ),
    # A directory that fscrypt has encrypted is locked.
    errno.ENOKEY: (FailedPrecondition, "{reason}, it is encrypted: unlock it first"),
    errno.EOPNOTSUPP: _UNSUPPORTED,
    errno.ENAMETOOLONG: _UNSUPPORTED,
    # An idmapped mount does not map the owner of a file.
    errno.EOVERFLOW: _UNSUPPORTED,
}
"""What an error of the kernel means to a caller, from the manual pages of the calls that copy,
rename and delete trees. One that is missing here can only be a mistake of the service."""


@contextmanager
def explained(doing: str) -> Iterator[None]:
    """Translate an `OSError` to an error of the contract, "cannot <doing>: ..."."""
    try:
        yield
    except DataLoss as error:
        raise DataLoss(f"cannot {doing}: {error}") from error
    except OSError as error:
        raise _meaning(error, f"cannot {doing}") from error


@contextmanager
def unless_removed(store: Metastore, record: Record) -> Iterator[None]:
    """Raise NotFound if the snapshot was removed or committed during the block."""
    try:
        yield
    finally:
        key = record.info.name
        if store.get(key).id != record.id:
            raise NotFound(f"the snapshot {quote(key)} was removed meanwhile: try again")


def _meaning(error: OSError, what: str) -> SnapdError:
    # The path in an OSError is the service's own, and not for the caller.
    code = error.errno or 0
    reason = os.strerror(code).lower()
    if meaning := _MEANINGS.get(code):
        kind, text = meaning
        return kind(f"{what}: {text.format(reason=reason)}")
    log.error("%s: %s", what, error, exc_info=error)
    return Internal(f"{what}: {reason}, see the service's log")
