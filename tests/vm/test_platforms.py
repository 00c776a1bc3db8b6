"""What only a whole machine has: NFS, and files with fs-verity."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.vm.guest import Guest
from tests.vm.spare_disk import SpareDisk, make_disks

DATA_LOSS = 8
"""The exit status of the program at this error."""

ENABLE_VERITY = """python3 -c '
import fcntl, os, struct, sys
FS_IOC_ENABLE_VERITY, SHA256 = 0x40806685, 1
argument = struct.pack("=IIII112x", 1, SHA256, 4096, 0)
fcntl.ioctl(os.open(sys.argv[1], os.O_RDONLY), FS_IOC_ENABLE_VERITY, argument)
'"""


@pytest.fixture
def verity_disk(machine: Guest) -> Iterator[SpareDisk]:
    """Yield a disk with a committed snapshot `base`, whose file has fs-verity."""
    disk = SpareDisk(machine, "ext4", "-O verity")
    with make_disks(machine, disk):
        disk.run(f"""
            export SNAPD_NATIVE_INSTANCE={disk.instance}
            tree=$(snapd-native prepare work | cut -f 2)
            head -c 65536 /dev/urandom >"$tree/file"
            {ENABLE_VERITY} "$tree/file"
            lsattr "$tree/file" | cut -d ' ' -f 1 | grep -q V
            snapd-native commit base work
            lsattr "$tree/file" | cut -d ' ' -f 1 | grep -q V""")
        yield disk


def test_a_copy_has_no_fs_verity(verity_disk: SpareDisk) -> None:
    verity_disk.run(f"""
        export SNAPD_NATIVE_INSTANCE={verity_disk.instance}
        copy=$(snapd-native prepare copy base | cut -f 2)
        cmp "$copy/file" {verity_disk.root}/snapd-native/snapshots/1/file
        ! lsattr "$copy/file" | cut -d ' ' -f 1 | grep V
        echo other >"$copy/file"
        snapd-native rm copy
        snapd-native rm base
        snapd-native cleanup
        snapd-native check""")


def test_a_copy_of_a_file_that_fs_verity_finds_damaged_raises_data_loss(
    verity_disk: SpareDisk,
) -> None:
    outcome = verity_disk.run(f"""
        file={verity_disk.root}/snapd-native/snapshots/1/file
        block=$(filefrag -b512 -v "$file" | awk '$1 == "0:" {{ print int($4) }}')
        sync
        echo damage | dd of=$disk bs=512 seek=$block conv=notrunc,fsync status=none
        echo 3 >/proc/sys/vm/drop_caches
        status=0
        snapd-native --instance {verity_disk.instance} prepare copy base || status=$?
        echo $status""")
    assert outcome.split()[-1] == str(DATA_LOSS)


def test_a_state_directory_on_nfs_is_refused(machine: Guest) -> None:
    """In /proc/self/mountinfo, all mounts of NFS have the same root."""
    try:
        machine.run("""
            mkdir -p /srv/ext4/export /srv/nfs /etc/exports.d
            echo '/srv/ext4/export localhost(rw,sync,no_root_squash,no_subtree_check)' \\
                >/etc/exports.d/test.exports
            systemctl start nfs-server
            mount -t nfs4 localhost:/srv/ext4/export /srv/nfs""")
        started = machine.attempt(
            "snapd-native --instance nfs daemon --state-directory /srv/nfs/snapd-native"
        )
        assert started.returncode == 1
        (line,) = started.stderr.splitlines()
        assert "/srv/nfs/snapd-native is on NFS" in line
        assert machine.run("ls -A /srv/nfs/snapd-native") == ""
    finally:
        machine.run("""
            umount /srv/nfs || true
            systemctl stop nfs-server
            rm -rf /srv/ext4/export /srv/nfs /etc/exports.d/test.exports""")
