"""A connection to the system bus that notices when the bus is gone."""

from __future__ import annotations

import array
import asyncio
import os
import socket
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

from dbus_next.aio.message_bus import MessageBus, _MessageWriter
from dbus_next.constants import BusType, MessageFlag, MessageType
from dbus_next.errors import AuthError, DBusError, SignatureBodyMismatchError
from dbus_next.message import Message
from dbus_next.signature import Variant

from snapd_native.errors import InvalidArgument, Unavailable
from snapd_native.model import quote
from snapd_native.wire.names import DRIVER, DRIVER_PATH, error_from
from snapd_native.wire.values import Body

CONNECT_SECONDS = 10.0
"""Seconds that the bus may take to answer the greeting."""

SYSTEM_BUS = "unix:path=/var/run/dbus/system_bus_socket"
"""The address that D-Bus specifies for the system bus."""


class Connection(MessageBus):
    """dbus-next's connection to the system bus, or to ``DBUS_SYSTEM_BUS_ADDRESS``."""

    _writer: _Writer

    def __init__(self) -> None:
        """Open the socket.

        Raises:
            Unavailable: there is no bus.
        """
        try:
            super().__init__(bus_type=BusType.SYSTEM, negotiate_unix_fd=True)
        except (OSError, ValueError, DBusError) as error:
            raise Unavailable(
                f"the system bus cannot be reached ({error}): start dbus,"
                " or set DBUS_SYSTEM_BUS_ADDRESS"
            ) from None
        self._writer = _Writer(self)

    async def open(self) -> None:
        """Connect to the bus.

        Raises:
            Unavailable: it does not answer.
        """
        try:
            await asyncio.wait_for(self.connect(), CONNECT_SECONDS)
        except (OSError, EOFError, TimeoutError, AuthError) as error:
            self._finalize()
            address = os.environ.get("DBUS_SYSTEM_BUS_ADDRESS", SYSTEM_BUS)
            raise Unavailable(
                f"the system bus at {address} does not answer ({_reason(error)}): restart dbus"
            ) from None

    def disconnect(self) -> None:
        """Close the connection; calls that still wait fail with Unavailable."""
        self._user_disconnect = True
        self._finalize()

    @contextmanager
    def watched(self, on_loss: Callable[[], None]) -> Iterator[None]:
        """Call ``on_loss`` when the connection is closed by either side during the block."""

        def closed(_: asyncio.Future[None]) -> None:
            on_loss()

        self._disconnect_future.add_done_callback(closed)
        try:
            yield
        finally:
            self._disconnect_future.remove_done_callback(closed)

    async def request(
        self,
        destination: str,
        path: str,
        interface: str,
        member: str,
        signature: str = "",
        body: Body | None = None,
    ) -> Body:
        """Call a method and return the result.

        If the result is a file descriptor, the caller closes it. Other programs do not inherit it.

        Raises:
            SnapdError: the D-Bus error, translated; Unavailable if the connection is lost;
                InvalidArgument if D-Bus cannot carry an argument.
        """
        _check_text(body)
        message = Message(
            destination=destination,
            path=path,
            interface=interface,
            member=member,
            signature=signature,
            body=body or [],
        )
        try:
            reply = await self.call(message) if self.connected else None
        except SignatureBodyMismatchError as error:
            raise InvalidArgument(f"{member} cannot be called like this: {error}") from None
        except (OSError, EOFError) as error:
            raise Unavailable(f"the system bus is gone ({error}): try again") from None
        if reply is None:
            raise Unavailable("the system bus is gone: try again")
        if reply.message_type is MessageType.ERROR:
            text = reply.body[0] if reply.signature.startswith("s") else ""
            raise error_from(reply.error_name, text, destination)
        return [reply.unix_fds[reply.body[0]].take()] if reply.signature == "h" else reply.body

    async def ask_driver(self, member: str, signature: str, body: Body) -> Body:
        """Call a method of the bus itself."""
        return await self.request(DRIVER, DRIVER_PATH, DRIVER, member, signature, body)

    def tell(
        self,
        destination: str,
        path: str,
        interface: str,
        member: str,
        signature: str,
        body: Body,
    ) -> None:
        """Call a method without waiting for the reply; errors are ignored."""
        if self.connected:
            self.send(
                Message(
                    destination=destination,
                    path=path,
                    interface=interface,
                    member=member,
                    flags=MessageFlag.NO_REPLY_EXPECTED,
                    signature=signature,
                    body=body,
                )
            )

    def tell_driver(self, member: str, signature: str, body: Body) -> None:
        """Call a method of the bus itself without waiting for the reply."""
        self.tell(DRIVER, DRIVER_PATH, DRIVER, member, signature, body)

    def _on_message(self, message: Message) -> None:
        # dbus-next leaves fds open that are not taken. Its reader refers to itself, and would
        # keep the message until a garbage collection.
        message.unix_fds = [_Passed(fd) for fd in message.unix_fds]  # type: ignore[misc]
        self._unmarshaller.message = None
        self._unmarshaller.unix_fds = []
        super()._on_message(message)

    def _on_written(self) -> None:
        """Do what is to be done when the bus has taken all that was sent."""

    def _finalize(self, err: Exception | None = None) -> None:
        if self._disconnected:
            return
        super()._finalize(err)
        # The fds of an incomplete message.
        for fd in self._unmarshaller.unix_fds:
            os.close(fd)
        self._unmarshaller.unix_fds = []
        # asyncio logs an exception that is never retrieved.
        if not self._disconnect_future.cancelled():
            self._disconnect_future.exception()
        # dbus-next leaves the socket to the garbage collector.
        self._stream.close()
        self._sock.close()

    async def _auth_readline(self) -> str:
        # The method of dbus-next loops for ever if the bus closes the socket before it answers.
        line = b""
        while not line.endswith(b"\r\n"):
            byte = await self._loop.sock_recv(self._sock, 1)
            if not byte:
                raise EOFError("it closed the connection")
            line += byte
        return line[:-2].decode()


class _Passed:
    """A file descriptor of a message. It is closed with the message unless it is taken."""

    def __init__(self, fd: int) -> None:
        self._fd = fd
        os.set_inheritable(fd, False)

    def take(self) -> int:
        fd, self._fd = self._fd, -1
        return fd

    def __del__(self) -> None:
        if self._fd >= 0:
            os.close(self._fd)


class _Writer(_MessageWriter):
    """Sends queued messages as fast as the bus reads them.

    The writer of dbus-next ends the connection if the socket is full between two messages.
    """

    def __init__(self, bus: Connection) -> None:
        super().__init__(bus)
        self.waiting = 0
        """Bytes of the messages that the bus has not begun to read."""

    def put(self, data: bytearray, fds: Sequence[int], sent: asyncio.Future[None] | None) -> None:
        """Queue a message; the future is done when it is sent."""
        self.waiting += len(data)
        self.messages.put_nowait((data, [*fds], sent))

    def buffer_message(self, msg: Message, future: asyncio.Future[None] | None = None) -> None:
        data: bytearray = msg._marshall(negotiate_unix_fd=self.negotiate_unix_fd)
        self.put(data, msg.unix_fds or (), future)

    def write_callback(self) -> None:
        try:
            while buf := self.buf or self._take():
                self._send(buf)
            self.loop.remove_writer(self.fd)
            self.bus._on_written()
        except BlockingIOError:
            return  # The event loop calls again when the socket has room.
        except Exception as error:
            if self.fut is not None and not self.fut.done():
                self.fut.set_exception(error)
            self.bus._finalize(error)

    def _take(self) -> memoryview | None:
        if self.messages.empty():
            return None
        data, self.unix_fds, self.fut = self.messages.get_nowait()
        self.waiting -= len(data)
        self.buf, self.offset = memoryview(data), 0
        return self.buf

    def _send(self, buf: memoryview) -> None:
        rest = buf[self.offset :]
        if self.unix_fds and self.negotiate_unix_fd:
            fds = array.array("i", self.unix_fds)
            self.offset += self.sock.sendmsg([rest], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, fds)])
            self.unix_fds = None
        else:
            self.offset += self.sock.send(rest)
        if self.offset >= len(buf):
            self.buf = None
            if self.fut is not None and not self.fut.done():
                self.fut.set_result(None)


def _reason(error: Exception) -> str:
    """Say why a bus did not accept a connection; some exceptions have no text."""
    match error:
        case TimeoutError():
            return f"no reply within {CONNECT_SECONDS} s"
        case EOFError():
            return "it has closed the connection"
        case OSError(strerror=str(reason)):
            return reason.lower()
        case _:
            return str(error)


def _check_text(value: object) -> None:
    """Refuse text that D-Bus does not allow: the bus would close the connection.

    Raises:
        InvalidArgument: a text in ``value`` is not UTF-8 or has a NUL character.
    """
    if isinstance(value, str):
        if "\0" in value or any("\ud800" <= char <= "\udfff" for char in value):
            raise InvalidArgument(
                f"{quote(value)} is not valid UTF-8 without NUL characters: correct it"
            )
    elif isinstance(value, Variant):
        _check_text(value.value)
    elif isinstance(value, dict):
        _check_text([*value, *value.values()])
    elif isinstance(value, list):
        for item in value:
            _check_text(item)
