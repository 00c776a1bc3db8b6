"""Hostile clients: they send any bytes to the bus, and read only on demand."""

from __future__ import annotations

import io
import os
import re
import socket
import struct
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path

from dbus_next._private.unmarshaller import Unmarshaller
from dbus_next.constants import MessageFlag, MessageType
from dbus_next.message import Message

from snapd_native.wire.names import BUS_NAME, DRIVER, DRIVER_PATH, MANAGER, OBJECT_PATH
from tests.support.service import HANG_TIMEOUT, Service
from tests.support.waiting import wait_until

MAX_OPEN_CALLS = 120
"""The approximate number of open calls that the bus permits to a connection."""


class RawClient:
    """A connection to the bus as the user ``uid``, over a plain socket."""

    def __init__(self, address: str, uid: int = 0) -> None:
        self.socket = socket.socket(socket.AF_UNIX)
        self.socket.settimeout(HANG_TIMEOUT)
        os.seteuid(uid)
        try:
            self.socket.connect(address.removeprefix("unix:path="))
        finally:
            os.seteuid(0)
        self._serial = 0
        self._unread = b""
        identity = str(uid).encode().hex()
        for line in (f"\0AUTH EXTERNAL {identity}", "NEGOTIATE_UNIX_FD", "BEGIN"):
            self.socket.sendall(f"{line}\r\n".encode())
            if line != "BEGIN":
                self._read_line()
        self.ask_driver("Hello")
        (self.name,) = next(iter(self.replies(1).values())).body

    def _read_line(self) -> None:
        line = b""
        while not line.endswith(b"\r\n"):
            line += self.socket.recv(1)

    def pack_call(
        self,
        member: str,
        signature: str = "",
        *body: object,
        path: str = OBJECT_PATH,
        interface: str = MANAGER,
        destination: str = BUS_NAME,
        flags: MessageFlag = MessageFlag.NONE,
    ) -> bytes:
        """Return a call as bytes. Each call has the next serial."""
        self._serial += 1
        message = Message(
            destination=destination,
            path=path,
            interface=interface,
            member=member,
            signature=signature,
            body=[*body],
            flags=flags,
            serial=self._serial,
        )
        return bytes(message._marshall())

    def ask_driver(self, member: str, signature: str = "", *body: object) -> None:
        """Call a method of the bus."""
        self.socket.sendall(
            self.pack_call(
                member, signature, *body, destination=DRIVER, path=DRIVER_PATH, interface=DRIVER
            )
        )

    def call(self, member: str, signature: str = "", *body: object, times: int = 1) -> None:
        """Call a method of the manager repeatedly, without reading replies."""
        for _ in range(times):
            self.socket.sendall(self.pack_call(member, signature, *body))

    def replies(self, count: int) -> dict[int, Message]:
        """Read ``count`` replies; return them by the serials of the calls."""
        found: dict[int, Message] = {}
        while len(found) < count:
            message = self._message()
            if message.message_type in (MessageType.METHOD_RETURN, MessageType.ERROR):
                found[message.reply_serial] = message
        return found

    def _message(self) -> Message:
        while len(self._unread) < 16 or len(self._unread) < _length(self._unread):
            data, fds, _, _ = socket.recv_fds(self.socket, 1 << 20, 16)
            assert data, "the bus has closed the connection"
            self._unread += data
            for fd in fds:
                os.close(fd)
        length = _length(self._unread)
        data, self._unread = self._unread[:length], self._unread[length:]
        message = Unmarshaller(io.BytesIO(data)).unmarshall()
        assert isinstance(message, Message)
        return message

    def close(self) -> None:
        self.socket.close()


def _length(data: bytes) -> int:
    """Return the length of the message that begins with ``data``."""
    order = "<" if data[:1] == b"l" else ">"
    body, _, header = struct.unpack_from(f"{order}III", data, 4)
    return 16 + int(header) + -int(header) % 8 + int(body)


@contextmanager
def connect_many(address: str, count: int, uid: int = 0) -> Iterator[Sequence[RawClient]]:
    """Yield ``count`` connections."""
    with ExitStack() as stack:
        made = []
        for _ in range(count):
            raw = RawClient(address, uid)
            stack.callback(raw.close)
            made.append(raw)
        yield made


def queued_at_bus(address: str, what: str = "Bytes") -> int:
    """Return how many bytes, or ``FDs``, the bus holds of messages that the service has sent."""
    with connect_many(address, 1) as (asking,):
        asking.socket.sendall(
            asking.pack_call(
                "GetConnectionStats",
                "s",
                BUS_NAME,
                destination=DRIVER,
                path=DRIVER_PATH,
                interface=f"{DRIVER}.Debug.Stats",
            )
        )
        (reply,) = asking.replies(1).values()
    (found,) = reply.body
    return int(found[f"Incoming{what}"].value)


def bus_pid(address: str) -> int:
    with connect_many(address, 1) as (asking,):
        asking.ask_driver("GetConnectionUnixProcessID", "s", DRIVER)
        (reply,) = asking.replies(1).values()
    return int(reply.body[0])


def error_names(replies: Iterable[Message]) -> set[str]:
    """Return the last part of the name of each error, and ``""`` for results."""
    return {(reply.error_name or "").rpartition(".")[2] for reply in replies}


def peak_memory(pid: int) -> int:
    """Return the peak memory of a process, in bytes."""
    status = Path(f"/proc/{pid}/status").read_text()
    return int(status.split("VmHWM:")[1].split()[0]) << 10


def wait_until_asleep(pid: int) -> None:
    """Wait until all threads of a process sleep, and none has run since the last check."""
    before: list[tuple[str, ...]] = []

    def is_asleep() -> bool:
        nonlocal before
        seen, before = (
            before,
            [
                tuple(
                    line
                    for line in status.read_text().splitlines()
                    if _SCHEDULER_FIELDS.match(line)
                )
                for status in sorted(Path(f"/proc/{pid}/task").glob("*/status"))
            ],
        )
        return seen == before and all(state.startswith("State:\tS") for state, *_ in before)

    wait_until(is_asleep, lambda: before)


_SCHEDULER_FIELDS = re.compile("State|voluntary_ctxt_switches|nonvoluntary_ctxt_switches")


def thread_count(service: Service) -> int:
    """Count the daemon's threads."""
    return len(os.listdir(f"/proc/{service.pid}/task"))
