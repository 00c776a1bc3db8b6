"""The service's connection to the bus."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable, Sequence

from dbus_next.message import Message

from snapd_native.bus.incoming import Call, Ignored, Reader
from snapd_native.wire.connection import Connection


class ServiceConnection(Connection):
    """Hands every method call to ``on_call``, none to dbus-next's own dispatch."""

    def __init__(self, on_call: Callable[[Call], None]) -> None:
        """Open the socket; raises as `Connection`."""
        super().__init__()
        self._on_call = on_call
        self._passing: dict[asyncio.Future[None], Sequence[int]] = {}

    def send_marshalled(self, message: bytes, fds: Sequence[int] = ()) -> None:
        """Send a message that was marshalled elsewhere; it is dropped when the bus is gone.

        With it go ``fds``, which are closed here, whatever happens.
        """
        if not self.connected:
            close(fds)
            return
        sent = asyncio.get_running_loop().create_future() if fds else None
        if sent:
            self._passing[sent] = fds
            sent.add_done_callback(self._close_passed)
        self._writer.messages.put_nowait((message, [*fds], sent))
        self._writer.schedule_write()

    def _close_passed(self, sent: asyncio.Future[None]) -> None:
        close(self._passing.pop(sent, ()))
        if not sent.cancelled():
            sent.exception()

    def _finalize(self, err: Exception | None = None) -> None:
        super()._finalize(err)
        for sent in list(self._passing):
            close(self._passing.pop(sent))

    def _create_unmarshaller(self) -> Reader:
        # Without room for them, the kernel drops file descriptors that strangers send.
        return Reader(self._stream, self._method_return_handlers.__contains__)

    def _on_message(self, message: Call | Message | Ignored) -> None:
        self._unmarshaller.message = None
        if isinstance(message, Call):
            self._on_call(message)
        elif isinstance(message, Message):
            super()._on_message(message)


def close(fds: Sequence[int]) -> None:
    """Close file descriptors that are not wanted any more."""
    for fd in fds:
        os.close(fd)
