"""Read incoming messages without trust in their senders.

dbus-next parses every body on the event loop, before the sender is authorised, and closes the
connection after an error. This module reads only the header at once. The body of a call is parsed
later, after the authorisation and in a worker thread.
"""

from __future__ import annotations

import io
import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from dbus_next._private.constants import PROTOCOL_VERSION
from dbus_next._private.unmarshaller import Unmarshaller
from dbus_next.constants import MessageFlag, MessageType
from dbus_next.message import Message
from dbus_next.signature import SignatureTree

from snapd_native.errors import InvalidArgument
from snapd_native.wire.names import DRIVER
from snapd_native.wire.values import Body

log = logging.getLogger(__name__)

MAX_CALL = 4 << 20
"""Bytes of the body of a call at most. The largest valid one has about half of that."""

MAX_SIGNATURES = 1000
"""Signatures that are kept in a cache."""

MAX_TEXT = 4096
"""Characters of a text that a person or a polkit rule gets at most."""

_END = io.BytesIO()
_TEXT = SignatureTree("s").types[0]
_HEADER = SignatureTree("a(yv)").types[0]
_PATH, _INTERFACE, _MEMBER, _REPLY_SERIAL, _SENDER, _SIGNATURE = 1, 2, 3, 5, 7, 8


@dataclass(frozen=True, slots=True)
class Call:
    """A method call. ``sender`` is the unique name of the caller, guaranteed by the bus."""

    serial: int
    flags: int
    sender: str
    path: str
    interface: str
    member: str
    signature: str
    size: int
    payload: bytes
    """The body; empty if its ``size`` is over `MAX_CALL`."""
    endian: int

    @property
    def wants_reply(self) -> bool:
        """Whether the caller waits for a reply."""
        return not self.flags & MessageFlag.NO_REPLY_EXPECTED

    @property
    def may_ask(self) -> bool:
        """Whether polkit may ask a person."""
        return bool(self.flags & MessageFlag.ALLOW_INTERACTIVE_AUTHORIZATION)

    def texts(self) -> list[str]:
        """Parse only the texts at the beginning of the body; none if the body is too large."""
        if self.size > MAX_CALL:
            return []
        parser = self._parser()
        count = len(self.signature) - len(self.signature.lstrip("s"))
        return [parser.read_argument(_TEXT) for _ in range(count)]

    def arguments(self) -> Body:
        """Parse the body.

        Raises:
            InvalidArgument: it is over `MAX_CALL` bytes.
        """
        if self.size > MAX_CALL:
            raise InvalidArgument(
                f"the call of {self.member} has {self.size} bytes: at most {MAX_CALL} are allowed"
            )
        parser = self._parser()
        return [parser.read_argument(t) for t in SignatureTree(self.signature).types]

    def _parser(self) -> Unmarshaller:
        parser = Unmarshaller(None)
        parser.buf = bytearray(self.payload)
        parser.endian = self.endian
        return parser


@dataclass(frozen=True, slots=True)
class Ignored:
    """A message that the service does not need."""


class Reader(Unmarshaller):
    """Reads one message: a `Call`, a signal or reply as `Message`, or `Ignored`."""

    def __init__(self, stream: io.BufferedIOBase, awaits: Callable[[int], bool]) -> None:
        """Read the replies to those calls for whose serials ``awaits`` returns true."""
        super().__init__(stream)
        self._awaits = awaits

    def _unmarshall(self) -> None:
        self.offset = 0
        self.read(16, prefetch=True)
        self.endian = self.buf[0]
        self.offset = 4
        body_length, _serial, header_length = (self.read_uint32() for _ in range(3))
        header_end = 16 + header_length + self._padding(header_length, 8)
        self.offset = 16
        self.read(header_end - 16 + body_length, prefetch=True)
        # The whole message is in the buffer, so the next one can be read even if this one is
        # malformed. A wrong length inside must not read into the next one.
        self.stream = _END
        try:
            self.message = self._parsed(body_length, header_end)
        except Exception as error:
            log.warning("a message that cannot be read was ignored: %s", error)
            self.message = Ignored()

    def _parsed(self, body_length: int, body: int) -> Call | Message | Ignored:
        endian, type_, flags, version = self.buf[:4]
        if version != PROTOCOL_VERSION:
            return Ignored()
        # dbus-next keeps every signature for ever, also those in variants of callers.
        if len(SignatureTree._cache) > MAX_SIGNATURES:
            SignatureTree._cache.clear()
        self.offset = 8
        serial = self.read_uint32()
        header = self.read_argument(_HEADER)
        fields: dict[int, Any] = {code: variant.value for code, variant in header}
        sender = fields.get(_SENDER, "")
        if type_ == MessageType.METHOD_CALL.value:
            return Call(
                serial=serial,
                flags=flags,
                sender=sender,
                path=fields[_PATH],
                interface=fields.get(_INTERFACE, ""),
                member=fields[_MEMBER],
                signature=fields.get(_SIGNATURE, ""),
                size=body_length,
                payload=bytes(self.buf[body:]) if body_length <= MAX_CALL else b"",
                endian=endian,
            )
        # Signals are accepted from the bus only. Replies are accepted from every service: the bus
        # delivers no other replies.
        is_reply = type_ in (MessageType.METHOD_RETURN.value, MessageType.ERROR.value)
        if sender != DRIVER and not (is_reply and self._awaits(fields.get(_REPLY_SERIAL, 0))):
            return Ignored()
        if type_ not in {kind.value for kind in MessageType}:
            return Ignored()
        self.message = None
        super()._unmarshall()
        return self.message  # type: ignore[return-value]
