"""Disks that a test may ruin, in the machine, and an instance of the service on each."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager

from tests.vm.guest import Guest

SECTORS = 512 << 11
"""Of 512 bytes. xfs is not made smaller than 300 MiB."""

REPAIRS = {"ext4": 'e2fsck -fp "$disk" || (($? < 4))', "xfs": "true"}
"""What is done before a file system is mounted whose disk has failed, by its type."""


class SpareDisk:
    """A file in the guest, seen through a device whose table is changed while it is in use."""

    def __init__(self, guest: Guest, filesystem: str, mkfs: str = "", mount: str = "rw") -> None:
        """Give ``mkfs`` and ``mount`` options."""
        self.filesystem = filesystem
        self.instance = f"spare_{filesystem}"
        self.unit = f"snapd-native@{self.instance}"
        self.root = f"/srv/{self.instance}"
        self._guest = guest
        self._since = ""
        self._mkfs = f"mkfs.{filesystem} -q {mkfs}"
        self._mount = f"mount -o {mount} $disk {self.root}"
        self._names = f"""
            disk=/dev/mapper/{self.instance}
            image=/var/tmp/{self.instance}.img
        """

    def make(self) -> None:
        """Make the file system."""
        self._since = self.run("date +%s").strip()
        self.run(f"""
            truncate -s {SECTORS * 512} $image
            loop=$(losetup --find --show $image)
            dmsetup create {self.instance} --table "0 {SECTORS} linear $loop 0"
            {self._mkfs} $disk
            mkdir {self.root}
            {self._mount}""")

    def refuse_writes(self, first: int = 0, count: int = SECTORS) -> None:
        """From now on each write to some sectors, or each flush of them, is an I/O error."""
        after = first + count
        parts = [
            (0, first, "linear $loop 0"),
            (first, count, f"flakey $loop {first} 0 3600 1 error_writes"),
            (after, SECTORS - after, f"linear $loop {after}"),
        ]
        self._change(*(f"{start} {length} {target}" for start, length, target in parts if length))

    def refuse_all(self) -> None:
        """From now on each access is an I/O error."""
        self._change(f"0 {SECTORS} error")

    def heal(self) -> None:
        """Give the disk back its health."""
        self._change(f"0 {SECTORS} linear $loop 0")

    def remount(self) -> None:
        """Mount the file system anew, on a disk that is well; the instance must have ended."""
        self.run(f"umount {self.root}")
        self.heal()
        self.run(f"""
            {REPAIRS[self.filesystem]}
            {self._mount}""")

    def destroy(self) -> None:
        """Leave nothing of it; also of one that was not made as a whole."""
        script = f"""
            set +e
            systemctl stop {self.unit}
            systemctl reset-failed {self.unit}
            umount {self.root}
            dmsetup remove --retry {self.instance}
            losetup --detach $(losetup --noheadings --output NAME --associated $image)
            rm -rf $image /run/{self.unit}
            rmdir {self.root}"""
        self._guest.attempt(self._names + script)

    def journal(self) -> str:
        """Return what the instance has logged, and the system's manager of it, since `make`."""
        return self.run(f"journalctl --sync; journalctl --since=@{self._since} -u {self.unit}")

    def run(self, script: str, stdin: str | None = None) -> str:
        """Run a script that must succeed, and return what it printed."""
        return self._guest.run(self._names + script, stdin)

    def _change(self, *table: str) -> None:
        # Without --noflush and --nolockfs, all that is not written yet would be before the change.
        lines = "\n".join(table)
        self.run(f"""
            loop=$(losetup --noheadings --output NAME --associated $image)
            dmsetup suspend --noflush --nolockfs {self.instance}
            dmsetup load {self.instance} --table "{lines}"
            dmsetup resume {self.instance}""")


@contextmanager
def made(guest: Guest, *disks: SpareDisk) -> Iterator[None]:
    """Make disks with an instance on each, and remove all that."""
    with ExitStack() as undo:
        for disk in disks:
            undo.callback(disk.destroy)
            disk.make()
        guest.run(f"systemctl start {units(disks)}")
        yield


def units(disks: Iterable[SpareDisk]) -> str:
    return " ".join(disk.unit for disk in disks)
