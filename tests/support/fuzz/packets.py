"""Messages as bytes, and a connection that sends any message that the bus permits."""

from __future__ import annotations

import array
import io
import os
import socket
import struct
from collections.abc import Callable
from dataclasses import dataclass, field
from types import TracebackType
from typing import Self

from dbus_next._private.marshaller import Marshaller
from dbus_next._private.unmarshaller import Unmarshaller
from dbus_next.constants import MessageFlag, MessageType
from dbus_next.message import Message
from dbus_next.signature import Variant

from snapd_native.wire.names import BUS_NAME, DRIVER, DRIVER_PATH, MANAGER, OBJECT_PATH
from snapd_native.wire.values import Body
from tests.support.service import HANG_TIMEOUT

_PATH, _INTERFACE, _MEMBER, _DESTINATION, _SIGNATURE = 1, 2, 3, 6, 8
_REPLIES = (MessageType.METHOD_RETURN, MessageType.ERROR)


@dataclass(frozen=True)
class Packet:
    """A call with any member, path, arguments, flags and header fields, valid or not."""

    member: str
    interface: str = MANAGER
    path: str = OBJECT_PATH
    signature: str = ""
    body: Body = field(default_factory=list)
    flags: int = 0
    extra: tuple[tuple[int, Variant], ...] = ()
    """Header fields that mean nothing in a call."""
    destination: str = BUS_NAME

    @property
    def wants_reply(self) -> bool:
        return not self.flags & MessageFlag.NO_REPLY_EXPECTED

    def marshalled(self, serial: int, fill_placeholder: Callable[[str], str]) -> bytes:
        """Return the message as bytes, after ``fill_placeholder`` for its path and its texts."""
        texts = [
            fill_placeholder(value) if isinstance(value, str) else value for value in self.body
        ]
        body = Marshaller(self.signature, texts).marshall()
        fields = [
            [_PATH, Variant("o", fill_placeholder(self.path))],
            [_MEMBER, Variant("s", self.member)],
            [_DESTINATION, Variant("s", self.destination)],
            *([code, value] for code, value in self.extra),
        ]
        if self.interface:
            fields.append([_INTERFACE, Variant("s", self.interface)])
        if self.signature:
            fields.append([_SIGNATURE, Variant("g", self.signature)])
        kind = MessageType.METHOD_CALL.value
        start = [ord("l"), kind, self.flags, 1, len(body), serial, fields]
        header = Marshaller("yyyyuua(yv)", start)
        header.marshall()
        header.align(8)
        return bytes(header.buffer + body)


class FuzzClient:
    """A blocking client of the bus. It keeps signals that arrive while it waits for a reply."""

    def __init__(self, address: str, fill_placeholder: Callable[[str], str] = str) -> None:
        self._fill_placeholder = fill_placeholder
        self._serial = 0
        self.signals: list[Message] = []
        """Signals that have arrived and that `signal` has not returned yet."""
        self._socket = socket.socket(socket.AF_UNIX)
        self._socket.settimeout(HANG_TIMEOUT)
        self._socket.connect(address.removeprefix("unix:path="))
        self._greet()
        (self.name,) = self.call(Packet("Hello", DRIVER, DRIVER_PATH, destination=DRIVER)).body

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        self._socket.close()

    def subscribe(self, rule: str) -> None:
        """Receive the signals that match ``rule``, too."""
        self.call(Packet("AddMatch", DRIVER, DRIVER_PATH, "s", [rule], destination=DRIVER))

    def send(self, packet: Packet) -> int:
        """Send a message, and return its serial."""
        self._serial += 1
        self._socket.sendall(packet.marshalled(self._serial, self._fill_placeholder))
        return self._serial

    def receive(self) -> Message:
        """Return the next message.

        Raises:
            EOFError: the bus has closed the connection.
            TimeoutError: nothing comes.
        """
        data, fds = self._read(16, b"")
        order = "<" if data[:1] == b"l" else ">"
        body, _, fields = struct.unpack_from(f"{order}III", data, 4)
        data, more = self._read(16 + (fields + 7) // 8 * 8 + body, data)
        for fd in fds + more:
            os.close(fd)
        message = Unmarshaller(io.BytesIO(data)).unmarshall()
        assert isinstance(message, Message)
        return message

    def next_reply(self) -> Message:
        """Wait for the next reply to a message of this connection, and keep signals."""
        while True:
            message = self.receive()
            if message.message_type is not MessageType.SIGNAL:
                assert message.message_type in _REPLIES, message.message_type
                return message
            self.signals.append(message)

    def call(self, packet: Packet) -> Message:
        """Send a message, and return its reply."""
        serial = self.send(packet)
        answer = self.next_reply()
        assert answer.reply_serial == serial, "the reply is to another call"
        return answer

    def signal(self, member: str) -> Message:
        """Wait for a signal, and return it."""
        while True:
            for message in self.signals:
                if message.member == member:
                    self.signals.remove(message)
                    return message
            message = self.receive()
            assert message.message_type is MessageType.SIGNAL, "a reply to no call"
            self.signals.append(message)

    def _greet(self) -> None:
        uid = str(os.geteuid()).encode().hex()
        self._socket.sendall(f"\0AUTH EXTERNAL {uid}\r\nNEGOTIATE_UNIX_FD\r\nBEGIN\r\n".encode())
        answers = b""
        while answers.count(b"\r\n") < 2:
            answers += self._received(1)[0]
        assert answers.startswith(b"OK "), answers
        assert answers.endswith(b"AGREE_UNIX_FD\r\n"), answers

    def _read(self, size: int, data: bytes) -> tuple[bytes, list[int]]:
        fds: list[int] = []
        while len(data) < size:
            more, passed = self._received(size - len(data))
            data += more
            fds += passed
        return data, fds

    def _received(self, size: int) -> tuple[bytes, list[int]]:
        data, ancillary, _, _ = self._socket.recvmsg(size, socket.CMSG_SPACE(64))
        if not data:
            raise EOFError("the bus has closed the connection")
        fds = array.array("i")
        for _, _, passed in ancillary:
            fds.frombytes(passed)
        return data, list(fds)
