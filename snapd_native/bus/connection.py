"""The service's connection to the bus."""

from __future__ import annotations

import asyncio
import os
import threading
from collections.abc import Callable, Sequence

from dbus_next.message import Message

from snapd_native.bus.incoming import Call, Ignored, Reader
from snapd_native.wire.connection import Connection

AT_ONCE = 32
"""Messages that are read before other work gets its turn."""

MOST_WAITING = 8 << 20
"""Bytes of replies that the bus has not read, beyond which no more calls are read."""

MOST_PASSING = 256
"""File descriptors of these replies at most."""


class ServiceConnection(Connection):
    """Passes every method call to ``on_call``, instead of dbus-next's own dispatch.

    The bus stops reading while too many messages wait for clients that do not read. Then no calls
    are read and `bus_reads` is not set, so that memory does not grow.
    """

    def __init__(self, on_call: Callable[[Call], None]) -> None:
        """Open the socket; raises as `Connection`."""
        super().__init__()
        self._on_call = on_call
        self._passing: dict[asyncio.Future[None], Sequence[int]] = {}
        self._reading_on = False
        self._leaving = False
        self.bus_reads = threading.Event()
        self.bus_reads.set()

    def leave(self) -> None:
        """Do not wait for room any more, because calls are only refused from now on."""
        self._leaving = True
        self._on_written()

    def send_marshalled(self, message: bytearray, fds: Sequence[int] = ()) -> None:
        """Send a marshalled message with ``fds``, and close the fds.

        The message is dropped if the connection is lost.
        """
        if not self.connected:
            close(fds)
            return
        sent = asyncio.get_running_loop().create_future() if fds else None
        if sent:
            self._passing[sent] = fds
            sent.add_done_callback(self._close_passed)
        self._writer.put(message, fds, sent)
        self._writer.schedule_write()
        is_full = self._writer.waiting > MOST_WAITING or len(self._passing) > MOST_PASSING
        if is_full and not self._leaving:
            self.bus_reads.clear()

    def _close_passed(self, sent: asyncio.Future[None]) -> None:
        close(self._passing.pop(sent, ()))
        if not sent.cancelled():
            sent.exception()

    def _on_written(self) -> None:
        if not self.bus_reads.is_set():
            self.bus_reads.set()
            self._loop.add_reader(self._fd, self._message_reader)
            self._message_reader()

    def _finalize(self, err: Exception | None = None) -> None:
        super()._finalize(err)
        self.bus_reads.set()
        for sent in list(self._passing):
            close(self._passing.pop(sent))

    def _message_reader(self) -> None:
        if not self._reading_on:
            self._read_on()

    def _read_on(self) -> None:
        # dbus-next reads while messages come: in a flood nothing else would be done.
        self._reading_on = False
        if self._disconnected:
            return
        if not self.bus_reads.is_set():
            self._loop.remove_reader(self._fd)
            return
        try:
            for _ in range(AT_ONCE):
                if not self._unmarshaller.unmarshall():
                    return
                self._on_message(self._unmarshaller.message)
                self._unmarshaller = self._create_unmarshaller()
        except Exception as error:
            self._finalize(error)
            return
        # The event loop does not report data that the stream has already buffered.
        self._reading_on = True
        self._loop.call_soon(self._read_on)

    def _create_unmarshaller(self) -> Reader:
        # Without a buffer for them, the kernel drops file descriptors that clients send.
        return Reader(self._stream, self._method_return_handlers.__contains__)

    def _on_message(self, message: Call | Message | Ignored) -> None:
        self._unmarshaller.message = None
        if isinstance(message, Call):
            self._on_call(message)
        elif isinstance(message, Message):
            super()._on_message(message)


def close(fds: Sequence[int]) -> None:
    """Close file descriptors."""
    for fd in fds:
        os.close(fd)
