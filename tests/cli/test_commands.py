"""The commands of the program, run as processes: output, exit statuses and errors."""

from __future__ import annotations

import json
import os
import pty
import shlex
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

import pytest

from snapd_native import __version__, errors
from snapd_native.cli import render
from snapd_native.cli.exits import STATUSES
from snapd_native.cli.main import cli
from snapd_native.client import BlockingClient
from snapd_native.model import Usage
from snapd_native.private import private_bus
from tests.support.command_line import PROGRAM, expect_failure, output_of, run_program
from tests.support.file_systems import on_ext4
from tests.support.service import NOBODY, Service, commit_snapshot

pytestmark = on_ext4


@pytest.fixture(autouse=True)
def running_service(shared_service: Service) -> Service:
    """Run the program on the bus of a daemon without snapshots."""
    return shared_service


def test_the_snapshot_commands_work_from_prepare_to_rm() -> None:
    type_, source, options = output_of("prepare", "build", "-l", "a=1").rstrip("\n").split("\t")
    assert (type_, options) == ("bind", "rbind,rw")
    assert Path(source).is_dir()
    assert output_of("mounts", "build").split("\t")[1] == source
    assert output_of("commit", "v1", "build", "-l", "b=2") == ""
    assert output_of("view", "look", "v1").rstrip("\n").endswith("rbind,ro")
    listed = output_of("ls").splitlines()
    assert [line.split()[:3] for line in listed] == [
        ["NAME", "KIND", "PARENT"],
        ["look", "view", "v1"],
        ["v1", "committed", "-"],
    ]
    drawn = output_of("tree").splitlines()
    assert drawn[0].startswith("v1 ")
    assert drawn[1].startswith("└── look ")
    assert output_of("rm", "look", "v1") == ""
    assert output_of("cleanup") == ""
    assert output_of("tree") == ""
    assert not Path(source).exists()


def test_json_output_has_the_expected_fields() -> None:
    output_of("prepare", "ü \n", "--label", "a=b=c")
    output_of("commit", "v1", "ü \n", "-l", "k=v")
    output_of("view", "look", "v1")
    info = json.loads(output_of("stat", "--json", "v1"))
    assert info | {"created": "", "updated": ""} == {
        "name": "v1",
        "kind": "committed",
        "parent": "",
        "created": "",
        "updated": "",
        "labels": {"k": "v"},
    }
    assert info["created"].endswith("Z")
    assert json.loads(output_of("ls", "--json", "kind==committed")) == [info]
    (root,) = json.loads(output_of("tree", "--json"))
    assert [child["name"] for child in root["children"]] == ["look"]
    (usage,) = json.loads(output_of("usage", "--json", "v1"))
    assert usage["key"] == "v1"
    assert usage["inodes"] == 1
    mount = json.loads(output_of("mounts", "--json", "look"))
    assert mount["options"] == ["rbind", "ro"]
    created = json.loads(output_of("prepare", "--json", "new"))
    assert set(created) == {"type", "source", "options"}


def test_label_sets_deletes_and_replaces_labels() -> None:
    output_of("prepare", "k", "-l", "a=1", "-l", "b=2")
    assert json.loads(output_of("label", "--json", "k", "c=3", "a-"))["labels"] == {
        "b": "2",
        "c": "3",
    }
    assert json.loads(output_of("label", "--json", "k", "d-=4"))["labels"]["d-"] == "4"
    replaced = output_of("label", "--json", "k", "--replace", "z=9")
    assert json.loads(replaced)["labels"] == {"z": "9"}
    assert json.loads(output_of("label", "--json", "k", "--replace"))["labels"] == {}


def test_commit_with_the_parent_option_sets_the_parent() -> None:
    output_of("prepare", "a")
    output_of("commit", "base", "a")
    output_of("prepare", "b")
    output_of("commit", "top", "b", "--parent", "base")
    assert json.loads(output_of("stat", "--json", "top"))["parent"] == "base"


@pytest.mark.parametrize(
    ("arguments", "kind"),
    [
        (["prepare", ""], errors.InvalidArgument),
        (["prepare", "k" * 4097], errors.InvalidArgument),
        (["prepare", b"\xff"], errors.InvalidArgument),
        (["prepare", "k", "-l", "nothing"], errors.InvalidArgument),
        (["prepare", "k", "-l", "=v"], errors.InvalidArgument),
        (["prepare", "k", "absent"], errors.NotFound),
        (["prepare", "k", "active"], errors.InvalidArgument),
        (["prepare", "active"], errors.AlreadyExists),
        (["view", "active"], errors.AlreadyExists),
        (["commit", "v", "absent"], errors.NotFound),
        (["commit", "v", "view"], errors.FailedPrecondition),
        (["commit", "base", "active"], errors.AlreadyExists),
        (["mounts", "base"], errors.FailedPrecondition),
        (["mounts", "absent"], errors.NotFound),
        (["stat", "absent"], errors.NotFound),
        (["label", "absent", "a=b"], errors.NotFound),
        (["label", "base", "a"], errors.InvalidArgument),
        (["usage", "absent"], errors.NotFound),
        (["ls", "name~=["], errors.InvalidArgument),
        (["rm", "absent"], errors.NotFound),
        (["rm", "base"], errors.FailedPrecondition),
    ],
)
def test_a_failed_command_exits_with_the_status_of_its_error(
    shared_client: BlockingClient, arguments: list[str | bytes], kind: type[errors.SnapdError]
) -> None:
    commit_snapshot(shared_client, "base")
    shared_client.view("view", "base")
    shared_client.prepare("active")
    before = shared_client.list()
    expect_failure(kind, *arguments)
    assert shared_client.list() == before


@pytest.mark.parametrize(
    "arguments",
    [["nothing"], ["stat"], ["stat", "a", "b"], ["ls", "--limit"], ["label", "k"], ["-x"], ["rm"]],
)
def test_wrong_usage_prints_one_line_and_exits_with_2(
    arguments: list[str],
) -> None:
    outcome = run_program(*arguments)
    assert outcome.returncode == 2
    (line,) = outcome.stderr.splitlines()
    assert line.startswith("snapd-native: ")
    assert line.endswith("--help.")


def test_a_command_without_a_daemon_exits_with_unavailable() -> None:
    with private_bus() as bus:
        for place in (bus, "unix:path=/nonexistent", "nonsense"):
            expect_failure(errors.Unavailable, "ls", environment={"DBUS_SYSTEM_BUS_ADDRESS": place})


def test_a_command_of_another_user_exits_with_access_denied() -> None:
    for arguments in (["ls"], ["prepare", "k"], ["daemon"], ["demo"]):
        expect_failure(errors.AccessDenied, *arguments, user=NOBODY)


def test_a_closed_pipe_causes_no_error_message() -> None:
    output_of("prepare", "k")
    script = f"{shlex.join(PROGRAM)} ls | true; exit ${{PIPESTATUS[0]}}"
    outcome = subprocess.run(["bash", "-c", script], capture_output=True, text=True, check=False)
    assert outcome.stderr == ""


def test_output_escapes_control_characters_of_names() -> None:
    output_of("prepare", "\x1b[31mred", "-l", "k=\x1b]0;title\x07")
    for command in (["ls"], ["tree"], ["stat", "\x1b[31mred"], ["usage", "\x1b[31mred"]):
        text = output_of(*command)
        assert "\x1b" not in text
        assert "\\x1b[31mred" in text


def test_output_shows_characters_outside_its_encoding_as_escapes() -> None:
    output_of("prepare", "Käse ключ")
    environment = {**os.environ, "PYTHONIOENCODING": "latin-1:strict"}
    listed = subprocess.run([*PROGRAM, "ls"], env=environment, capture_output=True, check=True)
    assert b"\nK\xe4se \\u043a\\u043b\\u044e\\u0447 " in listed.stdout


def test_json_is_valid_in_every_encoding_of_the_output() -> None:
    output_of("prepare", "Käse 😀")
    environment = {**os.environ, "PYTHONIOENCODING": "latin-1:strict"}
    listed = subprocess.run([*PROGRAM, "ls", "--json"], env=environment, capture_output=True)
    assert [info["name"] for info in json.loads(listed.stdout.decode("latin-1"))] == ["Käse 😀"]


def test_help_names_every_command() -> None:
    listed = output_of("--help")
    assert all(f"  {name} " in listed for name in cli.commands)
    assert __version__ in output_of("--version")


def test_help_imports_no_heavy_modules() -> None:
    """These imports would make the help slow."""
    script = (
        "import sys; before = set(sys.modules); from snapd_native.cli.main import cli;"
        "print(*{'dbus_next', 'rich', 'sqlite3', 'asyncio', 'regex'} & set(sys.modules) - before)"
    )
    outcome = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True
    )
    assert outcome.stdout.split() == []


def test_exit_statuses_are_distinct() -> None:
    assert len(set(STATUSES.values())) == len(STATUSES)
    assert not {0, 2, 130} & set(STATUSES.values())


@pytest.mark.parametrize(
    ("count", "text"),
    [
        (0, "0 B"),
        (1023, "1023 B"),
        (1024, "1.0 KiB"),
        (1536, "1.5 KiB"),
        (1 << 20, "1.0 MiB"),
        (5 * (1 << 40), "5.0 TiB"),
        ((1 << 64) - 1, "16.0 EiB"),
    ],
)
def test_size_renders_bytes_in_binary_units(count: int, text: str) -> None:
    assert render.size(count) == text


def test_a_table_wider_than_the_terminal_is_folded_and_not_cut() -> None:
    """A table wider than the terminal still shows every character."""
    script = (
        "from snapd_native.cli import render;"
        "from snapd_native.model import Info, Kind;"
        "info = Info('n' * 300, Kind.ACTIVE, '', 0, 0, {'k': 'v' * 100});"
        "render.table([info], as_json=False)"
    )
    master, slave = pty.openpty()
    with subprocess.Popen(
        [sys.executable, "-c", script],
        stdout=slave,
        env={**os.environ, "COLUMNS": "80", "TERM": "xterm"},
    ) as process:
        os.close(slave)
        shown = b""
        # A read fails with EIO when no process has the terminal open any more.
        with suppress(OSError):
            while chunk := os.read(master, 4096):
                shown += chunk
    os.close(master)
    assert process.returncode == 0
    assert shown.count(b"n") >= 300
    assert shown.count(b"v") >= 100
    assert max(len(line) for line in shown.decode().splitlines()) < 200


def test_usage_output_is_aligned(capsys: pytest.CaptureFixture[str]) -> None:
    render.usage([("a", Usage(1, 1)), ("bb", Usage(1 << 30, 1_234_567))], as_json=False)
    heading, first, second = capsys.readouterr().out.splitlines()
    assert len(heading) == len(first) == len(second)
    assert second.endswith("1.0 GiB  1,234,567")


def test_check_prints_its_findings_and_exits_with_1(running_service: Service) -> None:
    assert output_of("check") == ""
    assert json.loads(output_of("check", "--json")) == []
    (running_service.state / "snapshots" / "987654321").mkdir()
    outcome = run_program("check")
    assert outcome.returncode == 1
    assert outcome.stdout == "orphan\t\t987654321 is no snapshot's: call Cleanup\n"
    outcome = run_program("check", "--json")
    assert outcome.returncode == 1
    assert json.loads(outcome.stdout)[0]["kind"] == "orphan"
    assert output_of("cleanup") == ""
    assert output_of("check") == ""
