"""The Debian packages: their content, and that the same sources give the same packages."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from snapd_native import __version__
from tests.support import PROJECT
from tests.support.commands import run_command
from tests.support.package import Packages

FILES = {
    "/usr/bin/snapd-native": "-rwxr-xr-x",
    "/usr/lib/systemd/system/snapd-native.service": "-rw-r--r--",
    "/usr/lib/systemd/system/snapd-native@.service": "-rw-r--r--",
    "/usr/lib/systemd/system/snapd-native@.service.d/instance.conf": "-rw-r--r--",
    "/usr/lib/tmpfiles.d/snapd-native.conf": "-rw-r--r--",
    "/usr/lib/python3/dist-packages/snapd_native/client/__init__.py": "-rw-r--r--",
    "/usr/lib/python3/dist-packages/snapd_native/bus/org.snapdnative1.xml": "-rw-r--r--",
    "/usr/lib/python3/dist-packages/snapd_native/containerd/snapshots_pb2.py": "-rw-r--r--",
    "/usr/share/bash-completion/completions/snapd-native": "-rw-r--r--",
    "/usr/share/dbus-1/interfaces/org.snapdnative1.xml": "-rw-r--r--",
    "/usr/share/dbus-1/system-services/org.snapdnative1.service": "-rw-r--r--",
    "/usr/share/dbus-1/system.d/org.snapdnative1.conf": "-rw-r--r--",
    "/usr/share/doc/snapd-native/copyright": "-rw-r--r--",
    "/usr/share/fish/vendor_completions.d/snapd-native.fish": "-rw-r--r--",
    "/usr/share/polkit-1/actions/org.snapdnative1.policy": "-rw-r--r--",
    "/usr/share/zsh/vendor-completions/_snapd-native": "-rw-r--r--",
}


PLUGIN_FILES = {
    "/usr/lib/systemd/system/snapd-native-containerd.service": "-rw-r--r--",
    "/usr/share/doc/snapd-native-containerd/changelog.gz": "-rw-r--r--",
    "/usr/share/doc/snapd-native-containerd/copyright": "-rw-r--r--",
}


def test_the_packages_have_the_version_of_the_program(built: Packages) -> None:
    for package, name in (built.service, "snapd-native"), (built.plugin, "snapd-native-containerd"):
        assert run_command("dpkg-deb", "--field", package, "Version").strip() == __version__
        assert package.name == f"{name}_{__version__}_all.deb"


def contents(package: Path) -> dict[str, str]:
    """Return the mode of each path in a package, all of which belong to root."""
    lines = [line.split() for line in run_command("dpkg-deb", "--contents", package).splitlines()]
    assert {line[1] for line in lines} == {"root/root"}
    return {line[5].removeprefix("."): line[0] for line in lines}


def test_the_package_contains_its_files_with_the_right_modes(package: Path) -> None:
    modes = contents(package)
    assert {path: modes.get(path) for path in FILES} == FILES
    assert not PLUGIN_FILES.keys() & modes.keys()
    # Type stubs and descriptions of messages are only for development.
    assert not [path for path in modes if path.endswith((".pyi", ".proto"))]
    packages = {path.split("/")[5] for path in modes if "/dist-packages/" in path[:-1]}
    assert packages == {"snapd_native", f"snapd_native-{__version__}.dist-info"}


def test_the_package_of_the_plugin_contains_only_its_unit(plugin_package: Path) -> None:
    modes = contents(plugin_package)
    assert {path: mode for path, mode in modes.items() if mode[0] != "d"} == PLUGIN_FILES


def test_the_package_of_the_plugin_needs_the_same_version_of_the_service(
    package: Path, plugin_package: Path
) -> None:
    needed = run_command("dpkg-deb", "--field", plugin_package, "Depends").strip().split(", ")
    needs = {"python3-grpcio", "python3-protobuf", f"snapd-native (= {__version__})"}
    assert set(needed) == needs
    needed_by_service = run_command("dpkg-deb", "--field", package, "Depends")
    assert "grpc" not in needed_by_service
    assert "protobuf" not in needed_by_service


@pytest.mark.long
def test_lintian_reports_nothing(built: Packages) -> None:
    outcome = subprocess.run(
        ["lintian", "--allow-root", "--fail-on=error,warning", built.service, built.plugin],
        capture_output=True,
        text=True,
        check=False,
    )
    assert (outcome.returncode, outcome.stdout) == (0, "")


@pytest.mark.long
def test_the_build_is_reproducible(built: Packages, tmp_path: Path) -> None:
    """Another owner, umask, time zone and file times, and an untracked file change nothing."""
    copied = """
        umask 077
        git -C "$1" ls-files -z | (cd "$1" && xargs -0 cp -P --parents -t "$2")
        cd "$2"
        git init -q && git add .
        find . -path ./.git -prune -o -type f -exec touch -d 2001-01-01 {} +
        echo 'stray = True' >snapd_native/stray.py
        chown -R nobody .
        TZ=Asia/Tokyo LC_ALL=C tools/build-deb built
    """
    tree = tmp_path / "tree"
    tree.mkdir()
    subprocess.run(["bash", "-euc", copied, "bash", PROJECT, tree], check=True, capture_output=True)
    check_same(tree / "built", built)


def check_same(directory: Path, built: Packages) -> None:
    """Check that a directory contains only the packages, and that their bytes are the same."""
    packages = (built.service, built.plugin)
    assert {path.name: path.read_bytes() for path in directory.iterdir()} == {
        package.name: package.read_bytes() for package in packages
    }


@pytest.mark.long
def test_the_packages_build_without_a_git_repository(built: Packages, tmp_path: Path) -> None:
    """The virtual machine builds them in this way. The build leaves only the packages."""
    copied = 'git -C "$1" ls-files -z | (cd "$1" && xargs -0 cp -P --parents -t "$2")'
    subprocess.run(["bash", "-euc", copied, "bash", PROJECT, tmp_path], check=True)
    # The machine has a copy of a tree for development, with messages for its version of protobuf.
    for suffix in ("py", "pyi"):
        (tmp_path / "snapd_native" / "containerd" / f"snapshots_pb2.{suffix}").write_text("stray")
    before = {*tmp_path.rglob("*")}
    run_command(tmp_path / "tools" / "build-deb")
    dist = tmp_path / "dist"
    assert {*tmp_path.rglob("*")} - before == {dist, *dist.iterdir()}
    check_same(dist, built)
