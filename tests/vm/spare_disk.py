"""Disks of the machine that a test can make fail, each with an instance of the service."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager

from tests.vm.guest import Guest

SECTORS = 512 << 11
"""The size in sectors of 512 bytes. mkfs.xfs makes nothing smaller than 300 MiB."""

REPAIRS = {"ext4": 'e2fsck -fp "$disk" || (($? < 4))', "xfs": "true"}
"""The commands that repair a file system after its disk has failed, by type."""


class SpareDisk:
    """A file in the guest behind a device-mapper device, whose table changes while it is in use."""

    def __init__(self, guest: Guest, filesystem: str, mkfs: str = "", mount: str = "rw") -> None:
        """Pass the options ``mkfs`` and ``mount`` to the commands of these names."""
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
        """From now on fail each write to some sectors, or each flush of them, with an I/O error."""
        after = first + count
        parts = [
            (0, first, "linear $loop 0"),
            (first, count, f"flakey $loop {first} 0 3600 1 error_writes"),
            (after, SECTORS - after, f"linear $loop {after}"),
        ]
        self._change(*(f"{start} {length} {target}" for start, length, target in parts if length))

    def refuse_all(self) -> None:
        """From now on fail each access with an I/O error."""
        self._change(f"0 {SECTORS} error")

    def heal(self) -> None:
        """Let all accesses succeed again."""
        self._change(f"0 {SECTORS} linear $loop 0")

    def remount(self) -> None:
        """Heal the disk, and mount the file system again; the instance must have ended."""
        self.run(f"umount {self.root}")
        self.heal()
        self.run(f"""
            {REPAIRS[self.filesystem]}
            {self._mount}""")

    def destroy(self) -> None:
        """Remove everything that `make` has made, even if `make` has failed."""
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
        """Return the log of the instance, and that of systemd about it, since `make`."""
        return self.run(f"journalctl --sync; journalctl --since=@{self._since} -u {self.unit}")

    def run(self, script: str, stdin: str | None = None) -> str:
        """Run a script that must succeed, and return what it printed."""
        return self._guest.run(self._names + script, stdin)

    def _change(self, *table: str) -> None:
        # Without --noflush and --nolockfs, the kernel would write all data before the change.
        lines = "\n".join(table)
        self.run(f"""
            loop=$(losetup --noheadings --output NAME --associated $image)
            dmsetup suspend --noflush --nolockfs {self.instance}
            dmsetup load {self.instance} --table "{lines}"
            dmsetup resume {self.instance}""")


@contextmanager
def make_disks(guest: Guest, *disks: SpareDisk) -> Iterator[None]:
    """Make disks with an instance on each for the block, and remove them afterwards."""
    with ExitStack() as undo:
        for disk in disks:
            undo.callback(disk.destroy)
            disk.make()
        guest.run(f"systemctl start {units(disks)}")
        yield


def units(disks: Iterable[SpareDisk]) -> str:
    return " ".join(disk.unit for disk in disks)
