"""An exhausted quota: changes are refused and undone, and reads and removals work."""

from __future__ import annotations

import json
from dataclasses import dataclass

import pytest

from tests.vm.guest import HERE, Guest
from tests.vm.spare import SpareDisk, made


@dataclass(frozen=True)
class Quota:
    """How a file system limits the service."""

    filesystem: str
    mkfs: str
    mount: str
    limit: str
    """Sets the limits of `{blocks}` KiB and `{inodes}` inodes on `{root}`."""


QUOTAS = (
    # Of root himself: it is CAP_SYS_RESOURCE that ext4 limits nobody for, and the unit has it not.
    Quota(
        "ext4",
        "-O quota -E quotatype=usrquota",
        "usrquota",
        "setquota -u root 0 {blocks} 0 {inodes} {root}",
    ),
    # Of a directory: xfs knows no limits for root.
    Quota(
        "xfs",
        "",
        "prjquota",
        "xfs_quota -x -c 'project -s -p {root} 7'"
        " -c 'limit -p bhard={blocks}k ihard={inodes} 7' {root} >&2",
    ),
)


LIMITS = {"blocks": 24 << 10, "inodes": 300}
"""KiB, and inodes, of which a test takes all that are left."""

FULL = "ResourceExhausted"

EXHAUSTED = {
    **dict.fromkeys(("prepare from base", "prepare", "view"), FULL),
    **dict.fromkeys(("stat", "usage", "mounts"), "done"),
    **dict.fromkeys(("remove", "remove a base", "remove another", "cleanup"), "done"),
    "prepare with room": "done",
}
"""How calls are answered then, but those that write only a record."""


@pytest.mark.parametrize("scarce", ["blocks", "inodes"])
@pytest.mark.parametrize("quota", QUOTAS, ids=[quota.filesystem for quota in QUOTAS])
def test_an_exhausted_quota_refuses_changes_but_not_reads_and_removals(
    machine: Guest, quota: Quota, scarce: str
) -> None:
    disk = SpareDisk(machine, quota.filesystem, quota.mkfs, quota.mount)

    def limit(blocks: int = 0, inodes: int = 0) -> None:
        disk.run(quota.limit.format(blocks=blocks, inodes=inodes, root=disk.root))

    def do(step: str) -> str:
        # Without the capability that the service has not either.
        python = "setpriv --bounding-set=-sys_resource --inh-caps=-sys_resource python3"
        program = (HERE / "exhaustion.py").read_text()
        return disk.run(f"{python} - {disk.instance} {step}", stdin=program)

    with made(machine, disk):
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
