"""The systemd units: their settings, and that none of them hides mounts from the host."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

from snapd_native.cli.processes import containerd
from snapd_native.wire.names import BUS_NAME, bus_name
from tests.support import PROJECT

SYSTEMD = PROJECT / "systemd"

# Settings that imply a mount namespace; see exec_needs_mount_namespace() in systemd.
NAMESPACE_SETTINGS = {
    *("BindPaths", "BindReadOnlyPaths", "CacheDirectory", "DynamicUser", "ExecPaths"),
    *("InaccessiblePaths", "MountAPIVFS", "MountFlags", "MountImages", "NoExecPaths"),
    *("PrivateDevices", "PrivateIPC", "PrivateTmp", "PrivateUsers", "ProcSubset"),
    *("ProtectControlGroups", "ProtectHome", "ProtectKernelLogs", "ProtectKernelModules"),
    *("ProtectKernelTunables", "ProtectProc", "ProtectSystem", "ReadOnlyPaths"),
    *("ReadWritePaths", "RootDirectory", "RootImage", "TemporaryFileSystem"),
}


def settings(path: Path) -> list[tuple[str, str]]:
    lines = [line for line in path.read_text().splitlines() if "=" in line and line[0] != "#"]
    return [(name, value) for name, _, value in (line.partition("=") for line in lines)]


UNIT = dict(settings(SYSTEMD / "snapd-native.service"))
INSTANCE = dict(settings(SYSTEMD / "snapd-native@.service.d" / "instance.conf"))


PLUGIN = dict(settings(SYSTEMD / "snapd-native-containerd.service"))


def test_the_units_have_no_setting_that_hides_mounts() -> None:
    assert not NAMESPACE_SETTINGS & {*UNIT, *INSTANCE}
    assert UNIT["PrivateMounts"] == "no"


def test_the_template_unit_equals_the_unit() -> None:
    template = SYSTEMD / "snapd-native@.service"
    assert template.read_bytes() == (SYSTEMD / "snapd-native.service").read_bytes()


def test_the_units_use_the_bus_names_of_the_contract() -> None:
    assert UNIT["BusName"] == BUS_NAME
    assert INSTANCE["BusName"] == bus_name("NAME").replace("NAME", "%i")
    assert "--instance %i" in INSTANCE["ExecStart"]


def test_the_directories_of_the_units_have_mode_0700() -> None:
    assert UNIT["StateDirectoryMode"] == UNIT["RuntimeDirectoryMode"] == "0700"
    lines = (SYSTEMD / "tmpfiles.d" / "snapd-native.conf").read_text().splitlines()
    made = [line.split() for line in lines if not line.startswith("#")]
    assert [line[1:3] for line in made] == [
        ["/var/lib/snapd-native", "0700"],
        ["/run/snapd-native", "0700"],
    ]


@pytest.fixture
def units(tmp_path: Path) -> Path:
    """Copy the directory ``systemd/``, and return the copy."""
    return Path(shutil.copytree(SYSTEMD, tmp_path / "systemd"))


def analyze(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        ["systemd-analyze", "--no-pager", *arguments],
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.mark.parametrize(
    "name",
    ["snapd-native.service", "snapd-native@one.service", "snapd-native-containerd.service"],
)
def test_systemd_analyze_verifies_the_units(units: Path, name: str) -> None:
    if "@" in name:
        (units / name).symlink_to("snapd-native@.service")
    outcome = analyze("verify", "--man=no", str(units / name))
    lines = [
        line
        for line in outcome.stderr.splitlines()
        if "/snapd-native" in line and "is not executable" not in line
    ]
    assert lines == []


def test_the_plugin_of_containerd_has_no_capability() -> None:
    assert PLUGIN["CapabilityBoundingSet"] == ""
    assert PLUGIN["NoNewPrivileges"] == "yes"


def test_the_directory_of_the_plugins_socket_is_that_of_the_program_with_mode_0700() -> None:
    (socket,) = (option for option in containerd.params if option.name == "socket")
    assert Path(str(socket.default)).parent == Path("/run") / PLUGIN["RuntimeDirectory"]
    assert PLUGIN["RuntimeDirectoryMode"] == "0700"


def test_the_exposure_level_of_the_plugin_is_at_most_0_7(units: Path) -> None:
    path = str(units / "snapd-native-containerd.service")
    outcome = analyze("security", "--offline=yes", "--threshold=7", path)
    assert outcome.returncode == 0, outcome.stdout


def test_the_exposure_level_of_the_unit_is_at_most_4_1(units: Path) -> None:
    """0.1 of it comes from the rights that Commit needs to seal a tree."""
    outcome = analyze(
        *("security", "--offline=yes", "--threshold=41", str(units / "snapd-native.service"))
    )
    assert outcome.returncode == 0, outcome.stdout
