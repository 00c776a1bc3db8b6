"""The Debian package: its content, and that the same sources give the same package."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from snapd_native import __version__
from tests.support import PROJECT
from tests.support.commands import run_command

FILES = {
    "/usr/bin/snapd-native": "-rwxr-xr-x",
    "/usr/lib/systemd/system/snapd-native.service": "-rw-r--r--",
    "/usr/lib/systemd/system/snapd-native@.service": "-rw-r--r--",
    "/usr/lib/systemd/system/snapd-native@.service.d/instance.conf": "-rw-r--r--",
    "/usr/lib/tmpfiles.d/snapd-native.conf": "-rw-r--r--",
    "/usr/lib/python3/dist-packages/snapd_native/client/__init__.py": "-rw-r--r--",
    "/usr/lib/python3/dist-packages/snapd_native/bus/org.snapdnative1.xml": "-rw-r--r--",
    "/usr/share/bash-completion/completions/snapd-native": "-rw-r--r--",
    "/usr/share/dbus-1/interfaces/org.snapdnative1.xml": "-rw-r--r--",
    "/usr/share/dbus-1/system-services/org.snapdnative1.service": "-rw-r--r--",
    "/usr/share/dbus-1/system.d/org.snapdnative1.conf": "-rw-r--r--",
    "/usr/share/doc/snapd-native/copyright": "-rw-r--r--",
    "/usr/share/fish/vendor_completions.d/snapd-native.fish": "-rw-r--r--",
    "/usr/share/polkit-1/actions/org.snapdnative1.policy": "-rw-r--r--",
    "/usr/share/zsh/vendor-completions/_snapd-native": "-rw-r--r--",
}


def test_the_package_has_the_version_of_the_program(package: Path) -> None:
    assert run_command("dpkg-deb", "--field", package, "Version").strip() == __version__
    assert package.name == f"snapd-native_{__version__}_all.deb"


def test_the_package_contains_its_files_with_the_right_modes(package: Path) -> None:
    lines = [line.split() for line in run_command("dpkg-deb", "--contents", package).splitlines()]
    modes = {line[5].removeprefix("."): line[0] for line in lines}
    assert {path: modes.get(path) for path in FILES} == FILES
    assert {line[1] for line in lines} == {"root/root"}
    packages = {path.split("/")[5] for path in modes if "/dist-packages/" in path[:-1]}
    assert packages == {"snapd_native", f"snapd_native-{__version__}.dist-info"}


def test_lintian_reports_nothing(package: Path) -> None:
    outcome = subprocess.run(
        ["lintian", "--allow-root", "--fail-on=error,warning", package],
        capture_output=True,
        text=True,
        check=False,
    )
    assert (outcome.returncode, outcome.stdout) == (0, "")


@pytest.mark.long
def test_the_build_is_reproducible(package: Path, tmp_path: Path) -> None:
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
    (built,) = (tree / "built").glob("*.deb")
    assert built.read_bytes() == package.read_bytes()


@pytest.mark.long
def test_the_package_builds_without_a_git_repository(package: Path, tmp_path: Path) -> None:
    """The virtual machine builds it in this way. The build leaves only the package."""
    copied = 'git -C "$1" ls-files -z | (cd "$1" && xargs -0 cp -P --parents -t "$2")'
    subprocess.run(["bash", "-euc", copied, "bash", PROJECT, tmp_path], check=True)
    before = {*tmp_path.rglob("*")}
    run_command(tmp_path / "tools" / "build-deb")
    (built,) = (tmp_path / "dist").iterdir()
    assert {*tmp_path.rglob("*")} - before == {built.parent, built}
    assert built.read_bytes() == package.read_bytes()
