"""The program without Debian's package: make install, a wheel, a source archive, RPM packages."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from snapd_native import __version__
from snapd_native.private import private_bus
from tests.support import PROJECT
from tests.support.commands import run_command
from tests.support.package import Packages
from tests.support.readme import shell_block
from tests.support.waiting import wait_until

DEBIAN_DIRECTORIES = {
    "PREFIX": "/usr",
    "PYTHONDIR": "/usr/lib/python3/dist-packages",
    "UNITDIR": "/usr/lib/systemd/system",
    "ZSHDIR": "/usr/share/zsh/vendor-completions",
}
"""The directories of Debian's package."""

DATA_PATHS = ("/systemd/", "/dbus-1/", "/polkit-1/", "/man/", "/tmpfiles.d/")
"""Parts of the paths of the files that are not the program."""

TOOLS = "basename cat chmod command dirname find install mkdir mv rm sed sh"
"""The programs that `tools/install` uses. None of them is only in Debian."""


def make(goal: str, **variables: str | Path) -> str:
    settings = {"PYTHON": sys.executable, **variables}
    given = (f"{name}={value}" for name, value in settings.items())
    return run_command("make", "--no-print-directory", "-C", PROJECT, goal, *given)


def is_data(path: str) -> bool:
    return any(part in path for part in DATA_PATHS)


def files(top: Path) -> set[str]:
    """Return the paths of all files below a directory, without caches, and without `.gz`."""
    found = (str(path.relative_to(top)) for path in top.rglob("*") if not path.is_dir())
    return {f"/{path.removesuffix('.gz')}" for path in found if "__pycache__" not in path}


def extract(built: Packages, directory: Path) -> Path:
    """Extract both packages into a directory."""
    for package in (built.service, built.plugin):
        run_command("dpkg-deb", "--extract", package, directory)
    return directory


def test_make_install_has_the_files_of_the_debian_packages(built: Packages, tmp_path: Path) -> None:
    make("install", DESTDIR=tmp_path / "made", **DEBIAN_DIRECTORIES)
    extract(built, tmp_path / "debian")
    only_there = ("/usr/share/doc/", "/usr/share/lintian/", ".dist-info/")
    packaged = files(tmp_path / "debian")
    assert files(tmp_path / "made") == {
        path for path in packaged if not any(part in path for part in only_there)
    }
    # The program's first line names another Python, and the completions vary with click.
    for path in filter(is_data, packaged):
        one, other = (tmp_path / root / path[1:] for root in ("made", "debian"))
        if other.exists():
            assert one.read_bytes() == other.read_bytes(), path
            assert one.stat().st_mode == other.stat().st_mode, path


def programs(directory: Path) -> Path:
    """Make a directory with the programs that `tools/install` needs besides Python."""
    directory.mkdir()
    for tool in TOOLS.split():
        if found := shutil.which(tool):
            (directory / tool).symlink_to(found)
    return directory


def test_make_uninstall_removes_every_file(tmp_path: Path) -> None:
    make("install", DESTDIR=tmp_path, **DEBIAN_DIRECTORIES)
    make("uninstall", DESTDIR=tmp_path, **DEBIAN_DIRECTORIES)
    assert files(tmp_path) == set()


def test_the_installed_program_serves_on_a_system_without_debians_tools(
    tmp_path: Path, host_state: Path
) -> None:
    tools = programs(tmp_path / "tools")
    root = tmp_path / "root"
    python = root / "python"
    subprocess.run(
        [PROJECT / "tools/install", "all"],
        env={
            "PATH": str(tools),
            "DESTDIR": str(root),
            "PYTHON": sys.executable,
            "PYTHONDIR": "/python",
        },
        check=True,
        cwd="/",
    )
    program = root / "usr/local/bin/snapd-native"
    unit = (root / "usr/lib/systemd/system/snapd-native.service").read_text()
    assert "ExecStart=/usr/local/bin/snapd-native daemon\n" in unit
    with private_bus() as address:
        environment = {
            **os.environ,
            "PYTHONPATH": str(python),
            "DBUS_SYSTEM_BUS_ADDRESS": address,
            "STATE_DIRECTORY": str(host_state),
            "RUNTIME_DIRECTORY": str(tmp_path / "run"),
        }

        def call(*arguments: str) -> subprocess.CompletedProcess[str]:
            return subprocess.run(
                [program, *arguments],
                env=environment,
                cwd="/",
                capture_output=True,
                text=True,
                check=False,
            )

        with subprocess.Popen([program, "daemon"], env=environment, cwd="/") as daemon:
            wait_until(lambda: call("ls").returncode == 0)
            assert call("prepare", "build").returncode == 0
            assert call("commit", "v1", "build").returncode == 0
            where = Path(f"/proc/{daemon.pid}/cmdline").read_bytes().split(b"\0")
            assert os.fsencode(program) in where
            daemon.terminate()
            assert daemon.wait() == 0


def test_make_install_names_the_python_that_does_not_search_the_prefix(tmp_path: Path) -> None:
    outcome = subprocess.run(
        [PROJECT / "tools/install", "program"],
        env={
            **os.environ,
            "PYTHON": sys.executable,
            "PREFIX": "/nowhere",
            "DESTDIR": str(tmp_path),
        },
        capture_output=True,
        text=True,
        check=False,
    )
    assert outcome.returncode == 1
    assert outcome.stderr == (
        f"make install needs PYTHONDIR, because {sys.executable} searches no directory below"
        " /nowhere: name one that it searches.\n"
    )
    assert files(tmp_path) == set()


def test_make_install_without_protoc_names_it(tmp_path: Path) -> None:
    python = tmp_path / "python"
    # -S: without grpcio-tools.
    python.write_text(f'#!/bin/sh\nexec {sys.executable} -S "$@"\n')
    python.chmod(0o755)
    outcome = subprocess.run(
        [PROJECT / "tools/install", "program"],
        env={
            "PATH": str(programs(tmp_path / "tools")),
            "PYTHON": str(python),
            "PYTHONDIR": "/python",
            "DESTDIR": str(tmp_path / "root"),
        },
        capture_output=True,
        text=True,
        check=False,
    )
    assert outcome.returncode == 1
    assert outcome.stderr == (
        "The messages of the containerd plugin need protoc: install protobuf-compiler, or"
        f" grpcio-tools for {python}.\n"
    )
    assert files(tmp_path / "root") == set()


def test_make_install_compiles_the_messages_without_protoc_by_grpcio_tools(
    tmp_path: Path,
) -> None:
    subprocess.run(
        [PROJECT / "tools/install", "program"],
        env={
            "PATH": str(programs(tmp_path / "tools")),
            "PYTHON": sys.executable,
            "PYTHONDIR": "/python",
            "DESTDIR": str(tmp_path / "root"),
        },
        check=True,
    )
    where = tmp_path / "root" / "python" / "snapd_native" / "containerd"
    assert "snapshots_pb2.py" in {path.name for path in where.iterdir()}
    assert not {*where.glob("*.pyi")}


@pytest.mark.long
def test_wheel_source_archive_and_rpms_carry_the_same_data(built: Packages, tmp_path: Path) -> None:
    assert shell_block("archives") == "make dist\nmake rpm\n"
    source = tmp_path / "source"
    listed = run_command("git", "-c", f"safe.directory={PROJECT}", "-C", PROJECT, "ls-files", "-z")
    for name in filter(None, listed.split("\0")):
        (source / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(PROJECT / name, source / name, follow_symlinks=False)
    # As in a tree for development.
    for suffix in ("py", "pyi"):
        (source / "snapd_native" / "containerd" / f"snapshots_pb2.{suffix}").write_text("stray")
    # The environment of this tree serves the copy too.
    own = ("-o", "development", f"bin={Path(sys.executable).parent}")
    for goal in ("dist", "rpm"):
        run_command("make", "--no-print-directory", "-C", source, *own, goal)

    data = set(filter(is_data, files(extract(built, tmp_path / "debian"))))
    dist = source / "dist"
    with zipfile.ZipFile(dist / f"snapd_native-{__version__}-py3-none-any.whl") as wheel:
        prefix = f"snapd_native-{__version__}.data/data"
        names = wheel.namelist()
    inside = {name.removeprefix(prefix) for name in names if name.startswith(prefix)}
    assert {f"/usr{name}" for name in inside} == data
    # The messages, and neither their description nor their type stubs.
    room = "snapd_native/containerd/snapshots"
    compiled = {name.removeprefix(room) for name in names if name.startswith(room)}
    assert compiled == {".py", "_pb2.py"}
    run_command("tar", "-xf", dist / f"snapd_native-{__version__}.tar.gz", "-C", tmp_path)
    unpacked = tmp_path / f"snapd_native-{__version__}"
    assert not {*unpacked.rglob("snapshots_pb2.*")}
    subprocess.run(
        [unpacked / "tools/install", "data"],
        env={
            **os.environ,
            **DEBIAN_DIRECTORIES,
            "PYTHON": sys.executable,
            "DESTDIR": str(tmp_path / "made"),
        },
        check=True,
    )
    assert data <= files(tmp_path / "made")
    service, plugin = (
        run_command("rpm", "--query", "--list", "--package", dist / f"{name}.noarch.rpm")
        for name in (f"snapd-native-{__version__}-1", f"snapd-native-containerd-{__version__}-1")
    )
    assert plugin == "/usr/lib/systemd/system/snapd-native-containerd.service\n"
    assert data - {plugin.strip()} <= {path.removesuffix(".gz") for path in service.splitlines()}
    assert plugin.strip() not in service.splitlines()


def test_the_rpm_specification_has_the_version_of_the_program() -> None:
    text = (PROJECT / "rpm/snapd-native.spec").read_text()
    assert f"\nVersion:        {__version__}\n" in text
    assert f" - {__version__}-1\n" in text
