"""The command line, as a person or a script uses it: real processes, real output."""

from __future__ import annotations

import json
import os
import pty
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from snapd_native import __version__, errors
from snapd_native.cli import render
from snapd_native.cli.exits import STATUSES
from snapd_native.cli.main import cli
from snapd_native.model import Usage
from snapd_native.private import private_bus, private_daemon

Program = Callable[..., "subprocess.CompletedProcess[str]"]


@pytest.fixture(scope="module")
def address() -> Iterator[str]:
    with private_bus() as address:
        yield address


@pytest.fixture
def program(address: str, tmp_path: Path) -> Iterator[Program]:
    """Yield the program, with a service of its own."""

    def run(*arguments: str | bytes, **options: object) -> subprocess.CompletedProcess[str]:
        return subprocess.run(  # type: ignore[call-overload, no-any-return]
            [sys.executable, "-m", "snapd_native", *arguments],
            env={**os.environ, "DBUS_SYSTEM_BUS_ADDRESS": address},
            capture_output=True,
            text=True,
            check=False,
            **options,
        )

    with private_daemon(address, tmp_path / "state"):
        yield run


def out(outcome: subprocess.CompletedProcess[str]) -> str:
    assert outcome.returncode == 0, outcome.stderr
    assert outcome.stderr == ""
    return outcome.stdout


def fails(outcome: subprocess.CompletedProcess[str], kind: type[errors.SnapdError]) -> str:
    assert outcome.returncode == STATUSES[kind]
    assert outcome.stdout == ""
    (line,) = outcome.stderr.splitlines()
    assert line.startswith("snapd-native: ")
    return line


def test_a_life(program: Program) -> None:
    type_, source, options = out(program("prepare", "build", "-l", "a=1")).rstrip("\n").split("\t")
    assert (type_, options) == ("bind", "rbind,rw")
    assert Path(source).is_dir()
    assert out(program("mounts", "build")).split("\t")[1] == source
    assert out(program("commit", "v1", "build", "-l", "b=2")) == ""
    assert out(program("view", "look", "v1")).rstrip("\n").endswith("rbind,ro")
    listed = out(program("ls")).splitlines()
    assert [line.split()[:3] for line in listed] == [
        ["NAME", "KIND", "PARENT"],
        ["look", "view", "v1"],
        ["v1", "committed", "-"],
    ]
    drawn = out(program("tree")).splitlines()
    assert drawn[0].startswith("v1 ")
    assert drawn[1].startswith("└── look ")
    assert out(program("rm", "look", "v1")) == ""
    assert out(program("cleanup")) == ""
    assert out(program("tree")) == ""
    assert not Path(source).exists()


def test_json(program: Program) -> None:
    out(program("prepare", "ü \n", "--label", "a=b=c"))
    out(program("commit", "v1", "ü \n", "-l", "k=v"))
    out(program("view", "look", "v1"))
    info = json.loads(out(program("stat", "--json", "v1")))
    assert info | {"created": "", "updated": ""} == {
        "name": "v1",
        "kind": "committed",
        "parent": "",
        "created": "",
        "updated": "",
        "labels": {"k": "v"},
    }
    assert info["created"].endswith("Z")
    assert json.loads(out(program("ls", "--json", "kind==committed"))) == [info]
    (root,) = json.loads(out(program("tree", "--json")))
    assert [child["name"] for child in root["children"]] == ["look"]
    (usage,) = json.loads(out(program("usage", "--json", "v1")))
    assert usage["key"] == "v1"
    assert usage["inodes"] == 1
    mount = json.loads(out(program("mounts", "--json", "look")))
    assert mount["options"] == ["rbind", "ro"]
    created = json.loads(out(program("prepare", "--json", "new")))
    assert set(created) == {"type", "source", "options"}


def test_labels(program: Program) -> None:
    out(program("prepare", "k", "-l", "a=1", "-l", "b=2"))
    assert json.loads(out(program("label", "--json", "k", "c=3", "a-")))["labels"] == {
        "b": "2",
        "c": "3",
    }
    assert json.loads(out(program("label", "--json", "k", "d-=4")))["labels"]["d-"] == "4"
    replaced = out(program("label", "--json", "k", "--replace", "z=9"))
    assert json.loads(replaced)["labels"] == {"z": "9"}
    assert json.loads(out(program("label", "--json", "k", "--replace")))["labels"] == {}


def test_rebase(program: Program) -> None:
    out(program("prepare", "a"))
    out(program("commit", "base", "a"))
    out(program("prepare", "b"))
    out(program("commit", "top", "b", "--parent", "base"))
    assert json.loads(out(program("stat", "--json", "top")))["parent"] == "base"


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
def test_errors(
    program: Program, arguments: list[str | bytes], kind: type[errors.SnapdError]
) -> None:
    for command in (
        ("prepare", "x"),
        ("commit", "base", "x"),
        ("view", "view", "base"),
        ("prepare", "active"),
    ):
        out(program(*command))
    before = out(program("ls", "--json"))
    fails(program(*arguments), kind)
    assert out(program("ls", "--json")) == before


@pytest.mark.parametrize(
    "arguments",
    [["nothing"], ["stat"], ["stat", "a", "b"], ["ls", "--limit"], ["label", "k"], ["-x"], ["rm"]],
)
def test_wrong_usage_is_one_line(program: Program, arguments: list[str]) -> None:
    outcome = program(*arguments)
    assert outcome.returncode == 2
    (line,) = outcome.stderr.splitlines()
    assert line.startswith("snapd-native: ")
    assert line.endswith("--help.")


def test_without_a_service(address: str) -> None:
    command = [sys.executable, "-m", "snapd_native", "ls"]
    for place in (address, "unix:path=/nonexistent", "nonsense"):
        outcome = subprocess.run(
            command,
            env={**os.environ, "DBUS_SYSTEM_BUS_ADDRESS": place},
            capture_output=True,
            text=True,
            check=False,
        )
        fails(outcome, errors.Unavailable)


def test_not_root(program: Program) -> None:
    for arguments in (["ls"], ["prepare", "k"], ["daemon"], ["demo"]):
        fails(program(*arguments, user=65534, group=65534), errors.AccessDenied)


def test_a_reader_that_has_seen_enough(program: Program, address: str) -> None:
    out(program("prepare", "k"))
    script = f"{sys.executable} -m snapd_native ls | true; exit ${{PIPESTATUS[0]}}"
    outcome = subprocess.run(
        ["bash", "-c", script],
        env={**os.environ, "DBUS_SYSTEM_BUS_ADDRESS": address},
        capture_output=True,
        text=True,
        check=False,
    )
    assert outcome.stderr == ""


def test_names_cannot_write_to_a_terminal(program: Program) -> None:
    out(program("prepare", "\x1b[31mred", "-l", "k=\x1b]0;title\x07"))
    for command in (["ls"], ["tree"], ["stat", "\x1b[31mred"], ["usage", "\x1b[31mred"]):
        text = out(program(*command))
        assert "\x1b" not in text
        assert "\\x1b[31mred" in text


def test_help_names_every_command() -> None:
    outcome = subprocess.run(
        [sys.executable, "-m", "snapd_native", "--help"], capture_output=True, text=True, check=True
    )
    assert all(f"  {name} " in outcome.stdout for name in cli.commands)
    version = subprocess.run(
        [sys.executable, "-m", "snapd_native", "--version"],
        capture_output=True,
        text=True,
        check=True,
    )
    assert __version__ in version.stdout


def test_help_loads_nothing_that_it_does_not_need() -> None:
    """What keeps help quick is what is not imported for it."""
    script = (
        "import sys; from snapd_native.cli.main import cli;"
        "print(*(m for m in ('dbus_next', 'rich', 'sqlite3', 'asyncio', 'regex')"
        " if m in sys.modules))"
    )
    outcome = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True
    )
    assert outcome.stdout.split() == []


def test_statuses_are_distinct() -> None:
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
def test_sizes(count: int, text: str) -> None:
    assert render.size(count) == text


def test_a_terminal_folds_but_cuts_nothing() -> None:
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
        # EIO is how a terminal says that nobody writes any more.
        with suppress(OSError):
            while chunk := os.read(master, 4096):
                shown += chunk
    os.close(master)
    assert process.returncode == 0
    assert shown.count(b"n") >= 300
    assert shown.count(b"v") >= 100
    assert max(len(line) for line in shown.decode().splitlines()) < 200


def test_usage_is_aligned(capsys: pytest.CaptureFixture[str]) -> None:
    render.usage([("a", Usage(1, 1)), ("bb", Usage(1 << 30, 1_234_567))], as_json=False)
    heading, first, second = capsys.readouterr().out.splitlines()
    assert len(heading) == len(first) == len(second)
    assert second.endswith("1.0 GiB  1,234,567")


def test_check_says_what_is_wrong(program: Program, tmp_path: Path) -> None:
    assert out(program("check")) == ""
    assert json.loads(out(program("check", "--json"))) == []
    (tmp_path / "state" / "snapshots" / "17").mkdir()
    outcome = program("check")
    assert outcome.returncode == 1
    assert outcome.stdout == "orphan\t\t17 is no snapshot's: call Cleanup\n"
    outcome = program("check", "--json")
    assert outcome.returncode == 1
    assert json.loads(outcome.stdout)[0]["kind"] == "orphan"
    assert out(program("cleanup")) == ""
    assert out(program("check")) == ""
