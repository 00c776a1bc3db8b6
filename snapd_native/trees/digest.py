"""Compute the digest of a tree."""

from __future__ import annotations

import errno
import hashlib
import os
import stat
from collections import deque
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import closing
from typing import TypeAlias

from snapd_native.trees.blocks import Blocks, open_blocks
from snapd_native.trees.descent import Descent
from snapd_native.trees.opened import changed, link_target
from snapd_native.trees.walk import Report, allocated

ALONE = 1 << 16
"""Bytes of a file up to which this thread hashes it; another thread would take longer."""

AHEAD = 64
"""Files at most that are open because their hashes are not ready."""

MOST_COMING = 4096
"""Entries at most that are kept because the hash of one before them is not ready."""

_Hashing: TypeAlias = tuple[list[bytes], Future[bytes]]
"""An entry whose last field is missing."""

BLOCK = 1 << 20
"""Bytes of a block. Each block of a file has a hash; a block of zeros is left out."""

_ZEROS = bytes(BLOCK)
_PATIENCE = 0.1
_LETTERS = {
    stat.S_IFREG: b"f",
    stat.S_IFDIR: b"d",
    stat.S_IFLNK: b"l",
    stat.S_IFCHR: b"c",
    stat.S_IFBLK: b"b",
    stat.S_IFIFO: b"p",
    stat.S_IFSOCK: b"s",
}


class Digester:
    r"""Hashes a canonical listing of a tree, while threads hash the contents of large files.

    The listing is depth first, and the entries of a directory are in byte order of names. Every
    part is a netstring, ``LENGTH:BYTES,``. An entry is a netstring of netstrings: the name, empty
    for the root; a letter for the type; the permissions in octal; uid; gid; the time of
    modification in nanoseconds; the extended attributes in order of names, as netstrings of names
    and values by turns; and for a file its size and the SHA-256 of a list of its blocks, for a
    symbolic link its target, for a device ``MAJOR:MINOR``. A further name of a file that was listed
    before is the name, ``h``, and the number of that file among those with several names. An empty
    netstring ends a directory.

    The list of blocks has a line, which ends with ``\n``, for each `BLOCK` of the file that is not
    all zeros: the offset, a space, and the SHA-256 of the block. So a hole takes no time, and holes
    and written zeros give the same digest. Numbers are decimal, hashes hexadecimal.
    """

    def __init__(self, report: Report, *, from_disk: bool = False) -> None:
        """With ``from_disk``, read files from the disk; see `Blocks`."""
        self._report = report
        self._from_disk = from_disk
        self._listing = hashlib.sha256()
        self._coming: deque[bytes | _Hashing] = deque()
        self._hashing = 0
        self._hashed: deque[int] = deque()
        self._linked: dict[tuple[int, int], tuple[int, int]] = {}
        self._numbers = 0

    @property
    def digest(self) -> bytes:
        """Return the digest in hexadecimal."""
        return self._listing.hexdigest().encode()

    def directory(self, root: int) -> None:
        """List the whole tree."""
        with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool, Descent(root) as here:
            self._add_directory("", root)
            levels = [_names(root)]
            while levels:
                if not levels[-1]:
                    self._add(_END)
                    levels.pop()
                    if levels:
                        here.up()
                    continue
                name = levels[-1].pop()
                status = os.stat(name, dir_fd=here.fd, follow_symlinks=False)
                number = self._number(status)
                if stat.S_ISDIR(status.st_mode):
                    here.down(name)
                    self._add_directory(name, here.fd)
                    levels.append(_names(here.fd))
                elif number is not None:
                    self._add(_listed([os.fsencode(name), b"h", b"%d" % number]))
                    self._report(0, 0)
                elif stat.S_ISREG(status.st_mode):
                    self._add_file(pool, name, here.fd)
                else:
                    self._add_special(name, here.fd, status)
            self._drain(0)

    def names(self, names: Sequence[str], directory: int) -> None:
        """Never called: the listing has one order, so that no peer can take a part."""
        raise NotImplementedError

    def _add_directory(self, name: str, directory: int) -> None:
        status = os.fstat(directory)
        self._add(_listed(_head(name, status, directory)))
        self._report(1, allocated(status))

    def _add_special(self, name: str, directory: int, status: os.stat_result) -> None:
        # The *xattrat calls need Linux 6.13: the directory's fd is reached as a path instead.
        fields = _head(name, status, f"/proc/self/fd/{directory}/{name}")
        if stat.S_ISLNK(status.st_mode):
            fields.append(os.fsencode(link_target(directory, name)))
        elif stat.S_ISCHR(status.st_mode) or stat.S_ISBLK(status.st_mode):
            fields.append(b"%d:%d" % (os.major(status.st_rdev), os.minor(status.st_rdev)))
        self._add(_listed(fields))
        self._report(1, allocated(status))

    def _add_file(self, pool: ThreadPoolExecutor, name: str, directory: int) -> None:
        fd = open_blocks(directory, name, from_disk=self._from_disk)
        try:
            status = os.fstat(fd)
            if not stat.S_ISREG(status.st_mode):
                raise changed()
            fields = [*_head(name, status, fd), b"%d" % status.st_size]
            if status.st_size > ALONE:
                content = pool.submit(self._hash, fd, status)
                self._hashing += 1
                fd = -1
                self._add((fields, content))
            else:
                self._add(_listed([*fields, self._hash(os.dup(fd), status)]))
        finally:
            if fd >= 0:
                os.close(fd)
        self._report(1, self._progress())

    def _hash(self, fd: int, status: os.stat_result) -> bytes:
        """Hash a file, up to the size in ``status``, and close it."""
        blocks = hashlib.sha256()
        size = allocated(status)
        offset = 0
        with closing(Blocks(fd, min(BLOCK, status.st_size))) as file:
            while offset < status.st_size and (start := _data(fd, offset)) is not None:
                offset = start // BLOCK * BLOCK
                # The kernel refuses to read behind the largest possible offset.
                block = file.read(offset, min(BLOCK, status.st_size - offset))
                if block != _ZEROS[: len(block)]:
                    blocks.update(b"%d %b\n" % (offset, hashlib.sha256(block).hexdigest().encode()))
                self._hashed.append(min(len(block), size))
                size -= min(len(block), size)
                offset += BLOCK
        self._hashed.append(size)
        return blocks.hexdigest().encode()

    def _number(self, status: os.stat_result) -> int | None:
        """Return the number of a file that was listed under another name; None if it was not."""
        if status.st_nlink == 1 or stat.S_ISDIR(status.st_mode):
            return None
        # Subvolumes of btrfs have devices of their own, and inode numbers in common.
        file = (status.st_dev, status.st_ino)
        if file not in self._linked:
            self._numbers += 1
            self._linked[file] = (self._numbers, status.st_nlink - 1)
            return None
        number, left = self._linked.pop(file)
        # A file is forgotten with its last name, to save memory.
        if left > 1:
            self._linked[file] = (number, left - 1)
        return number

    def _add(self, part: bytes | _Hashing) -> None:
        self._coming.append(part)
        self._drain(MOST_COMING)

    def _drain(self, most: int) -> None:
        """Hash the complete entries of the listing; wait if too many are incomplete."""
        while self._coming:
            part = self._coming[0]
            if not isinstance(part, bytes):
                fields, content = part
                must = len(self._coming) > most or self._hashing > AHEAD
                while must and not content.done():
                    wait([content], _PATIENCE)
                    self._report(0, self._progress())
                if not content.done():
                    return
                self._hashing -= 1
                part = _listed([*fields, content.result()])
            self._listing.update(part)
            self._coming.popleft()

    def _progress(self) -> int:
        """Return the number of bytes that were hashed since the last call."""
        size = 0
        while self._hashed:
            size += self._hashed.popleft()
        return size


def _data(fd: int, offset: int) -> int | None:
    """Return the offset of the next data of a file; None if the rest is a hole."""
    try:
        return os.lseek(fd, offset, os.SEEK_DATA)
    except OSError as error:
        if error.errno != errno.ENXIO:
            raise
        return None


def _netstring(data: bytes) -> bytes:
    return b"%d:%b," % (len(data), data)


_END = _netstring(b"")


def _listed(fields: Sequence[bytes]) -> bytes:
    return _netstring(b"".join(map(_netstring, fields)))


def _head(name: str, status: os.stat_result, target: int | str) -> list[bytes]:
    """Return the fields of every entry; ``target`` is an fd or a path of it."""
    attributes = b""
    follow = isinstance(target, int)
    for attribute in sorted(os.listxattr(target, follow_symlinks=follow)):
        value = os.getxattr(target, attribute, follow_symlinks=follow)
        attributes += _netstring(os.fsencode(attribute)) + _netstring(value)
    return [
        os.fsencode(name),
        _LETTERS[stat.S_IFMT(status.st_mode)],
        b"%o" % stat.S_IMODE(status.st_mode),
        b"%d" % status.st_uid,
        b"%d" % status.st_gid,
        b"%d" % status.st_mtime_ns,
        attributes,
    ]


def _names(directory: int) -> list[str]:
    """Return the names in a directory, in reverse order."""
    return sorted(os.listdir(directory), key=os.fsencode, reverse=True)
