"""The daemon under systemd: starts, stops, crashes and reboots."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from snapd_native.wire.names import MANAGER
from tests.vm.guest import Guest

BUS = f"busctl call org.snapdnative1.xfs /org/snapdnative1 {MANAGER}"


@pytest.fixture
def guest_with_mount(guest: Guest) -> Iterator[Guest]:
    """Yield a machine where a view of a committed snapshot is mounted."""
    guest.run(f"""
        mkdir -p /var/test-target
        source=$({BUS} Prepare 'ssa{{sv}}' first '' 0 | cut -d '"' -f 4)
        echo content >"$source/file"
        {BUS} Commit 'ssa{{sv}}' committed first 0
        {BUS} View 'ssa{{sv}}' look committed 0
        {BUS} Mount 'ssa{{sv}}' look /var/test-target 0""")
    yield guest
    guest.run(f"""
        systemctl start snapd-native@xfs
        {BUS} Unmount 'sa{{sv}}' /var/test-target 0
        rmdir /var/test-target""")


def content_and_target(guest: Guest) -> list[str]:
    return guest.run("cat /var/test-target/file; findmnt -N 1 -rno TARGET /var/test-target").split()


CALLS = f"""
mkdir -p /var/test-other
while :; do
    {BUS} ListMounts s ''
    runuser -u nobody -- {BUS} Unmount 'sa{{sv}}' /var/test-target 0
    {BUS} Prepare 'ssa{{sv}}' other '' 0
    {BUS} Mount 'ssa{{sv}}' other /var/test-other 0
    touch /run/test-calls
    {BUS} Unmount 'sa{{sv}}' /var/test-other 0
    {BUS} Remove 'sa{{sv}}' other 0
done
"""

MOUNTED = ["content", "/var/test-target"]


def main_pid(guest: Guest, unit: str) -> str:
    return guest.run(f"systemctl show -P MainPID {unit}").strip()


def wait_until_restarted(guest: Guest, unit: str, before: str) -> None:
    guest.until(
        f'[ "$(systemctl show -P ActiveState {unit})" = active ] &&'
        f' [ "$(systemctl show -P MainPID {unit})" != {before} ]'
    )


def test_a_bus_call_starts_the_stopped_daemon(guest: Guest) -> None:
    guest.run("systemctl stop snapd-native")
    version = f"busctl get-property org.snapdnative1 /org/snapdnative1 {MANAGER} Version"
    assert guest.run(f"{version}; systemctl is-active snapd-native").endswith("active\n")


def test_a_restart_keeps_mounts(guest_with_mount: Guest) -> None:
    guest_with_mount.run("systemctl stop snapd-native@xfs")
    assert content_and_target(guest_with_mount) == MOUNTED
    guest_with_mount.run("systemctl start snapd-native@xfs")
    assert content_and_target(guest_with_mount) == MOUNTED
    assert '"look" true' in guest_with_mount.run(f"{BUS} ListMounts s look")


def test_systemctl_reload_fails_and_keeps_the_daemon(machine: Guest) -> None:
    before = main_pid(machine, "snapd-native")
    outcome = machine.attempt("systemctl reload snapd-native")
    assert outcome.returncode != 0
    assert "not applicable" in outcome.stderr
    assert main_pid(machine, "snapd-native") == before


def test_systemd_restarts_a_killed_daemon_and_its_mounts_stay(guest_with_mount: Guest) -> None:
    before = main_pid(guest_with_mount, "snapd-native@xfs")
    guest_with_mount.run("systemctl kill -s KILL --kill-whom=main snapd-native@xfs")
    wait_until_restarted(guest_with_mount, "snapd-native@xfs", before)
    assert content_and_target(guest_with_mount) == MOUNTED
    assert guest_with_mount.run("snapd-native --instance xfs check") == ""


def test_the_watchdog_kills_a_hanging_daemon_and_systemd_restarts_it(guest: Guest) -> None:
    drop_in = "/run/systemd/system/snapd-native.service.d"
    guest.run(f"""
        mkdir -p {drop_in}
        printf '[Service]\\nWatchdogSec=10\\n' >{drop_in}/test.conf
        systemctl daemon-reload
        systemctl restart snapd-native""")
    try:
        before = main_pid(guest, "snapd-native")
        guest.run(f"kill -STOP {before}")
        wait_until_restarted(guest, "snapd-native", before)
        out = guest.run("journalctl --sync; journalctl -b -u snapd-native _PID=1 | tail -n 40")
        assert "Watchdog timeout" in out
    finally:
        guest.run(f"rm -r {drop_in}; systemctl daemon-reload; systemctl restart snapd-native")


def test_data_and_persistent_mounts_are_restored_after_a_reboot_during_calls(
    guest_with_mount: Guest,
) -> None:
    """The calls continue while systemd unmounts everything and stops the service."""
    guest_with_mount.run(
        "cat >/run/test-calls.sh;"
        " systemd-run --quiet --property DefaultDependencies=no bash /run/test-calls.sh",
        stdin=CALLS,
    )
    guest_with_mount.until("[ -e /run/test-calls ]")
    guest_with_mount.reboot()
    try:
        assert content_and_target(guest_with_mount) == MOUNTED
        assert '"look" true "persistent" 0' in guest_with_mount.run(f"{BUS} ListMounts s look")
        assert guest_with_mount.run("snapd-native --instance xfs check") == ""
    finally:
        guest_with_mount.run(
            f"{BUS} Unmount 'sa{{sv}}' /var/test-other 0 || true; rmdir /var/test-other"
        )
