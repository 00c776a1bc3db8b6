"""The errors of the contract.

Each class is one error of the contract and has its name. The message is one sentence for a person:
it names the thing and says what to do.
"""

from __future__ import annotations


class SnapdError(Exception):
    """An error of the contract."""

    @property
    def message(self) -> str:
        """The sentence for a person."""
        return str(self)


class InvalidArgument(SnapdError):
    """The call is malformed; it fails like this in every state of the service."""


class NotFound(SnapdError):
    """The snapshot, parent, mount or job does not exist."""


class AlreadyExists(SnapdError):
    """The key or name is taken, perhaps by a running call."""


class FailedPrecondition(SnapdError):
    """The snapshot is not in the state that the call needs."""


class ResourceExhausted(SnapdError):
    """Disk space, inodes, quota or the bound on running operations is used up."""


class DataLoss(SnapdError):
    """Metadata and directories disagree, or the database is damaged."""


class Cancelled(SnapdError):
    """The operation was cancelled, and everything it had done was undone."""


class Unavailable(SnapdError):
    """The service cannot be reached, or is shutting down."""


class Internal(SnapdError):
    """A bug in the service; its log says more."""


class AccessDenied(SnapdError):
    """The caller may not do this."""


class InteractiveAuthorizationRequired(SnapdError):
    """The caller may do this after a person has authenticated."""
