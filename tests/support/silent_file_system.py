"""A FUSE file system whose process stops answering; see fuse(4)."""

from __future__ import annotations

import ctypes
import errno
import os
import stat
import struct
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

_HEADER = struct.Struct("=IIQQIIIHH")
"""``struct fuse_in_header``: length, opcode, request, inode; uid, gid and pid of the caller."""
_ANSWER = struct.Struct("=IiQ")
"""``struct fuse_out_header``."""
_ATTRIBUTES = struct.Struct("=QQQQQQIIIIIIIIII")
"""``struct fuse_attr``."""
_INIT = struct.Struct("=IIIIHHIIHHI28x")
"""``struct fuse_init_out``."""

_LOOKUP, _FORGET, _GETATTR, _INITIALISE, _BATCH_FORGET = 1, 2, 3, 26, 42
_ROOT = 1


class SilentFileSystem:
    """A mount in which every path is a directory, as long as its process answers.

    Nothing is cached, so the kernel asks again for each component of each path.
    """

    def __init__(self, root: Path) -> None:
        self.root = root
        self._device = os.open("/dev/fuse", os.O_RDWR | os.O_CLOEXEC)
        self._answering = threading.Event()
        self._answering.set()
        self._asked = threading.Event()
        options = f"fd={self._device},rootmode=40000,user_id=0,group_id=0,allow_other"
        libc = ctypes.CDLL(None, use_errno=True)
        if libc.mount(b"test", os.fsencode(root), b"fuse", 0, options.encode()) < 0:
            raise OSError(ctypes.get_errno(), "mount")
        self._thread = threading.Thread(target=self._serve)
        self._thread.start()

    def stop_answering(self) -> None:
        """Answer nothing from now on."""
        self._asked.clear()
        self._answering.clear()

    def was_asked(self) -> bool:
        """Return whether the kernel has sent a request since `stop_answering`."""
        return self._asked.is_set()

    def wait_until_asked(self, seconds: float) -> None:
        """Wait until the kernel has sent a request since `stop_answering`."""
        assert self._asked.wait(seconds)

    def answer(self) -> None:
        """Answer the waiting requests, and all later ones."""
        self._answering.set()

    def close(self) -> None:
        """Answer again, unmount the file system, and wait for the end of the thread."""
        self.answer()
        ctypes.CDLL(None).umount2(os.fsencode(self.root), 2)
        self._thread.join()
        os.close(self._device)

    def _serve(self) -> None:
        while True:
            try:
                request = os.read(self._device, 1 << 17)
            except OSError as error:
                if error.errno == errno.ENOENT:
                    # The process that caused the request was interrupted.
                    continue
                # ENODEV: the file system is unmounted.
                return
            _, opcode, number, inode, *_ = _HEADER.unpack_from(request)
            if opcode in (_FORGET, _BATCH_FORGET):
                continue
            self._asked.set()
            self._answering.wait()
            code, body = self._reply(opcode, inode, request[_HEADER.size :])
            try:
                answer = _ANSWER.pack(_ANSWER.size + len(body), -code, number)
                os.write(self._device, answer + body)
            except FileNotFoundError:
                # No process waits for the answer any more.
                continue

    def _reply(self, opcode: int, inode: int, argument: bytes) -> tuple[int, bytes]:
        if opcode == _INITIALISE:
            return 0, _INIT.pack(7, 31, 0, 0, 0, 0, 4096, 0, 0, 0, 0)
        if opcode == _GETATTR:
            return 0, struct.pack("=QII", 0, 0, 0) + self._attributes(inode)
        if opcode == _LOOKUP:
            # A name always has the same inode.
            found = _ROOT + 1 + sum(argument.rstrip(b"\0"))
            return 0, struct.pack("=QQQQII", found, 0, 0, 0, 0, 0) + self._attributes(found)
        return errno.ENOSYS, b""

    def _attributes(self, inode: int) -> bytes:
        mode = stat.S_IFDIR | 0o755
        return _ATTRIBUTES.pack(inode, *(0,) * 5, *(0,) * 3, mode, 2, 0, 0, 0, 4096, 0)


@contextmanager
def silent_file_system(root: Path) -> Iterator[SilentFileSystem]:
    """Mount a `SilentFileSystem` on a new directory ``root``."""
    root.mkdir()
    file_system = SilentFileSystem(root)
    try:
        yield file_system
    finally:
        file_system.close()
        root.rmdir()
