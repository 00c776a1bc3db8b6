"""Names of the contract, and the table of exceptions and D-Bus errors."""

from __future__ import annotations

import re

from snapd_native import errors
from snapd_native.model import quote

BUS_NAME = "org.snapdnative1"
"""The name of the service on the bus; the names of instances begin with it."""

OBJECT_PATH = "/org/snapdnative1"
MANAGER = "org.snapdnative1.Manager"
JOB_PATH = "/org/snapdnative1/job"
JOB = "org.snapdnative1.Job"

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

# Errors of the bus itself, if it cannot deliver a call or its reply.
_FROM_THE_BUS: dict[str, tuple[type[errors.SnapdError], str]] = {
    _STANDARD + name: (errors.Unavailable, text)
    for name, text in {
        "ServiceUnknown": "the service is not running: start it, systemctl start {unit}",
        "NameHasNoOwner": "the service is not running: start it, systemctl start {unit}",
        "NoReply": "the service ended before it answered: look at its log",
        "Disconnected": "the bus closed the connection: try again",
        "Timeout": "the service did not start in time: look at its log",
    }.items()
} | {
    _STANDARD + "LimitsExceeded": (
        errors.ResourceExhausted,
        "the bus refuses more from this caller: let some calls end first",
    )
}


_INSTANCE = re.compile("[A-Za-z_][A-Za-z0-9_]{0,63}", re.ASCII)


def bus_name(instance: str) -> str:
    """Return the name on the bus of an instance; ``""`` is the service itself.

    Raises:
        InvalidArgument: the instance cannot be part of a name on the bus.
    """
    if not instance:
        return BUS_NAME
    if not _INSTANCE.fullmatch(instance):
        raise errors.InvalidArgument(
            f"invalid instance {quote(instance)}: use at most 64 letters, digits and"
            " underscores, and no digit first"
        )
    return f"{BUS_NAME}.{instance}"


def unit_name(bus_name: str) -> str:
    """Return the systemd unit of a name on the bus; its directories have the same name."""
    instance = bus_name.removeprefix(BUS_NAME).removeprefix(".")
    return f"snapd-native@{instance}" if instance else "snapd-native"


def error_name(error: errors.SnapdError) -> str:
    """Return the D-Bus name of an exception."""
    return _NAMES.get(type(error), _OURS + "Internal")


def error_from(name: str, message: str, sender: str = BUS_NAME) -> errors.SnapdError:
    """Return the exception for a D-Bus error of a call to ``sender``."""
    if kind := _CLASSES.get(name):
        return kind(message)
    kind, text = _FROM_THE_BUS.get(name, (errors.Internal, f"{name}: {message}"))
    return kind(text.replace("{unit}", unit_name(sender)))
