"""Tests with the Python, the libraries and the containerd of each release of Debian."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support import PROJECT
from tests.support.commands import run_command
from tests.support.debian import SUITES, Machine, dependencies, install_release, start_machine
from tests.support.package import Packages

pytestmark = [pytest.mark.long, pytest.mark.timeout(1200)]

TOOLS = (
    *(
        "acl",
        "attr",
        "dbus",
        "e2fsprogs",
        "libcap2-bin",
        "mount",
        "polkitd",
        "procps",
        "rsync",
        "systemd",
    ),
    *("xfsprogs", "python3-hypothesis", "python3-pytest", "python3-pytest-timeout"),
    *("busybox-static", "containerd", "protobuf-compiler", "runc"),
)
"""Debian packages with the programs and modules that the tests use."""

STRICT = """
import warnings
warnings.filterwarnings("error", category=DeprecationWarning, module=r"snapd_native(\\..*)?")
"""
"""A deprecated call by the package is an error in every process; those of libraries are not."""


@pytest.fixture(params=SUITES)
def debian(request: pytest.FixtureRequest, built: Packages, tmp_path: Path) -> Iterator[Machine]:
    """Start a Debian with the packages, what they depend on, and the tests without the program."""
    root, files = tmp_path / "debian", tmp_path / "files"
    install_release(request.param, root, [*TOOLS, *dependencies(built)])
    source = files / "source"
    listed = run_command("git", "-c", f"safe.directory={PROJECT}", "-C", PROJECT, "ls-files", "-z")
    for name in filter(None, listed.split("\0")):
        if not name.startswith("snapd_native/"):
            (source / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(PROJECT / name, source / name, follow_symlinks=False)
    (files / "strict").mkdir()
    (files / "strict" / "sitecustomize.py").write_text(STRICT)
    for package in (built.service, built.plugin):
        shutil.copy(package, files)
    try:
        with start_machine(root, files) as machine:
            machine("dpkg --install /root/*.deb")
            yield machine
    finally:
        shutil.rmtree(root)


def test_the_contract_holds_with_the_libraries_of_debian(debian: Machine) -> None:
    version = debian("python3 --version")
    shown = debian.run(
        """
        export PYTHONPATH=/root/strict
        cd /root/source
        python3 -P -c 'import snapd_native; print(snapd_native.__file__)'
        python3 -m pytest -q -p no:cacheprovider -k 'not [xfs' \\
            tests/contract tests/bus/test_service.py tests/client tests/containerd
        """
    )
    print(version, shown.stdout)
    assert shown.returncode == 0, f"{version}{shown.stdout[-8000:]}{shown.stderr[-4000:]}"
    assert shown.stdout.startswith("/usr/lib/python3/dist-packages/snapd_native/__init__.py\n")
    assert " passed" in shown.stdout
