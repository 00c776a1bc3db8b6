"""An exhausted quota: changes are refused and undone, and reads and removals work."""

from __future__ import annotations

import json
from dataclasses import dataclass

import pytest

from tests.vm.guest import VM_TESTS, Guest
from tests.vm.spare_disk import SpareDisk, make_disks


@dataclass(frozen=True)
class Quota:
    """A quota by which a file system limits the service."""

    filesystem: str
    mkfs: str
    mount: str
    limit: str
    """The command that sets the limits of `{blocks}` KiB and `{inodes}` inodes on `{root}`."""


QUOTAS = (
    # A quota of root: ext4 exempts only processes with CAP_SYS_RESOURCE, which the unit lacks.
    Quota(
        "ext4",
        "-O quota -E quotatype=usrquota",
        "usrquota",
        "setquota -u root 0 {blocks} 0 {inodes} {root}",
    ),
    # A quota of a directory, because xfs has no limits for root.
    Quota(
        "xfs",
        "",
        "prjquota",
        "xfs_quota -x -c 'project -s -p {root} 7'"
        " -c 'limit -p bhard={blocks}k ihard={inodes} 7' {root} >&2",
    ),
)


LIMITS = {"blocks": 24 << 10, "inodes": 300}
"""The limits in KiB and in inodes; a test uses everything that is left."""

FULL = "ResourceExhausted"

EXHAUSTED = {
    **dict.fromkeys(("prepare from base", "prepare", "view"), FULL),
    **dict.fromkeys(("stat", "usage", "mounts"), "done"),
    **dict.fromkeys(("remove", "remove a base", "remove another", "cleanup"), "done"),
    "prepare with room": "done",
}
"""The answers to calls with an exhausted quota, except to calls that only write a record."""


@pytest.mark.parametrize("scarce", ["blocks", "inodes"])
@pytest.mark.parametrize("quota", QUOTAS, ids=[quota.filesystem for quota in QUOTAS])
def test_an_exhausted_quota_refuses_changes_but_not_reads_and_removals(
    machine: Guest, quota: Quota, scarce: str
) -> None:
    disk = SpareDisk(machine, quota.filesystem, quota.mkfs, quota.mount)

    def limit(blocks: int = 0, inodes: int = 0) -> None:
        disk.run(quota.limit.format(blocks=blocks, inodes=inodes, root=disk.root))

    def do(step: str) -> str:
        # Run without the capability, as the service does.
        python = "setpriv --bounding-set=-sys_resource --inh-caps=-sys_resource python3"
        program = (VM_TESTS / "quota_calls.py").read_text()
        return disk.run(f"{python} - {disk.instance} {step}", stdin=program)

    with make_disks(machine, disk):
        do("fill")
        limit(**{scarce: LIMITS[scarce]})
        answers = json.loads(do(f"exhausted {scarce} {disk.root}"))
        records = {answers.pop(call) for call in ("view from base", "update", "commit", "mount")}
        assert answers == EXHAUSTED
        assert records <= {"done", FULL}
        assert (FULL in records) == (scarce == "blocks")
        limit()
        assert set(json.loads(do("raised")).values()) == {"done"}
        disk.run(f"snapd-native --instance {disk.instance} check")
        assert "Traceback" not in disk.journal()
