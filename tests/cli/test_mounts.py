"""The mount commands: mount, umount, mounts, and the lines they print for mounting by hand."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from snapd_native import errors
from snapd_native.cli.exits import STATUSES
from snapd_native.client import BlockingClient
from snapd_native.model import Lifetime
from snapd_native.private import private_bus
from tests.support.bus_mounts import populate_and_unmount
from tests.support.command_line import PROGRAM, expect_failure, output_of, run_program
from tests.support.file_systems import FileSystem, scratch_on
from tests.support.kernel_mounts import (
    entry_on,
    make_target,
    mounts_below,
    run_process_in,
)
from tests.support.service import NOBODY, Service, remove_all, run_daemon


@pytest.fixture(scope="module")
def filesystem(ext4: FileSystem) -> FileSystem:
    """Return ext4: the mount commands do the same on every file system."""
    return ext4


@pytest.fixture(scope="module")
def module_service(bus: str, ext4: FileSystem) -> Iterator[Service]:
    """Run a daemon with a state directory whose name must be quoted in a shell."""
    with scratch_on(ext4) as scratch, run_daemon(bus, scratch / "a 'state' #1") as service:
        yield service


@pytest.fixture
def populated_service(module_service: Service, on_bus: str) -> Iterator[Service]:
    """Lend the daemon with the snapshots of `populate_service`; remove them after the test."""
    assert on_bus == module_service.address
    with populate_and_unmount(module_service):
        yield module_service
    with BlockingClient() as client:
        remove_all(client)


@pytest.mark.parametrize(
    ("arguments", "read_only"),
    [(["work"], False), (["work", "--read-only"], True), (["look"], True)],
)
def test_a_mount_stays_until_the_umount_command(
    populated_service: Service, places: Path, arguments: list[str], read_only: bool
) -> None:
    here = make_target(places, "with space")
    key, *rest = arguments
    assert output_of("mount", key, str(here), *rest) == f"{here}\n"
    # The mount stays after the program ends.
    assert entry_on(here).read_only is read_only
    assert (here / "file").read_text() == "text"
    assert output_of("umount", str(here)) == ""
    assert mounts_below(places) == []


def test_mount_without_a_target_makes_a_directory_that_umount_removes(
    populated_service: Service,
) -> None:
    target = Path(output_of("mount", "look").rstrip("\n"))
    assert target.is_absolute()
    assert entry_on(target).read_only
    assert output_of("umount", "look") == ""
    assert not target.exists()


def test_a_relative_target_is_resolved_from_the_current_directory(
    populated_service: Service, places: Path
) -> None:
    here, there = make_target(places), make_target(places, "there")
    assert output_of("mount", "work", "here", cwd=places) == f"{here}\n"
    assert output_of("mount", "look", "../there/", cwd=here) == f"{there}\n"
    assert mounts_below(places) == [str(here), str(there)]
    output_of("umount", "./here", cwd=places)
    output_of("umount", "there/", cwd=places)
    assert mounts_below(places) == []


def test_umount_of_a_key_unmounts_all_its_mounts(populated_service: Service, places: Path) -> None:
    here, there, other = (str(make_target(places, name)) for name in ("here", "there", "other"))
    for target, key in ((here, "work"), (other, "look"), (there, "work")):
        output_of("mount", key, target)
    own = output_of("mount", "work").rstrip("\n")
    assert output_of("umount", "work") == ""
    assert mounts_below(places) == [other]
    assert not Path(own).exists()
    assert '"work" is not mounted' in expect_failure(errors.NotFound, "umount", "work")
    for what in (here, "none", "base", "work/"):
        assert what in expect_failure(errors.NotFound, "umount", what)
    assert mounts_below(places) == [other]


def test_umount_tries_its_argument_as_a_directory_before_a_key(
    populated_service: Service, places: Path
) -> None:
    work, there = str(make_target(places, "work")), str(make_target(places, "there"))
    output_of("mount", "look", work)
    output_of("mount", "work", there)
    output_of("umount", "work", cwd=places)
    assert mounts_below(places) == [there]
    output_of("umount", "work", cwd=places)
    assert mounts_below(places) == []


def test_umount_of_a_busy_mount_needs_the_lazy_option(
    populated_service: Service, places: Path
) -> None:
    here = make_target(places)
    output_of("mount", "work", str(here))
    with run_process_in(here) as cat:
        for what in (str(here), "work"):
            line = expect_failure(errors.FailedPrecondition, "umount", what)
            assert f"cat (pid {cat.pid})" in line
        assert output_of("umount", "--lazy", "work") == ""
    assert mounts_below(places) == []


def test_mounts_prints_target_key_options_lifetime_and_uid(
    populated_service: Service, places: Path
) -> None:
    assert output_of("mounts").split() == ["TARGET", "KEY", "OPTIONS", "LIFETIME", "UID"]
    assert json.loads(output_of("mounts", "--json")) == []
    here, there = make_target(places), make_target(places, "a\nlong \x1b name")
    output_of("mount", "work", str(here))
    with BlockingClient() as client:
        client.mount("look", str(there), lifetime=Lifetime.CLIENT)
        assert json.loads(output_of("mounts", "--json")) == [
            {
                "target": str(here),
                "key": "work",
                "read-only": False,
                "lifetime": "persistent",
                "uid": 0,
            },
            {
                "target": str(there),
                "key": "look",
                "read-only": True,
                "lifetime": "client",
                "uid": 0,
            },
        ]
        heading, *lines = output_of("mounts").splitlines()
    assert [line.split()[-4:] for line in lines] == [
        ["work", "rw", "persistent", "0"],
        ["look", "ro", "client", "0"],
    ]
    assert lines[0].startswith(f"{here} ")
    assert lines[1].startswith(f"{places}/a\\nlong \\x1b name ")
    assert heading.index("KEY") == lines[0].index("work") == lines[1].index("look")


NAMES = ["here", "with space", "tab\tand\\slash", "new\nline", "a#b 'c' \"$d\"", "ü\u2003x"]


@pytest.mark.parametrize(("key", "name"), [("look", "here"), *(("work", name) for name in NAMES)])
def test_the_printed_fstab_line_mounts_the_snapshot(
    populated_service: Service, places: Path, key: str, name: str
) -> None:
    here = make_target(places, name)
    line = output_of("mounts", key, str(here), "--fstab")
    assert line.count("\n") == 1
    assert len(line.split()) == 6
    table = places / "fstab"
    table.write_text(f"# the table\n{line}")
    subprocess.run(["mount", "-T", str(table), str(here)], check=True)
    check_mounted_by_hand(here, read_only=key == "look")
    assert output_of("mounts", key, name, "--fstab", cwd=places) == line


@pytest.mark.parametrize(("key", "name"), [("look", "here"), *(("work", name) for name in NAMES)])
def test_the_printed_mount_command_mounts_the_snapshot(
    populated_service: Service, places: Path, key: str, name: str
) -> None:
    here = make_target(places, name)
    line = output_of("mounts", key, str(here), "--command")
    subprocess.run(["sh", "-c", line], check=True)
    check_mounted_by_hand(here, read_only=key == "look")
    assert output_of("mounts", key, name, "--command", cwd=places) == line


def check_mounted_by_hand(here: Path, *, read_only: bool) -> None:
    assert entry_on(here).read_only is read_only
    assert (here / "file").read_text() == "text"
    # The service has no record of this mount.
    assert json.loads(output_of("mounts", "--json")) == []
    subprocess.run(["umount", str(here)], check=True)


def test_without_a_target_the_printed_lines_use_mnt(populated_service: Service) -> None:
    assert output_of("mounts", "look", "--fstab").split()[1] == "/mnt"
    assert output_of("mounts", "look", "--command").rstrip("\n").endswith(" /mnt")


@pytest.mark.parametrize("form", ["--fstab", "--command"])
def test_a_target_that_is_not_utf_8_causes_no_traceback(
    populated_service: Service, places: Path, form: str
) -> None:
    here = os.fsencode(places) + b"/\xff x"
    outcome = subprocess.run(
        [*PROGRAM, "mounts", "look", here, form], capture_output=True, check=False
    )
    assert b"Traceback" not in outcome.stderr
    assert outcome.returncode in (0, STATUSES[errors.InvalidArgument])
    if outcome.returncode == 0:
        assert b"/\xff" in outcome.stdout


@pytest.mark.parametrize("command", ["mount", "umount"])
def test_mount_and_umount_refuse_arguments_that_are_not_utf_8(
    populated_service: Service, places: Path, command: str
) -> None:
    for arguments in ([b"\xff"], ["work", os.fsencode(places) + b"/\xff"]):
        outcome = run_program(command, *arguments[-1 if command == "umount" else 0 :])
        (line,) = outcome.stderr.splitlines()
        assert line.startswith("snapd-native: ")
        kinds = (errors.InvalidArgument, errors.NotFound)
        assert outcome.returncode in [STATUSES[kind] for kind in kinds]


@pytest.mark.parametrize(
    "arguments",
    [
        ["mount"],
        ["mount", "work", "/mnt", "/opt"],
        ["mount", "work", "--rw"],
        ["mount", "work", "--read-only=yes"],
        ["umount"],
        ["umount", "/mnt", "/opt"],
        ["umount", "--force", "/mnt"],
        ["mounts", "--fstab"],
        ["mounts", "--command"],
        ["mounts", "", "/mnt", "--command"],
        ["mounts", "work", "--fstab", "--json"],
        ["mounts", "work", "/mnt", "--command", "--json"],
        ["mounts", "work", "/mnt", "/opt"],
    ],
)
def test_wrong_usage_prints_one_line_and_exits_with_2(
    populated_service: Service, arguments: list[str]
) -> None:
    outcome = run_program(*arguments)
    assert (outcome.returncode, outcome.stdout) == (2, "")
    (line,) = outcome.stderr.splitlines()
    assert line.startswith("snapd-native: ")
    assert line.endswith(" --help.")


def test_a_failed_mount_command_exits_with_the_status_of_its_error(
    populated_service: Service, places: Path
) -> None:
    here, there = str(make_target(places)), str(make_target(places, "there"))
    (places / "link").symlink_to(there)
    output_of("mount", "work", here)
    with BlockingClient() as client:
        shutil.rmtree(client.prepare("lost").source)
    for kind, *arguments in (
        (errors.InvalidArgument, "mount", "", there),
        (errors.InvalidArgument, "mount", "work", f"{places}/none"),
        (errors.InvalidArgument, "mount", "work", f"{places}/link"),
        (errors.InvalidArgument, "mount", "work", str(populated_service.state)),
        (errors.NotFound, "mount", "none", there),
        (errors.NotFound, "mounts", "none", "--fstab"),
        (errors.AlreadyExists, "mount", "look", here),
        (errors.FailedPrecondition, "mount", "base", there),
        (errors.FailedPrecondition, "mounts", "base", there, "--command"),
        (errors.FailedPrecondition, "rm", "work"),
        (errors.DataLoss, "mount", "lost", there),
    ):
        expect_failure(kind, *arguments)
    assert mounts_below(places) == [here]


@pytest.mark.parametrize("command", [["mount", "work"], ["umount", "work"], ["mounts"]])
def test_a_mount_command_of_another_user_exits_with_access_denied(
    populated_service: Service, command: list[str]
) -> None:
    expect_failure(errors.AccessDenied, *command, user=NOBODY)


@pytest.mark.parametrize("command", [["mount", "work"], ["umount", "work"], ["mounts"]])
def test_a_mount_command_without_a_daemon_exits_with_unavailable(
    command: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    with private_bus() as address:
        monkeypatch.setenv("DBUS_SYSTEM_BUS_ADDRESS", address)
        assert "systemctl start" in expect_failure(errors.Unavailable, *command)
