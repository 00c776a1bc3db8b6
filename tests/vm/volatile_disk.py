"""Disks with a volatile write cache, for a machine whose power is cut.

A `Disk` is an NBD server for one raw image. Written data is safe only after a flush. When QEMU ends
without NBD_CMD_DISC, each write since the last flush is kept, lost or torn at a sector boundary, at
random. A real disk does the same when its power fails. The file of an ordinary virtual disk would
keep all writes of the guest's kernel.
"""

from __future__ import annotations

import os
import random
import socket
import struct
import threading
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

SECTOR = 512
_MAGIC = b"NBDMAGICIHAVEOPT"
_OPTION_REPLY = 0x3E889045565A9
_REQUEST, _REPLY = 0x25609513, 0x67446698
_GO, _ABORT = 7, 2
_ACK, _INFO, _UNSUPPORTED = 1, 3, 0x80000001
_READ, _WRITE, _GOODBYE, _FLUSH = range(4)
# Without FUA, the durable write, QEMU sends a write and a flush instead.
_HAS_FLAGS, _SEND_FLUSH = 1, 4
_EINVAL = 22


@dataclass(frozen=True, slots=True)
class _Write:
    offset: int
    before: bytes
    after: bytes


@dataclass(frozen=True, slots=True)
class Loss:
    """The effect of a power cut on one disk."""

    unflushed: int
    kept: int
    torn: int


class Disk:
    """One image, served to one client at a time on a port of 127.0.0.1."""

    def __init__(self, image: Path) -> None:
        self._file = os.open(image, os.O_RDWR)
        self._unflushed: list[_Write] = []
        self._listener = socket.create_server(("127.0.0.1", 0))
        self._gone = threading.Event()
        self.port: int = self._listener.getsockname()[1]
        self.random = random.Random()
        self.losses: list[Loss] = []
        self._thread = threading.Thread(target=self._serve, daemon=True)
        self._thread.start()

    def close(self) -> None:
        """End the server after its client has gone, and keep all written data."""
        # This ends accept(2). A thread that stays in it after the close gets the clients of another
        # server: when the kernel restarts the call, the descriptor can be that of a new socket.
        self._listener.shutdown(socket.SHUT_RDWR)
        self._thread.join()
        self._listener.close()
        os.close(self._file)

    def await_loss(self, count: int) -> Loss:
        """Wait for the ``count``-th end of a client without NBD_CMD_DISC; return its loss."""
        while len(self.losses) < count:
            if not self._gone.wait(60):
                raise TimeoutError("QEMU still holds its disk")
            self._gone.clear()
        return self.losses[count - 1]

    def _serve(self) -> None:
        while True:
            try:
                client, _ = self._listener.accept()
            except OSError:
                return
            with client, client.makefile("rb") as stream:
                client.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                connection = _Connection(client, stream)
                try:
                    if not connection.greet(os.fstat(self._file).st_size):
                        continue
                    self._transmit(connection)
                    self._unflushed.clear()
                except (EOFError, ConnectionError):
                    self.losses.append(self._cut())
                    self._gone.set()

    def _transmit(self, connection: _Connection) -> None:
        while True:
            kind, cookie, offset, length = connection.request()
            if kind == _READ:
                connection.reply(cookie, 0, os.pread(self._file, length, offset))
            elif kind == _WRITE:
                self._write(offset, connection.read(length))
                connection.reply(cookie)
            elif kind == _FLUSH:
                self._unflushed.clear()
                connection.reply(cookie)
            elif kind == _GOODBYE:
                return
            else:
                connection.reply(cookie, _EINVAL)

    def _write(self, offset: int, after: bytes) -> None:
        self._unflushed.append(_Write(offset, os.pread(self._file, len(after), offset), after))
        os.pwrite(self._file, after, offset)

    def _cut(self) -> Loss:
        """Undo all writes since the last flush, and then repeat a random part of them."""
        writes, self._unflushed = self._unflushed, []
        for write in reversed(writes):
            os.pwrite(self._file, write.before, write.offset)
        kept = torn = 0
        probability = self.random.choice([0.0, 0.5, 1.0])
        for write in writes:
            if self.random.random() < probability:
                kept += 1
                os.pwrite(self._file, write.after, write.offset)
            elif probability and len(write.after) > SECTOR:
                torn += 1
                size = self.random.randrange(0, len(write.after), SECTOR)
                os.pwrite(self._file, write.after[:size], write.offset)
        return Loss(len(writes), kept, torn)


class _Connection:
    """The protocol, see https://github.com/NetworkBlockDevice/nbd/blob/master/doc/proto.md."""

    def __init__(self, client: socket.socket, stream: BinaryIO) -> None:
        self._client = client
        self._stream = stream

    def read(self, size: int) -> bytes:
        data = self._stream.read(size)
        if len(data) < size:
            raise EOFError
        return data

    def greet(self, size: int) -> bool:
        """Negotiate; return False if the client aborts."""
        self._client.sendall(_MAGIC + struct.pack(">H", 1))
        self.read(4)
        while True:
            _, option, length = struct.unpack(">8sII", self.read(16))
            self.read(length)
            if option == _GO:
                flags = _HAS_FLAGS | _SEND_FLUSH
                self._answer(option, _INFO, struct.pack(">HQH", 0, size, flags))
                self._answer(option, _ACK)
                return True
            self._answer(option, _ACK if option == _ABORT else _UNSUPPORTED)
            if option == _ABORT:
                return False

    def _answer(self, option: int, kind: int, data: bytes = b"") -> None:
        head = struct.pack(">QIII", _OPTION_REPLY, option, kind, len(data))
        self._client.sendall(head + data)

    def request(self) -> tuple[int, int, int, int]:
        magic, _, kind, cookie, offset, length = struct.unpack(">IHHQQI", self.read(28))
        if magic != _REQUEST:
            raise ConnectionError("this is no request")
        return kind, cookie, offset, length

    def reply(self, cookie: int, error: int = 0, data: bytes = b"") -> None:
        self._client.sendall(struct.pack(">IIQ", _REPLY, error, cookie) + data)
