"""Build replies to calls."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from dbus_next import message as dbus_message
from dbus_next._private.marshaller import Marshaller
from dbus_next.constants import MessageType
from dbus_next.errors import DBusError
from dbus_next.message import Message
from dbus_next.signature import Variant

from snapd_native.bus.incoming import Call
from snapd_native.errors import Internal, InvalidArgument, SnapdError
from snapd_native.model import shown
from snapd_native.wire.names import error_name
from snapd_native.wire.values import Body

log = logging.getLogger(__name__)

ERROR = "org.freedesktop.DBus.Error."
"""The prefix of the names of standard errors."""


class _Marshaller(Marshaller):
    """Writes a message, and does not refer to itself afterwards.

    That of dbus-next would keep a page of List in memory until a garbage collection.
    """

    def marshall(self) -> bytearray:
        data: bytearray = super().marshall()
        self.writers.clear()
        return data


dbus_message.Marshaller = _Marshaller  # type: ignore[attr-defined]


def check_signature(call: Call, members: dict[str, str]) -> None:
    """Check the argument types of a call; ``members`` has the right ones.

    Raises:
        DBusError: the member does not exist.
        InvalidArgument: the types are wrong.
    """
    takes = members.get(call.member)
    if takes is None:
        raise DBusError(
            f"{ERROR}UnknownMethod", f"{call.interface} has no method {call.member}: introspect it"
        )
    if call.signature != takes:
        raise InvalidArgument(
            f"{call.member} takes ({takes}) but was called with ({call.signature}):"
            " correct the argument types"
        )


class Answer(NamedTuple):
    """A marshalled message with its file descriptors."""

    data: bytearray
    fds: Sequence[int] = ()


def result(call: Call, signature: str, body: Body, serial: int) -> Answer:
    """Return the reply to a call; in the body of the type ``h`` is the fd itself."""
    fds = body if signature == "h" else []
    message = Message(
        message_type=MessageType.METHOD_RETURN,
        destination=call.sender,
        reply_serial=call.serial,
        signature=signature,
        body=[0] if fds else body,
        unix_fds=fds,
    )
    return Answer(marshalled(message, serial), fds)


def failure(call: Call, error: Exception, serial: int) -> Answer:
    """Return the error message for a failed call."""
    name, text = described(error)
    message = marshalled(
        Message(
            message_type=MessageType.ERROR,
            destination=call.sender,
            reply_serial=call.serial,
            error_name=name,
            signature="s",
            body=[text],
        ),
        serial,
    )
    return Answer(message)


def described(error: BaseException) -> tuple[str, str]:
    """Return the name on the bus of an error, and its message."""
    if isinstance(error, SnapdError):
        name, text = error_name(error), error.message
    elif isinstance(error, DBusError):
        name, text = error.type, error.text
    else:
        log.error("a call failed: %s", error, exc_info=error)
        name, text = (
            error_name(Internal()),
            "the call failed because of a bug: see the service's log",
        )
    # The bus would close the connection because of invalid text.
    return name, shown(text)


def marshalled(message: Message, serial: int) -> bytearray:
    """Return a message as bytes.

    Raises:
        ValueError: a text has a NUL, for which the bus would close the connection.
    """
    if _has_nul(message.body):
        raise ValueError(f"a NUL is in a message of the type ({message.signature})")
    message.serial = serial
    data: bytearray = message._marshall(negotiate_unix_fd=True)
    return data


def _has_nul(value: object) -> bool:
    if isinstance(value, str):
        return "\0" in value
    if isinstance(value, Variant):
        return _has_nul(value.value)
    if isinstance(value, Mapping):
        return any(_has_nul(key) or _has_nul(each) for key, each in value.items())
    return isinstance(value, (list, tuple)) and any(map(_has_nul, value))
