"""The digest of a tree: its format, and that every change of the tree changes it."""

from __future__ import annotations

import hashlib
import os
import stat
import subprocess
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path

import pytest

from snapd_native import trees
from snapd_native.model import Usage
from snapd_native.trees.digest import AHEAD, ALONE, BLOCK, Digester
from tests.support import torture_tree
from tests.support.file_systems import long_on_xfs, new_file_system
from tests.support.sample_trees import open_for_copy

pytestmark = long_on_xfs


@pytest.fixture
def crew() -> Iterator[trees.Crew]:
    with closing(trees.Crew()) as made:
        yield made


def digest(crew: trees.Crew, root: Path, report: trees.Report = lambda *_: None) -> str:
    with open_for_copy(root) as tree:
        return crew.digest(tree, report)


def netstring(data: bytes) -> bytes:
    return f"{len(data)}:".encode() + data + b","


def hash_with_holes(path: Path) -> str:
    """Hash a file that can have holes of any size; only allocated parts are read."""
    lines = ""
    offset = 0
    with path.open("rb") as file:
        while True:
            try:
                start = os.lseek(file.fileno(), offset, os.SEEK_DATA)
            except OSError:
                return hashlib.sha256(lines.encode()).hexdigest()
            offset = start - start % BLOCK
            file.seek(offset)
            data = file.read(BLOCK)
            if data.strip(b"\0"):
                lines += f"{offset} {hashlib.sha256(data).hexdigest()}\n"
            offset += BLOCK


def documented_digest(root: Path) -> str:
    """Return the digest of a tree, by a second implementation of the documented format."""
    numbers: dict[tuple[int, int], int] = {}

    def listed(path: Path, name: bytes) -> bytes:
        status = path.lstat()
        fields = [name]
        linked = not stat.S_ISDIR(status.st_mode) and status.st_nlink > 1
        file = (status.st_dev, status.st_ino)
        if linked and file in numbers:
            fields += [b"h", str(numbers[file]).encode()]
            return netstring(b"".join(map(netstring, fields)))
        if linked:
            numbers[file] = len(numbers) + 1
        kind = stat.filemode(status.st_mode)[0].replace("-", "f")
        attributes = b""
        for attribute in sorted(os.listxattr(path, follow_symlinks=False)):
            value = os.getxattr(path, attribute, follow_symlinks=False)
            attributes += netstring(attribute.encode()) + netstring(value)
        fields += [kind.encode(), f"{stat.S_IMODE(status.st_mode):o}".encode()]
        fields += [str(n).encode() for n in (status.st_uid, status.st_gid, status.st_mtime_ns)]
        fields += [attributes]
        match kind:
            case "f":
                fields += [str(status.st_size).encode(), hash_with_holes(path).encode()]
            case "l":
                fields += [os.fsencode(os.readlink(path))]
            case "c" | "b":
                device = status.st_rdev
                fields += [f"{os.major(device)}:{os.minor(device)}".encode()]
        text = netstring(b"".join(map(netstring, fields)))
        if kind == "d":
            for child in sorted(os.listdir(os.fsencode(path))):
                text += listed(path / os.fsdecode(child), child)
            text += netstring(b"")
        return text

    return hashlib.sha256(listed(root, b"")).hexdigest()


@pytest.fixture
def tree(scratch: Path) -> Path:
    """Make a tree with all types of files, and with files of all sizes in mixed order."""
    root = scratch / "tree"
    (root / "b" / "c").mkdir(parents=True)
    for number in range(2 * AHEAD):
        size = (0, 1, ALONE, ALONE + 1, 3 << 20)[number % 5] if number < 40 else number
        (root / "b" / f"{number}").write_bytes(os.urandom(size))
    (root / "large").write_bytes(os.urandom(5 << 20))
    os.link(root / "large", root / "b" / "c" / "linked")
    os.link(root / "large", root / "z linked")
    os.symlink("/nowhere", root / "link")
    os.link(root / "link", root / "b" / "linked link", follow_symlinks=False)
    os.mkfifo(root / "fifo")
    os.mknod(root / "whiteout", stat.S_IFCHR, 0)
    os.mknod(root / "disk", stat.S_IFBLK | 0o600, os.makedev(7, 99))
    os.setxattr(root / "b", "user.of", b"b")
    os.setxattr(root / "b" / "1", "trusted.one", b"\0\xff")
    (root / os.fsdecode(b"\xff\n name")).touch()
    with (root / "holes").open("wb") as file:
        file.truncate(10 << 20)
    return root


def test_the_digest_agrees_with_the_documentation(crew: trees.Crew, tree: Path) -> None:
    assert digest(crew, tree) == documented_digest(tree)


def test_the_reports_of_digest_add_up_to_the_usage(crew: trees.Crew, tree: Path) -> None:
    reported: list[tuple[int, int]] = []
    digest(crew, tree, lambda *done: reported.append(done))
    with open_for_copy(tree) as root:
        usage = crew.measure(root, lambda *_: None)
    assert Usage(inodes=sum(n for n, _ in reported), size=sum(n for _, n in reported)) == usage


def test_an_exact_copy_has_the_same_digest(crew: trees.Crew, tree: Path) -> None:
    copy = tree.parent / "copy"
    subprocess.run(["cp", "-a", tree, copy], check=True)
    assert digest(crew, copy) == digest(crew, tree)


def test_the_torture_tree_has_the_documented_digest(crew: trees.Crew, scratch: Path) -> None:
    root = scratch / "tree"
    root.mkdir()
    torture_tree.build(root)
    assert digest(crew, root) == documented_digest(root)


def test_the_digest_distinguishes_equal_inode_numbers_of_two_devices(
    crew: trees.Crew, loop_directory: Path, tmp_path: Path
) -> None:
    with (
        new_file_system("ext4", 16 << 20, loop_directory) as one,
        new_file_system("ext4", 16 << 20, loop_directory) as two,
    ):
        for name, root in (("1", one.root), ("2", two.root)):
            tree = root / "lower" / "tree"
            for directory in "ab":
                (tree / directory).mkdir(parents=True)
            (tree / "a" / name).write_text(name)
            os.link(tree / "a" / name, tree / "b" / name)
        source, copy = tmp_path / "tree", one.root / "copy"
        options = f"lowerdir={one.root}/lower:{two.root}/lower,xino=off"
        subprocess.run(["mount", "-t", "overlay", "-o", options, "overlay", tmp_path], check=True)
        try:
            assert len({(source / "a" / name).stat().st_ino for name in "12"}) == 1
            subprocess.run(["cp", "-a", source, copy], check=True)
            assert digest(crew, source) == digest(crew, copy) == documented_digest(copy)
        finally:
            subprocess.run(["umount", tmp_path], check=True)


def test_zeros_and_holes_have_the_same_digest(crew: trees.Crew, tree: Path) -> None:
    before = digest(crew, tree)
    times = (tree / "holes").stat()
    (tree / "holes").write_bytes(bytes(times.st_size))
    os.utime(tree / "holes", ns=(times.st_atime_ns, times.st_mtime_ns))
    assert digest(crew, tree) == before


def keep_time(change: Callable[[Path], object]) -> Callable[[Path], None]:
    """Return a function that makes a change and restores the times of the file and its parent."""

    def changed(path: Path) -> None:
        times = {p: p.lstat() for p in (path, path.parent) if os.path.lexists(p)}
        change(path)
        for p, status in times.items():
            if os.path.lexists(p):
                ns = (status.st_atime_ns, status.st_mtime_ns)
                os.utime(p, ns=ns, follow_symlinks=False)

    return changed


def flip_bit(path: Path) -> None:
    """Change one bit in the middle of a file."""
    with path.open("r+b") as file:
        file.seek(path.stat().st_size // 2)
        byte = file.read(1)[0]
        file.seek(-1, os.SEEK_CUR)
        file.write(bytes([byte ^ 1]))


def separate_link(path: Path) -> None:
    """Replace a hard link by a separate copy of its file."""
    copy = path.with_name("copy")
    subprocess.run(["cp", "-a", path, copy], check=True)
    copy.rename(path)


def recreate(path: Path, make: Callable[..., None], *given: object) -> None:
    path.unlink()
    make(*given)


CHANGES: dict[str, tuple[str, Callable[[Path], object]]] = {
    "one bit of a large file": ("large", keep_time(flip_bit)),
    "one bit of a small file": ("b/1", keep_time(flip_bit)),
    "a mode": ("b/1", lambda path: path.chmod(0o4755)),
    "an owner": ("b/1", lambda path: os.chown(path, 1, -1)),
    "a group": ("b", lambda path: os.chown(path, -1, 1)),
    "a time": ("b/1", lambda path: os.utime(path, ns=(1, 1))),
    "a value": ("b", lambda path: os.setxattr(path, "user.of", b"c")),
    "an attribute": ("fifo", keep_time(lambda path: os.setxattr(path, "trusted.x", b""))),
    "a larger hole": ("holes", keep_time(lambda path: os.truncate(path, 11 << 20))),
    "a name": ("b/1", keep_time(lambda path: path.rename(path.with_name("one")))),
    "a deleted file": ("b/1", keep_time(lambda path: path.unlink())),
    "a new file": ("new", keep_time(lambda path: path.touch())),
    "two files that were one": ("b/c/linked", keep_time(separate_link)),
    "a target": ("link", keep_time(lambda path: recreate(path, os.symlink, "/else", path))),
    "a device": ("disk", keep_time(lambda path: recreate(path, os.mknod, path, 0o60600, 1))),
}


@pytest.mark.parametrize("change", CHANGES)
def test_every_change_of_a_tree_changes_the_digest(
    crew: trees.Crew, tree: Path, change: str
) -> None:
    before = digest(crew, tree)
    assert digest(crew, tree) == before
    name, make = CHANGES[change]
    make(tree / name)
    assert digest(crew, tree) != before
    assert digest(crew, tree) == documented_digest(tree)


def test_a_tree_of_3000_levels_can_be_digested(scratch: Path) -> None:
    root = os.open(scratch, os.O_RDONLY)
    try:
        os.mkdir("deep", dir_fd=root)
        here = os.open("deep", os.O_RDONLY, dir_fd=root)
        for _ in range(3000):
            os.mkdir("d", dir_fd=here)
            below = os.open("d", os.O_RDONLY, dir_fd=here)
            os.close(here)
            here = below
        os.close(here)
        with trees.open_tree(root, "deep") as tree:
            digester = Digester(lambda *_: None)
            digester.directory(tree)
        assert len(digester.digest) == 64
        trees.delete(root, "deep", lambda *_: None)
    finally:
        os.close(root)
