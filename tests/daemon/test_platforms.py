"""Where the service runs, and what it says where it cannot run; see docs/platforms.md."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from snapd_native.client import BlockingClient
from tests.support.daemon_process import expect_start_failure
from tests.support.file_systems import new_file_system
from tests.support.service import run_daemon


def mount(root: Path, *arguments: str) -> None:
    subprocess.run(["mount", *arguments, root], check=True)


@pytest.fixture
def root(request: pytest.FixtureRequest, loop_directory: Path, tmp_path: Path) -> Iterator[Path]:
    """Mount the file system that a test names."""
    if request.param == "btrfs":
        with new_file_system("btrfs", 512 << 20, loop_directory) as made:
            yield made.root
        return
    below = tmp_path / "below"
    below.mkdir()
    mount(below, "-t", "tmpfs", "tmpfs")
    root = below
    if request.param == "overlay":
        root = tmp_path / "overlay"
        for directory in (root, below / "lower", below / "upper", below / "work"):
            directory.mkdir()
        options = f"lowerdir={below}/lower,upperdir={below}/upper,workdir={below}/work"
        mount(root, "-t", "overlay", "-o", options, "overlay")
    try:
        yield root
    finally:
        for directory in dict.fromkeys((root, below)):
            subprocess.run(["umount", directory], check=True)


@pytest.mark.parametrize("root", ["tmpfs", "overlay", "btrfs"], indirect=True)
def test_every_kind_of_call_works_on_other_file_systems(on_bus: str, root: Path) -> None:
    with run_daemon(on_bus, root / "state"), BlockingClient() as client:
        client.prepare("build")
        tree = Path(client.mounts("build").source)
        (tree / "file").write_text("data\n")
        client.commit("base", "build", digest=True)
        client.prepare("work", "base")
        assert (Path(client.mounts("work").source) / "file").read_text() == "data\n"
        client.view("look", "base")
        client.unmount(client.mount("look"))
        client.verify("base")
        assert client.usage("work").inodes == 2
        assert client.check() == []
        for key in ("look", "work", "base"):
            client.remove(key)
        client.cleanup()
        assert list((root / "state" / "snapshots").iterdir()) == []


@pytest.mark.parametrize("root", ["tmpfs"], indirect=True)
@pytest.mark.parametrize("part", ["state", "state-run"])
def test_the_daemon_names_a_read_only_file_system(on_bus: str, root: Path, part: str) -> None:
    for name in {"state", "state-run"} - {part}:
        (root / name).mkdir()
        mount(root / name, "-t", "tmpfs", "tmpfs")
    try:
        mount(root, "-o", "remount,ro")
        status, line = expect_start_failure(on_bus, root / "state")
    finally:
        subprocess.run(["umount", root / {"state": "state-run", "state-run": "state"}[part]])
    assert status == 1
    assert f"{root}/{part}" in line
    assert "read-only" in line


@pytest.mark.parametrize("root", ["tmpfs"], indirect=True)
@pytest.mark.parametrize(
    "container",
    [
        ("setpriv", "--bounding-set=-sys_admin", "--inh-caps=-sys_admin"),
        # In a user namespace of its own, root owns no mount of the host.
        ("unshare", "--user", "--map-root-user"),
    ],
    ids=["without CAP_SYS_ADMIN", "in a user namespace"],
)
def test_the_daemon_refuses_to_start_in_a_container_that_may_not_mount(
    on_bus: str, root: Path, container: tuple[str, ...]
) -> None:
    status, line = expect_start_failure(on_bus, root / "state", through=container)
    assert status == 1
    assert "does not permit mounts here" in line
    assert "CAP_SYS_ADMIN" in line
    assert not (root / "state").exists()
