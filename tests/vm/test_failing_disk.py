"""Disks that fail under load: calls raise an error, and acknowledged commits survive.

A call that was open when the disk failed can have happened, whatever its answer was. The disk can
accept a write and then refuse its flush and everything else. The service cannot undo such a write.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator

import pytest

from tests.support.oracle import Oracle
from tests.vm.guest import Guest
from tests.vm.guest_load import Load, differences
from tests.vm.spare_disk import SpareDisk, make_disks, units
from tests.vm.test_powercut import NO_SYNC

FILE_SYSTEMS = ("ext4", "xfs")

DATA_LOSS = 8
"""The exit status of the program at this error."""


@pytest.fixture
def disks(machine: Guest) -> Iterator[list[SpareDisk]]:
    disks = [SpareDisk(machine, filesystem) for filesystem in FILE_SYSTEMS]
    with make_disks(machine, *disks):
        yield disks


def fail_disks_under_load(
    guest: Guest, disks: list[SpareDisk], fail: Callable[[SpareDisk], None]
) -> Oracle:
    """Make disks fail under load until each instance has failed 12 calls, and heal the disks."""
    seed = int(time.time())
    print(f"seed {seed}")
    oracle = Oracle(tuple(disk.instance for disk in disks))
    load = Load(guest, oracle, seed, patient=True)
    load.until_acknowledged(4)
    for disk in disks:
        fail(disk)
    load.accept_open_calls()
    load.until(lambda: all(len(one.failures) >= 12 for one in oracle.instances.values()))
    load.end()
    for disk in disks:
        expected = oracle.instances[disk.instance]
        kinds = {failure.split(":")[0] for failure in expected.failures}
        failures = len(expected.failures)
        print(f"{disk.instance}: {expected.acknowledged} commits, {failures} failures")
        assert kinds <= {"DataLoss", "ResourceExhausted"}, expected.failures
        read = guest.attempt(f"snapd-native --instance {disk.instance} ls")
        assert read.returncode in (0, DATA_LOSS), read.stderr
    guest.run(f"systemctl stop {units(disks)}")
    for disk in disks:
        disk.remount()
    # If an instance does not start, it gives no answer, and `differences` reports that.
    guest.attempt(f"systemctl start {units(disks)}")
    return oracle


@pytest.mark.parametrize("fail", [SpareDisk.refuse_writes, SpareDisk.refuse_all])
def test_acknowledged_commits_survive_a_failing_disk(
    machine: Guest, disks: list[SpareDisk], fail: Callable[[SpareDisk], None]
) -> None:
    oracle = fail_disks_under_load(machine, disks, fail)
    assert differences(machine, oracle) == []
    for disk in disks:
        out = disk.journal()
        assert "check the disk and the kernel's log" in out
        assert "Traceback" not in out
        assert out.count(": Deactivated successfully.") == 1
        assert "Main process exited" not in out


@pytest.mark.long
def test_commits_are_lost_without_syncs_on_a_failing_disk(machine: Guest) -> None:
    """The test above would fail if the service lost data."""
    disks = [SpareDisk(machine, filesystem) for filesystem in FILE_SYSTEMS]
    drop_in = "/run/systemd/system/snapd-native@.service.d"
    machine.run(f"""
        mkdir -p {drop_in}
        printf '[Service]\\n{NO_SYNC}\\n' >{drop_in}/no-sync.conf
        systemctl daemon-reload""")
    try:
        with make_disks(machine, *disks):
            listed = differences(
                machine, fail_disks_under_load(machine, disks, SpareDisk.refuse_writes)
            )
            print("\n".join(listed[:10]))
            assert listed
    finally:
        machine.run(f"rm -r {drop_in}; systemctl daemon-reload")


REWRITE = """
    export SNAPD_NATIVE_INSTANCE={instance}
    tree=$(snapd-native prepare work | cut -f 2)
    dd if=/dev/zero of="$tree/file" bs=64k count=1 status=none
    sync
    block=$(filefrag -b512 -v "$tree/file" | awk '$1 == "0:" {{ print int($4) }}')
    echo other | dd of="$tree/file" conv=notrunc status=none
    echo $block
"""
"""A script that overwrites a synced file, and prints the first sector of the file."""


@pytest.mark.parametrize("filesystem", FILE_SYSTEMS)
def test_commit_of_a_file_that_could_not_be_written_raises_data_loss(
    machine: Guest, filesystem: str
) -> None:
    """The file system keeps working, and the kernel reports the error only once."""
    disk = SpareDisk(machine, filesystem)
    with make_disks(machine, disk):
        block = int(disk.run(REWRITE.format(instance=disk.instance)))
        disk.refuse_writes(block, 128)
        commit = f"snapd-native --instance {disk.instance} commit done work"
        first = machine.attempt(commit)
        disk.heal()
        second = machine.attempt(commit)
        disk.run(f"systemctl restart {disk.unit}")
        third = machine.attempt(commit)
        for each in (first, second, third):
            assert each.returncode == DATA_LOSS, each.stderr
        disk.run(f"""
            export SNAPD_NATIVE_INSTANCE={disk.instance}
            snapd-native rm work
            snapd-native prepare work
            snapd-native commit done work
            snapd-native check""")
