"""Exit statuses, one for each error of the contract. click uses 2 for wrong usage."""

from __future__ import annotations

from snapd_native import errors

STATUSES: dict[type[errors.SnapdError], int] = {
    errors.Internal: 1,
    errors.InvalidArgument: 3,
    errors.NotFound: 4,
    errors.AlreadyExists: 5,
    errors.FailedPrecondition: 6,
    errors.ResourceExhausted: 7,
    errors.DataLoss: 8,
    errors.Cancelled: 9,
    errors.Unavailable: 10,
    errors.AccessDenied: 11,
    errors.InteractiveAuthorizationRequired: 12,
}

FINDINGS = 1
"""Check has findings."""

INTERRUPTED = 130
"""Ended by Ctrl-C, as a shell reports it."""


def status(error: errors.SnapdError) -> int:
    """Return the exit status for an error."""
    return STATUSES.get(type(error), 1)
