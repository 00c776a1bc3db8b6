"""The packages in three releases of Debian: installed, upgraded, removed and purged."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from snapd_native import __version__
from tests.support.debian import SUITES, Machine, dependencies, lend_release, start_machine
from tests.support.package import Packages

pytestmark = pytest.mark.long


@pytest.fixture(scope="module", params=SUITES)
def debian(
    request: pytest.FixtureRequest, built: Packages, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Path]:
    """Make a Debian that contains the dependencies of the packages, and little else."""
    # Processes of a run have directories next to each other.
    own = tmp_path_factory.getbasetemp()
    place = own.parent if "PYTEST_XDIST_WORKER" in os.environ else own
    wanted = dependencies(built)
    with lend_release(request.param, place / "debian", wanted) as root:
        yield root


@pytest.fixture(scope="module")
def packages(built: Packages, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a directory with the packages, and with an older version of the service, ``old.deb``.

    ``new.deb`` is the package of the service, and ``plugin.deb`` that of the plugin.
    """
    directory = tmp_path_factory.mktemp("packages")
    shutil.copy(built.service, directory / "new.deb")
    shutil.copy(built.plugin, directory / "plugin.deb")
    subprocess.run(["dpkg-deb", "--raw-extract", built.service, directory / "old"], check=True)
    control = directory / "old" / "DEBIAN" / "control"
    control.write_text(control.read_text().replace(f"Version: {__version__}", "Version: 0.0.9"))
    subprocess.run(
        ["dpkg-deb", "--root-owner-group", "--build", directory / "old", directory / "old.deb"],
        check=True,
        capture_output=True,
    )
    shutil.rmtree(directory / "old")
    return directory


@pytest.fixture
def machine(debian: Path, packages: Path, tmp_path: Path) -> Iterator[Machine]:
    """Lend a Debian; its changes are discarded after the test."""
    root = tmp_path / "root"
    for name in ("upper", "work", "root"):
        (tmp_path / name).mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "tmpfs", tmp_path / "upper"], check=True)
    try:
        (tmp_path / "upper" / "upper").mkdir()
        (tmp_path / "upper" / "work").mkdir()
        options = f"lowerdir={debian},upperdir={tmp_path}/upper/upper,workdir={tmp_path}/upper/work"
        subprocess.run(["mount", "-t", "overlay", "-o", options, "overlay", root], check=True)
        try:
            with start_machine(root, packages) as machine:
                yield machine
        finally:
            subprocess.run(["umount", root], check=True)
    finally:
        subprocess.run(["umount", tmp_path / "upper"], check=True)


# The service runs without systemd, on the bus as Debian and the package configure it.
BUS = "mkdir -p /run/dbus && dbus-daemon --system --fork"

SERVE = """
snapd-native daemon >/root/log 2>&1 & echo $! >/root/pid
for _ in $(seq 200); do
    ! snapd-native ls >/dev/null 2>&1 || exit 0
    sleep 0.05
done
cat /root/log >&2
exit 1
"""

KILL_AND_WAIT = "kill $(cat {0}); while kill -0 $(cat {0}) 2>/dev/null; do sleep 0.05; done"
STOP = KILL_AND_WAIT.format("/root/pid")

USE_MOUNT = """
mkfifo /root/there
(cd '/mnt/a place' && echo >/root/there && exec sleep 1000 >/dev/null 2>&1) & echo $! >/root/user
cat /root/there
"""


def install_and_mount(machine: Machine) -> None:
    """Install the older version, and make a snapshot, two mounts of it and a mount inside it."""
    # The bus starts before the installation, and reloads its policy by itself.
    machine(BUS)
    machine("dpkg --install /root/old.deb")
    machine(SERVE)
    machine(
        """
        snapd-native prepare work
        work=$(snapd-native mounts work | cut -f 2)
        echo data >"$work/file"
        mkdir "$work/disk" "/mnt/a place" /root/disk
        mount -t tmpfs tmpfs /root/disk
        echo foreign >/root/disk/file
        mount --bind /root/disk "$work/disk"
        snapd-native mount work "/mnt/a place"
        snapd-native mount work
        """
    )


def mounted_targets(machine: Machine) -> list[str]:
    return machine(
        "cut -d ' ' -f 5 /proc/self/mountinfo | grep -E '^/(mnt|run/snapd-native|var)/' || true"
    ).splitlines()


def test_upgrade_and_removal_keep_mounts_and_purge_deletes_everything(machine: Machine) -> None:
    install_and_mount(machine)
    before = mounted_targets(machine)
    assert len(before) == 5
    machine("dpkg --install /root/new.deb")
    assert machine("snapd-native --version").split()[-1] == __version__
    assert mounted_targets(machine) == before
    machine(STOP)
    machine(SERVE)
    assert mounted_targets(machine) == before
    assert "/mnt/a place" in machine("snapd-native mounts")
    machine(STOP)
    # As systemctl enable does; there is no systemd here.
    machine(
        """
        mkdir -p /etc/systemd/system/multi-user.target.wants
        cd /etc/systemd/system/multi-user.target.wants
        ln -s /usr/lib/systemd/system/snapd-native@.service snapd-native@copies.service
        """
    )
    machine("dpkg --remove snapd-native")
    assert mounted_targets(machine) == before
    assert machine("cat '/mnt/a place/file' /var/lib/snapd-native/snapshots/*/file") == "data\n" * 2
    machine("dpkg --purge snapd-native")
    assert mounted_targets(machine) == []
    assert machine("ls -A /var/lib/snapd-native /run/snapd-native 2>/dev/null || true") == ""
    assert machine("cat /root/disk/file") == "foreign\n"
    left = "find / -xdev -name '*snapd*native*' -not -path '/root/*' -not -path '/proc/*'"
    assert machine(left) == ""


def test_purge_fails_while_a_process_uses_a_mount(machine: Machine) -> None:
    install_and_mount(machine)
    machine(STOP)
    machine(USE_MOUNT)
    stderr = machine.expect_failure("dpkg --purge snapd-native")
    assert "/mnt/a place cannot be unmounted" in error_line(stderr)
    assert machine("cat '/mnt/a place/file'") == "data\n"
    machine(KILL_AND_WAIT.format("/root/user"))
    machine("dpkg --purge snapd-native")
    assert mounted_targets(machine) == []
    assert machine("ls -A /var/lib") == machine("ls -A /var/lib | grep -v snapd")
    assert machine("cat /root/disk/file") == "foreign\n"


def test_purge_empties_a_state_directory_that_is_a_mount_point(machine: Machine) -> None:
    machine("mkdir /var/lib/snapd-native && mount -t tmpfs tmpfs /var/lib/snapd-native")
    install_and_mount(machine)
    machine(STOP)
    machine("dpkg --purge snapd-native")
    assert machine("mountpoint /var/lib/snapd-native && ls -A /var/lib/snapd-native") == (
        "/var/lib/snapd-native is a mountpoint\n"
    )
    assert machine("cat /root/disk/file") == "foreign\n"


_DEEP = """
for (1..60) { mkdir "d" x 100; chdir "d" x 100 }
open FILE, ">", "file";
system("chattr", "+i", "file", ".") == 0 or die
"""
"""An immutable file, the path of which is longer than the kernel accepts."""


def test_purge_deletes_immutable_files(machine: Machine) -> None:
    install_and_mount(machine)
    machine(STOP)
    machine("chattr +i /var/lib/snapd-native/snapshots/1/file")
    machine(f"cd /var/lib/snapd-native/snapshots/1 && perl -e '{_DEEP}'")
    machine("dpkg --purge snapd-native")
    machine("! [ -e /var/lib/snapd-native ]")


def error_line(stderr: str) -> str:
    (line,) = [line for line in stderr.splitlines() if line.startswith("snapd-native: ")]
    return line


def test_purge_names_the_directory_it_cannot_delete(machine: Machine) -> None:
    machine("mkdir /var/lib/snapd-native && mount -t tmpfs tmpfs /var/lib/snapd-native")
    machine("dpkg --install /root/new.deb; touch /var/lib/snapd-native/file")
    machine("mount -o remount,ro /var/lib/snapd-native")
    stderr = machine.expect_failure("dpkg --purge snapd-native")
    assert "/var/lib/snapd-native cannot be deleted" in error_line(stderr)
    machine("mount -o remount,rw /var/lib/snapd-native && dpkg --purge snapd-native")
    assert machine("ls -A /var/lib/snapd-native") == ""


def test_purge_does_not_unmount_a_mount_that_covers_another(machine: Machine) -> None:
    machine("dpkg --install /root/new.deb")
    machine(
        """
        mkdir -p /var/lib/snapd-native/snapshots/1 /mnt/a /root/over/a
        mount --bind /var/lib/snapd-native/snapshots/1 /mnt/a
        mount --bind /root/over /mnt
        mount -t tmpfs tmpfs /mnt/a
        echo foreign >/mnt/a/file
        """
    )
    stderr = machine.expect_failure("dpkg --purge snapd-native")
    assert "/mnt/a cannot be unmounted" in error_line(stderr)
    assert machine("cat /mnt/a/file") == "foreign\n"
    machine("umount /mnt/a /mnt && dpkg --purge snapd-native")
    assert mounted_targets(machine) == []


def test_purge_unmounts_targets_with_odd_names(machine: Machine) -> None:
    machine("dpkg --install /root/new.deb")
    machine(
        r"""
        target=$(printf '/mnt/ a\n\134040\tb\n.')
        target=${target%.}
        mkdir -p /var/lib/snapd-native/snapshots/1 "$target"
        mount --bind /var/lib/snapd-native/snapshots/1 "$target"
        """
    )
    assert len(mounted_targets(machine)) == 1
    machine("dpkg --purge snapd-native")
    assert mounted_targets(machine) == []


def test_purge_keeps_data_and_mounts_outside_the_state_directory(machine: Machine) -> None:
    machine("dpkg --install /root/new.deb")
    machine(
        """
        mkdir -p /srv/moved/snapshots/1 /srv/data/snapd-native/snapshots/1
        ln -s /srv/moved /var/lib/snapd-native
        mount --bind /srv/data/snapd-native/snapshots/1 /mnt
        """
    )
    machine("dpkg --purge snapd-native")
    assert machine("cd /srv && find . -name 1 | sort") == (
        "./data/snapd-native/snapshots/1\n./moved/snapshots/1\n"
    )
    machine("mountpoint /mnt && ! [ -L /var/lib/snapd-native ]")


def test_purge_of_an_unused_installation_succeeds(machine: Machine) -> None:
    machine("dpkg --install /root/new.deb && dpkg --purge snapd-native")


def test_the_demo_runs_with_the_libraries_of_debian(machine: Machine) -> None:
    machine("dpkg --install /root/new.deb")
    assert "everything is cleaned up" in machine("snapd-native demo --tree /usr/share/doc 2>&1")


@pytest.mark.parametrize("words", ["st", "--inst"])
def test_bash_completes_commands_and_options(machine: Machine, words: str) -> None:
    machine("dpkg --install /root/new.deb")
    found = machine(
        f"""
        bash -eu -c '
            source /usr/share/bash-completion/completions/snapd-native
            COMP_WORDS=(snapd-native {words}); COMP_CWORD=1; COMPREPLY=()
            _snapd_native_completion snapd-native; echo "${{COMPREPLY[@]}}"
        '
        """
    )
    assert found.strip() == {"st": "stat", "--inst": "--instance"}[words]


SERVE_PLUGIN = """
snapd-native containerd >/root/plugin.log 2>&1 & echo $! >/root/plugin
for _ in $(seq 200); do
    ! grep -q serving /root/plugin.log || exit 0
    sleep 0.05
done
cat /root/plugin.log >&2
exit 1
"""

CALLS = """
import grpc
from snapd_native.containerd import snapshots_pb2 as wire
from snapd_native.containerd.service import SERVICE

with grpc.insecure_channel("unix:/run/snapd-native-containerd/containerd.sock") as channel:
    prepare = channel.unary_unary(
        f"/{SERVICE}/Prepare",
        wire.CreateRequest.SerializeToString,
        wire.MountsResponse.FromString,
    )
    prepare(wire.CreateRequest(key="key", labels={"label": "value"}))
    listed = channel.unary_stream(
        f"/{SERVICE}/List", wire.ListRequest.SerializeToString, wire.ListResponse.FromString
    )
    for block in listed(wire.ListRequest()):
        for info in block.info:
            print(info.name, dict(info.labels))
"""


def test_the_plugin_of_containerd_serves_with_the_libraries_of_debian(machine: Machine) -> None:
    machine(BUS)
    machine("dpkg --install /root/new.deb /root/plugin.deb")
    machine(SERVE)
    machine(SERVE_PLUGIN)
    assert machine(f"python3 -c '{CALLS}'") == "key {'label': 'value'}\n"
    assert "containerd/key" in machine("snapd-native ls")
    machine(KILL_AND_WAIT.format("/root/plugin"))
    machine(STOP)
    assert machine("ls /run/snapd-native-containerd") == ""


def test_the_plugin_of_containerd_names_a_library_that_is_missing(machine: Machine) -> None:
    machine("dpkg --install /root/new.deb && dpkg --remove python3-grpcio")
    assert machine.expect_failure("snapd-native containerd") == (
        "snapd-native: the Python package grpc is missing: install the package"
        " snapd-native-containerd, or snapd-native[containerd] with pip\n"
    )


def test_purge_of_the_plugin_leaves_only_the_service(machine: Machine) -> None:
    machine("dpkg --install /root/new.deb")
    files = "find / -xdev -name '*snapd*native*' -not -path '/root/*' -not -path '/proc/*' | sort"
    before = machine(files)
    machine("dpkg --install /root/plugin.deb")
    enabled = "/etc/systemd/system/multi-user.target.wants/snapd-native-containerd.service"
    assert machine(f"readlink {enabled}").endswith(
        "/lib/systemd/system/snapd-native-containerd.service\n"
    )
    assert "snapd-native-containerd" in machine.expect_failure("dpkg --remove snapd-native")
    machine("dpkg --purge snapd-native-containerd")
    assert machine(files) == before
