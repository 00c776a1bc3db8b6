"""The installed package, as systemd, the bus and polkit see it."""

from __future__ import annotations

import json
import re
import uuid

import pytest
from testinfra.host import Host

from snapd_native.bus.introspection import contract, interfaces
from snapd_native.wire.names import MANAGER
from tests.vm.guest import INSTANCES, Guest

UNITS = ("snapd-native", "snapd-native@ext4", "snapd-native@xfs")
MAX_EXPOSURE = 4.1
"""The highest exposure that systemd-analyze may report, on a scale from 0 to 10."""


def test_the_package_installs_all_its_files(host: Host, machine: Guest) -> None:
    assert host.package("snapd-native").is_installed
    assert machine.run("dpkg --verify snapd-native") == ""
    installed = machine.run("dpkg -L snapd-native").splitlines()
    for path in (
        "/usr/bin/snapd-native",
        "/usr/share/dbus-1/interfaces/org.snapdnative1.xml",
        "/usr/share/dbus-1/system-services/org.snapdnative1.service",
        "/usr/share/dbus-1/system.d/org.snapdnative1.conf",
        "/usr/share/polkit-1/actions/org.snapdnative1.policy",
    ):
        assert path in installed


@pytest.mark.parametrize("unit", UNITS)
def test_each_unit_is_active_and_enabled(machine: Guest, unit: str) -> None:
    wanted = {
        "UnitFileState": "enabled",
        "ActiveState": "active",
        "SubState": "running",
        "Type": "notify",
        "NRestarts": "0",
        "WatchdogUSec": "30s",
    }
    shown = machine.run(f"systemctl show {unit} -p {','.join(wanted)},StatusText").splitlines()
    properties = dict(line.split("=", 1) for line in shown)
    assert properties.pop("StatusText").startswith("Serving /")
    assert properties == wanted


@pytest.mark.parametrize("unit", UNITS)
def test_systemd_analyze_accepts_each_unit(machine: Guest, unit: str) -> None:
    assert machine.run(f"systemd-analyze verify --man=no {unit}.service 2>&1") == ""
    out = machine.run(f"systemd-analyze security --no-pager {unit}.service")
    (line,) = (line for line in out.splitlines() if "Overall exposure" in line)
    print(line)
    exposure = re.search(r": ([\d.]+) ", line)
    assert exposure is not None
    assert float(exposure[1]) <= MAX_EXPOSURE


def test_each_instance_owns_its_bus_name(machine: Guest) -> None:
    for instance, unit in zip(INSTANCES, UNITS, strict=True):
        name = ".".join(filter(None, ["org.snapdnative1", instance]))
        ask = "busctl call org.freedesktop.DBus / org.freedesktop.DBus"
        out = machine.run(
            f"{ask} GetConnectionUnixProcessID s {name}; systemctl show -P MainPID {unit}"
        )
        owner, main = out.splitlines()
        assert owner == f"u {main}"


def test_another_user_cannot_own_the_bus_names(machine: Guest) -> None:
    program = """
import sys, dbus_next.aio, asyncio
from dbus_next import BusType, Message
async def main():
    bus = await dbus_next.aio.MessageBus(bus_type=BusType.SYSTEM).connect()
    for name in sys.argv[1:]:
        reply = await bus.call(Message(destination="org.freedesktop.DBus", path="/",
            interface="org.freedesktop.DBus", member="RequestName", signature="su",
            body=[name, 4]))
        print(reply.error_name)
asyncio.run(main())
"""
    names = "org.snapdnative1 org.snapdnative1.ext4 org.snapdnative1.other"
    out = machine.run(f"runuser -u vagrant -- python3 - {names}", stdin=program)
    assert out.splitlines() == ["org.freedesktop.DBus.Error.AccessDenied"] * 3


def test_introspection_shows_the_members_of_the_contract(machine: Guest) -> None:
    shape = interfaces(contract())[MANAGER]
    ask = f"busctl introspect org.snapdnative1 /org/snapdnative1 {MANAGER}"
    lines = [line.split() for line in machine.run(ask).splitlines()[1:]]
    shown: dict[str, dict[str, list[str]]] = {"method": {}, "signal": {}, "property": {}}
    for name, kind, *rest in lines:
        shown[kind][name.removeprefix(".")] = ["" if word == "-" else word for word in rest]
    assert {name: (of[0], of[1]) for name, of in shown["method"].items()} == shape.methods
    assert {name: of[0] for name, of in shown["signal"].items()} == shape.signals
    assert {name: of[0] for name, of in shown["property"].items()} == shape.properties


def test_the_daemons_run_in_the_mount_namespace_of_the_host(machine: Guest) -> None:
    out = machine.run(
        "readlink /proc/1/ns/mnt;"
        f"for unit in {' '.join(UNITS)}; do"
        ' readlink "/proc/$(systemctl show -P MainPID "$unit")/ns/mnt"; done'
    )
    assert len(set(out.split())) == 1


def test_only_root_can_access_the_state_directories(machine: Guest) -> None:
    state = "/var/lib/snapd-native /srv/ext4/snapd-native /srv/xfs/snapd-native"
    assert machine.run(f"stat -c '%a %U' {state}").splitlines() == ["700 root"] * 3
    assert machine.attempt(f"runuser -u vagrant -- ls {state}").returncode != 0


def test_each_instance_uses_the_disk_it_is_named_for(machine: Guest) -> None:
    for instance, reflink in (("ext4", "false"), ("xfs", "true")):
        ask = f"busctl get-property org.snapdnative1.{instance} /org/snapdnative1 {MANAGER}"
        out = machine.run(f"{ask} StateDirectory FilesystemType Reflink")
        state = f"/srv/{instance}/snapd-native"
        assert out.splitlines() == [f's "{state}"', f's "{instance}"', f"b {reflink}"]


def test_the_journal_has_an_entry_for_each_change(guest: Guest) -> None:
    call = f"busctl call org.snapdnative1 /org/snapdnative1 {MANAGER}"
    key = f"a key {uuid.uuid4()}"
    out = guest.run(f"""
        {call} Prepare 'ssa{{sv}}' '{key}' '' 0 >/dev/null
        {call} Stat s '{key}' >/dev/null
        {call} Commit 'ssa{{sv}}' 'a name' '{key}' 0
        {call} Remove 'sa{{sv}}' '{key}' 0 2>/dev/null || true
        journalctl --sync
        journalctl -u snapd-native 'SNAPD_NATIVE_KEY={key}' -o json""")
    prepare, commit, remove = map(json.loads, out.splitlines())
    assert prepare["SNAPD_NATIVE_OPERATION"] == "Prepare"
    assert prepare["SNAPD_NATIVE_CALLER_UID"] == "0"
    assert prepare["SNAPD_NATIVE_SENDER"].startswith(":1.")
    assert int(prepare["SNAPD_NATIVE_DURATION_USEC"]) > 0
    assert prepare["PRIORITY"] == "6"
    assert "SNAPD_NATIVE_ERROR" not in prepare
    assert commit["SNAPD_NATIVE_OPERATION"] == "Commit"
    assert remove["SNAPD_NATIVE_ERROR"].endswith("NotFound")
