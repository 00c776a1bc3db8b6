"""The service's connection to the bus."""

from __future__ import annotations

from collections.abc import Callable

from dbus_next.message import Message

from snapd_native.bus.incoming import Call, Ignored, Reader
from snapd_native.wire.connection import Connection


class ServiceConnection(Connection):
    """Hands every method call to ``on_call``, none to dbus-next's own dispatch."""

    def __init__(self, on_call: Callable[[Call], None]) -> None:
        """Open the socket; raises as `Connection`."""
        super().__init__()
        self._on_call = on_call

    def send_marshalled(self, message: bytes) -> None:
        """Send a message that was marshalled elsewhere; it is dropped when the bus is gone."""
        if self.connected:
            self._writer.messages.put_nowait((message, [], None))
            self._writer.schedule_write()

    def _create_unmarshaller(self) -> Reader:
        return Reader(self._stream)

    def _on_message(self, message: Call | Message | Ignored) -> None:
        if isinstance(message, Call):
            self._on_call(message)
        elif isinstance(message, Message):
            super()._on_message(message)
