"""Power cuts under load: acknowledged changes survive, others are complete or undone."""

from __future__ import annotations

import random
import time

import pytest

from tests.support.oracle import Oracle
from tests.vm.guest import Guest, VolatileDisks, remove_all
from tests.vm.guest_load import Load, differences

INSTANCES = ("ext4", "xfs")
UNITS = " ".join(f"snapd-native@{instance}" for instance in INSTANCES)
NO_SYNC = "SystemCallFilter=~fsync:0 fdatasync:0 syncfs:0 sync:0 sync_file_range:0 msync:0"
"""A setting of a unit by which these system calls do nothing and return 0."""


def cut_power(guest: Guest, disks: VolatileDisks, load: Load) -> str:
    load.check()
    guest.power_cut()
    load.end()
    return ", ".join(
        f"{name}: of {loss.unflushed} unflushed writes {loss.kept} kept, {loss.torn} torn"
        for name, loss in zip(INSTANCES, disks.losses(), strict=True)
    )


def test_acknowledged_commits_survive_power_cuts(
    machine: Guest, request: pytest.FixtureRequest
) -> None:
    seed = int(time.time())
    chance = random.Random(seed)
    remove_all(machine, *INSTANCES)
    oracle = Oracle(INSTANCES)
    with machine.volatile_disks() as disks:
        for number in range(request.config.getoption("--cuts")):
            begin = time.monotonic()
            done = oracle.acknowledged()
            load = Load(machine, oracle, seed + number)
            load.until_acknowledged(done + 2)
            time.sleep(chance.uniform(0, 5))
            loss = cut_power(machine, disks, load)
            machine.power_on()
            listed = differences(machine, oracle)
            print(
                f"cut {number + 1}: {oracle.acknowledged()} commits each, at least; {loss};"
                f" {time.monotonic() - begin:.0f} s",
                flush=True,
            )
            assert listed == []
        remove_all(machine, *INSTANCES)


@pytest.mark.long
def test_commits_are_lost_without_syncs_at_a_power_cut(machine: Guest) -> None:
    """The test above would fail if the service lost data."""
    remove_all(machine, *INSTANCES)
    drop_in = "/etc/systemd/system/snapd-native@.service.d/no-sync.conf"
    with machine.volatile_disks() as disks:
        try:
            machine.run(f"""
                mkdir -p $(dirname {drop_in})
                printf '[Service]\\n{NO_SYNC}\\n' >{drop_in}
                systemctl daemon-reload
                systemctl restart {UNITS}
                sync""")
            oracle = Oracle(INSTANCES)
            load = Load(machine, oracle, seed=0)
            load.until_acknowledged(4)
            print(cut_power(machine, disks, load))
            machine.power_on(all_units=False)
            listed = differences(machine, oracle)
            print("\n".join(listed[:10]))
            assert listed
        finally:
            machine.run(f"""
                rm -f {drop_in}
                systemctl daemon-reload
                systemctl stop {UNITS}""")
            if machine.attempt("mountpoint -q /srv/ext4 && mountpoint -q /srv/xfs").returncode:
                print(machine.run("lsblk -f; journalctl -b --no-pager | tail -n 200"))
                # The next boot can find damage that this one has not found.
                machine.power_cut()
                machine.power_on(all_units=False)
            machine.run(f"""
                for instance in {" ".join(INSTANCES)}; do
                    if ! mountpoint -q /srv/$instance; then
                        device=$(findmnt --fstab --noheadings --output SOURCE /srv/$instance)
                        fsck -f -y "$device" || true
                        systemctl reset-failed
                        systemctl start srv-$instance.mount
                    fi
                done
                systemctl stop {UNITS}
                chattr -R -f -i /srv/ext4/snapd-native /srv/xfs/snapd-native || true
                rm -rf /srv/ext4/snapd-native /srv/xfs/snapd-native
                systemctl reset-failed
                systemctl start {UNITS}""")
