"""A tree with everything in it that a copy can get wrong, and a comparison of trees."""

from __future__ import annotations

import errno
import os
import stat
import subprocess
from collections import defaultdict
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from snapd_native import linux, trees

NAMES = (
    b"not utf-8 \xff\xfe",
    b"new\nline",
    b"-rf",
    b" spaces  ",
    b"n" * 255,
    "😀".encode(),
    b"*",
    b"back\\slash",
    b"..hidden",
    b"...",
    b"\x01\x7f",
)
"""Names that a careless program handles wrongly."""

RESERVED = (".links", ".links-", ".links-0", ".links-1")
"""Names that a copy might use for its own files."""

TIMES = (
    -(1 << 40),  # File systems clamp times that they cannot store: ext4 and xfs to 1901.
    -(1 << 31) + 1,
    -1,
    0,
    (1 << 31) - 1,
    1 << 31,
    15_032_385_535,  # 2446, the last second of ext4.
    1 << 40,  # 2446 on ext4, 2486 on xfs.
)
"""Seconds since the Unix epoch at the edges of what can be stored."""

_RSYNC = """
for tree; do
    mount --bind "$tree" "$tree"
    mount -o remount,bind,ro,noatime "$tree"
done
exec rsync -aHAXn --numeric-ids --delete --itemize-changes "$1/" "$2/"
"""


def build(root: Path) -> None:
    """Make the torture tree in the directory ``root``; create ``root`` if missing. Needs root."""
    root.mkdir(exist_ok=True)
    _types(root)
    _links(root)
    _data(root)
    _owners_and_modes(root)
    _acls(root)
    _xattrs(root)
    _names(root)
    os.chown(root, 1000, 4294967294)
    root.chmod(0o3751)
    _times(root)


def _types(root: Path) -> None:
    here = root / "types"
    here.mkdir()
    (here / "regular").write_bytes(b"regular\n")
    (here / "empty").touch()
    (here / "directory").mkdir()
    (here / "directory" / "child").write_bytes(b"child\n")
    (here / "empty directory").mkdir()
    (here / "symlink").symlink_to("regular")
    (here / "dangling").symlink_to("nowhere/at all")
    (here / "absolute").symlink_to("/etc/passwd")
    (here / "to a directory").symlink_to("..")
    (here / "to itself").symlink_to("to itself")
    (here / "symlink of 1023").symlink_to("s" * 1023)
    try:
        (here / "symlink of 4095").symlink_to("s" * 4095)
    except OSError as error:
        if error.errno != errno.ENAMETOOLONG:  # xfs permits at most 1023 bytes.
            raise
    os.mkfifo(here / "fifo")
    os.mknod(here / "socket", stat.S_IFSOCK | 0o755)
    os.mknod(here / "block", stat.S_IFBLK | 0o660, os.makedev(7, 262143))
    os.mknod(here / "character", stat.S_IFCHR | 0o666, os.makedev(1, 3))
    os.mknod(here / "whiteout", stat.S_IFCHR, os.makedev(0, 0))


def _links(root: Path) -> None:
    """Make hard links to entries of each type, each link in another directory."""
    first, second = root / "links", root / "more links"
    (first / "deep" / "deeper").mkdir(parents=True)
    second.mkdir()
    (first / "file").write_bytes(b"linked\n" * 1000)
    (first / "nothing").touch()
    (first / "symlink").symlink_to("file")
    os.mkfifo(first / "fifo")
    os.mknod(first / "socket", stat.S_IFSOCK | 0o600)
    os.mknod(first / "character", stat.S_IFCHR | 0o640, os.makedev(1, 5))
    os.mknod(first / "block", stat.S_IFBLK | 0o640, os.makedev(259, 7))
    os.mknod(first / "whiteout", stat.S_IFCHR, os.makedev(0, 0))
    for entry in sorted(first.iterdir()):
        if entry.name != "deep":
            os.link(entry, second / f"{entry.name}, too", follow_symlinks=False)
            os.link(entry, first / "deep" / "deeper" / entry.name, follow_symlinks=False)
    os.link(first / "file", root / "linked at the root")
    many = first / "many"
    many.mkdir()
    (many / "0").write_bytes(b"many\n")
    for number in range(1, 400):
        os.link(many / "0", many / str(number))
    os.link(many / "0", second / "one of many")


def _data(root: Path) -> None:
    here = root / "data"
    here.mkdir()
    block = bytes(range(256)) * 16
    layouts: Mapping[str, tuple[int, tuple[int, ...]]] = {
        "hole at the start": (1 << 20, ((1 << 20) - 4096,)),
        "hole in the middle": (1 << 20, (0, (1 << 20) - 4096)),
        "hole at the end": (1 << 20, (0,)),
        "all hole": (1 << 20, ()),
        "odd size": ((1 << 20) + 12345, (8192, 1 << 20)),
        "many holes": (4 << 20, tuple(range(0, 4 << 20, 65536))),
        "huge": (1 << 40, (0, 1 << 32, (1 << 39) + 4096, (1 << 40) - 4096)),
    }
    for name, (size, positions) in layouts.items():
        with (here / name).open("wb") as file:
            file.truncate(size)
            for position in positions:
                os.pwrite(file.fileno(), block, position)
    (here / "dense").write_bytes(block * 1024 + b"tail")
    (here / "zeros").write_bytes(bytes(65536))
    with (here / "preallocated").open("wb") as file:
        file.write(b"short\n")
    preallocated = ["--keep-size", "--length", "1M", str(here / "preallocated")]
    subprocess.run(["fallocate", *preallocated], check=True)
    unwritten = ["--length", "1M", str(here / "unwritten")]
    subprocess.run(["fallocate", *unwritten], check=True)


def _owners_and_modes(root: Path) -> None:
    here = root / "owners"
    here.mkdir()
    for number, (uid, gid) in enumerate(
        [(1, 0), (0, 1), (1000, 1000), (65534, 65535), (2147483648, 65536), (4294967294,) * 2]
    ):
        for name in (f"file {number}", f"directory {number}", f"symlink {number}"):
            path = here / name
            if name.startswith("file"):
                path.touch()
            elif name.startswith("directory"):
                path.mkdir()
            else:
                path.symlink_to("x")
            os.chown(path, uid, gid, follow_symlinks=False)
        os.mkfifo(here / f"fifo {number}")
        os.chown(here / f"fifo {number}", uid, gid)
    here = root / "modes"
    here.mkdir()
    for mode in (0o0, 0o1, 0o444, 0o1644, 0o2755, 0o2644, 0o4755, 0o6755, 0o7777):
        for name, owner in ((f"{mode:o}", 0), (f"{mode:o} of 7", 7)):
            (here / name).write_bytes(b"mode\n")
            (here / f"{name}.d").mkdir()
            (here / f"{name}.d" / "child").touch()
            os.mkfifo(here / f"{name}.fifo")
            for path in (here / name, here / f"{name}.d", here / f"{name}.fifo"):
                os.chown(path, owner, owner)
                path.chmod(mode)
    setgid = here / "setgid of another group"
    setgid.mkdir()
    os.chown(setgid, 0, 4321)
    setgid.chmod(0o2775)
    (setgid / "inherits").mkdir()
    (setgid / "file").touch()
    (setgid / "file of root").touch()
    os.chown(setgid / "file of root", 0, 0)
    read_only = here / "read-only"
    read_only.mkdir()
    (read_only / "child").write_bytes(b"child\n")
    (read_only / "directory").mkdir()
    (read_only / "directory").chmod(0o555)
    read_only.chmod(0o555)


def _acls(root: Path) -> None:
    here = root / "acls"
    here.mkdir()
    for name in ("file", "setuid", "other owner"):
        (here / name).touch()
    (here / "directory" / "below").mkdir(parents=True)
    (here / "directory" / "below" / "file").touch()
    os.mkfifo(here / "fifo")
    (here / "setuid").chmod(0o6755)
    os.chown(here / "other owner", 12, 34)
    access = "user:1000:rwx,user:4294967294:---,group:7:r-x,mask::rw-"
    for name in ("file", "setuid", "other owner", "directory", "fifo"):
        subprocess.run(["setfacl", "-m", access, str(here / name)], check=True)
    default = "user::rwx,user:5:r--,group::---,mask::rwx,other::---"
    subprocess.run(["setfacl", "-d", "-m", default, str(here / "directory")], check=True)
    (here / "directory" / "inherits").mkdir()
    (here / "directory" / "inherits" / "file").touch()
    (here / "directory" / "symlink").symlink_to("inherits")
    (here / "directory" / "without").touch()
    subprocess.run(["setfacl", "-b", str(here / "directory" / "without")], check=True)


def _xattrs(root: Path) -> None:
    here = root / "xattrs"
    (here / "directory").mkdir(parents=True)
    (here / "file").touch()
    (here / "capable").touch()
    os.chown(here / "capable", 3, 3)
    subprocess.run(["setcap", "cap_net_raw+ep", str(here / "capable")], check=True)
    for path in (here / "file", here / "directory", root):
        os.setxattr(path, "user.text", b"value")
        os.setxattr(path, "user.binary", bytes(range(256)))
        os.setxattr(path, "user.empty", b"")
        os.setxattr(path, "trusted.overlay.opaque", b"y")
        os.setxattr(path, "security.test", b"secure\0")
    (here / "large").touch()
    os.setxattr(here / "large", "user.large", b"large" * 600)
    (here / "many").touch()
    for number in range(40):
        os.setxattr(here / "many", f"user.number {number} \xff", str(number).encode())
    (here / "mode 0").touch()
    os.setxattr(here / "mode 0", "user.text", b"value")
    (here / "mode 0").chmod(0)
    (here / "symlink").symlink_to("nowhere")
    os.mkfifo(here / "fifo")
    os.mknod(here / "socket", stat.S_IFSOCK | 0o600)
    os.mknod(here / "block", stat.S_IFBLK | 0o600, os.makedev(7, 99))
    os.mknod(here / "character", stat.S_IFCHR | 0o600, os.makedev(1, 3))
    os.mknod(here / "whiteout", stat.S_IFCHR, os.makedev(0, 0))
    for name in ("symlink", "fifo", "socket", "block", "character", "whiteout"):
        path = here / name
        os.setxattr(path, "trusted.text", name.encode(), follow_symlinks=False)
        os.setxattr(path, "security.test", b"", follow_symlinks=False)


def _names(root: Path) -> None:
    here = root / "names"
    here.mkdir()
    for name in NAMES:
        path = here / os.fsdecode(name)
        path.mkdir()
        (path / os.fsdecode(name)).write_bytes(name)
        (here / os.fsdecode(name[:250] + b".link")).symlink_to(os.fsdecode(name))
        os.mkfifo(here / os.fsdecode(name[:250] + b".fifo"))
    for number, reserved in enumerate(RESERVED):
        if number % 2:
            (root / reserved).write_bytes(b"file\n")
        else:
            (root / reserved).mkdir()
            (root / reserved / "child").write_bytes(b"child\n")


def _times(root: Path) -> None:
    """Give every entry its own times.

    The access time is before the modification time, so that with relatime a read would change it.
    """
    here = root / "times"
    here.mkdir()
    for seconds in TIMES:
        (here / f"file {seconds}").touch()
        (here / f"directory {seconds}").mkdir()
        (here / f"symlink {seconds}").symlink_to("nowhere")
    for number, (path, _) in enumerate(_bottom_up(os.fsencode(root))):
        mtime = 1_500_000_000_123_456_789 + number * 1_000_000_001
        os.utime(path, ns=(mtime - 86_400_000_000_000 - 1, mtime), follow_symlinks=False)
    for seconds in TIMES:
        for kind in ("file", "directory", "symlink"):
            nanoseconds = seconds * 10**9 + 987_654_321
            times = (nanoseconds, nanoseconds)
            os.utime(here / f"{kind} {seconds}", ns=times, follow_symlinks=False)


def _bottom_up(path: bytes) -> Iterator[tuple[bytes, os.stat_result]]:
    status = os.lstat(path)
    if stat.S_ISDIR(status.st_mode):
        for name in sorted(os.listdir(path)):
            yield from _bottom_up(os.path.join(path, name))
    yield path, status


def differences(a: Path, b: Path) -> str:
    """Describe how the tree ``b`` differs from ``a``, one line for each difference; empty if equal.

    The comparison changes nothing in the trees, not even access times.
    """
    with _open_for_comparison(a) as here, _open_for_comparison(b) as there:
        lines = list(_compare(here, there))
    command = ["unshare", "--mount", "sh", "-euc", _RSYNC, "sh", str(a), str(b)]
    done = subprocess.run(command, check=False, capture_output=True, errors="surrogateescape")
    if done.returncode != 0:
        lines.append(f"rsync exited with {done.returncode}: {done.stderr}")
    return "\n".join([*lines, *done.stdout.splitlines()])


@contextmanager
def _open_for_comparison(tree: Path) -> Iterator[int]:
    """Write the data of ``tree`` to disk, and open it so that reads change no access times."""
    parent = os.open(tree.parent, os.O_RDONLY | os.O_DIRECTORY)
    try:
        with trees.open_tree(parent, tree.name) as root:
            linux.syncfs(root)
            yield root
    finally:
        os.close(parent)


def _compare(here: int, there: int) -> Iterator[str]:
    first, second = _entries(here), _entries(there)
    for name in sorted(first.keys() ^ second.keys()):
        yield f"only in {'the first' if name in first else 'the second'}: {name!r}"
    for name in sorted(first.keys() & second.keys()):
        for what, value, other in _compared_values(here, there, name, first[name], second[name]):
            if value != other:
                yield f"{what} of {name!r}: {value!r}, then {other!r}"
    if _link_groups(first) != _link_groups(second):
        yield f"links: {_link_groups(first) ^ _link_groups(second)!r}"


def _entries(root: int) -> dict[bytes, os.stat_result]:
    """Return the status of each entry of a tree by its path from the root, which is ``.``."""
    top = _path(root, b".")
    return {os.path.relpath(path, top): status for path, status in _bottom_up(top)}


def _path(root: int, name: bytes) -> bytes:
    return os.path.join(f"/proc/self/fd/{root}".encode(), name)


def _link_groups(entries: Mapping[bytes, os.stat_result]) -> set[frozenset[bytes]]:
    groups = defaultdict(set)
    for name, status in entries.items():
        groups[status.st_dev, status.st_ino].add(name)
    return {frozenset(names) for names in groups.values() if len(names) > 1}


def _compared_values(
    here: int, there: int, name: bytes, a: os.stat_result, b: os.stat_result
) -> Iterator[tuple[str, object, object]]:
    """Yield the name and both values of each fact that must be equal for two entries."""
    for field in ("st_mode", "st_uid", "st_gid", "st_nlink", "st_rdev"):
        yield field, getattr(a, field), getattr(b, field)
    for field in ("st_atime_ns", "st_mtime_ns"):
        yield field, getattr(a, field), getattr(b, field)
    first, second = _path(here, name), _path(there, name)
    yield "xattrs", _xattrs_of(first), _xattrs_of(second)
    if stat.S_IFMT(a.st_mode) != stat.S_IFMT(b.st_mode):
        return
    if stat.S_ISLNK(a.st_mode):
        yield "target", os.readlink(first), os.readlink(second)
    if stat.S_ISREG(a.st_mode):
        yield "st_size", a.st_size, b.st_size
        segments = _segments(first)
        yield "data segments", segments, _segments(second)
        for start, end in segments:
            same = _read(first, start, end) == _read(second, start, end)
            yield f"content at {start}", True, same
        allowed = a.st_blocks * 512 + (len(segments) + 1) * os.statvfs(first).f_bsize
        yield f"at most {allowed} bytes", True, b.st_blocks * 512 <= allowed


def _xattrs_of(path: bytes) -> dict[str, bytes]:
    names = os.listxattr(path, follow_symlinks=False)
    return {name: os.getxattr(path, name, follow_symlinks=False) for name in names}


def _segments(path: bytes) -> list[tuple[int, int]]:
    """Return the start and the end of each part of a file that is not a hole."""
    found: list[tuple[int, int]] = []
    with open(path, "rb", buffering=0) as file:
        end = 0
        while True:
            try:
                start = file.seek(end, os.SEEK_DATA)
            except OSError as error:
                if error.errno != errno.ENXIO:
                    raise
                return found
            end = file.seek(start, os.SEEK_HOLE)
            found.append((start, end))


def _read(path: bytes, start: int, end: int) -> bytes:
    with open(path, "rb", buffering=0) as file:
        return os.pread(file.fileno(), end - start, start)
