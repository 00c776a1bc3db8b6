"""Names of the contract, and the table between exceptions and D-Bus errors, read both ways."""

from __future__ import annotations

from snapd_native import errors

BUS_NAME = "org.snapdnative1"
OBJECT_PATH = "/org/snapdnative1"
MANAGER = "org.snapdnative1.Manager"

PEER = "org.freedesktop.DBus.Peer"
INTROSPECTABLE = "org.freedesktop.DBus.Introspectable"
PROPERTIES = "org.freedesktop.DBus.Properties"

DRIVER = "org.freedesktop.DBus"
DRIVER_PATH = "/org/freedesktop/DBus"

_OURS = "org.snapdnative1.Error."
_STANDARD = "org.freedesktop.DBus.Error."

_CLASSES: dict[str, type[errors.SnapdError]] = {
    **{
        _OURS + kind.__name__: kind
        for kind in (
            errors.InvalidArgument,
            errors.NotFound,
            errors.AlreadyExists,
            errors.FailedPrecondition,
            errors.ResourceExhausted,
            errors.DataLoss,
            errors.Cancelled,
            errors.Unavailable,
            errors.Internal,
        )
    },
    _STANDARD + "AccessDenied": errors.AccessDenied,
    _STANDARD + "InteractiveAuthorizationRequired": errors.InteractiveAuthorizationRequired,
}
_NAMES = {kind: name for name, kind in _CLASSES.items()}

# What the bus itself says when it cannot deliver a call or its answer.
_FROM_THE_BUS = {
    _STANDARD + name: errors.Unavailable
    for name in ("ServiceUnknown", "NameHasNoOwner", "NoReply", "Disconnected", "Timeout")
} | {_STANDARD + "LimitsExceeded": errors.ResourceExhausted}


def error_name(error: errors.SnapdError) -> str:
    """Return the D-Bus name of an exception."""
    return _NAMES.get(type(error), _OURS + "Internal")


def error_from(name: str, message: str) -> errors.SnapdError:
    """Return the exception that a D-Bus error stands for."""
    kind = _CLASSES.get(name) or _FROM_THE_BUS.get(name)
    return kind(message) if kind else errors.Internal(f"{name}: {message}")
