"""The documents: every command they show is run, every table they print is true."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from snapd_native.bus.introspection import contract, shapes
from snapd_native.cli.exits import STATUSES
from snapd_native.cli.main import cli
from snapd_native.private import private_bus, private_daemon
from snapd_native.wire.names import JOB, MANAGER

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", README, re.MULTILINE | re.DOTALL)


@pytest.fixture
def environment(tmp_path: Path) -> Iterator[dict[str, str]]:
    """Yield the environment of a person on a machine where the service runs."""
    with private_bus() as address, private_daemon(address, tmp_path / "state"):
        yield {
            **os.environ,
            "DBUS_SYSTEM_BUS_ADDRESS": address,
            "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        }


def run(script: str, environment: dict[str, str]) -> str:
    outcome = subprocess.run(
        ["bash", "-eu", "-c", script],
        env=environment,
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert outcome.returncode == 0, outcome.stderr
    assert outcome.stderr == ""
    return outcome.stdout


def test_each_shell_block_is_known() -> None:
    demo, daemon, commands, mounting, calls = blocks("sh")
    assert demo == "make demo\n"
    assert daemon.startswith("snapd-native daemon ")
    assert commands.startswith("snapd-native prepare ")
    assert mounting.startswith("snapd-native prepare ")
    assert calls.startswith("busctl ")


def test_the_program_s_commands(environment: dict[str, str]) -> None:
    out = run(blocks("sh")[2], environment)
    assert re.search(r"^v2 +committed +v1 ", out, re.MULTILINE)
    assert '"app": "web"' in out
    assert run("snapd-native ls", environment).splitlines()[1:] == []


def test_the_commands_about_mounts(environment: dict[str, str]) -> None:
    out = run(blocks("sh")[3], environment)
    assert re.search(r"^/mnt +site +rw +persistent +0$", out, re.MULTILINE)
    assert re.search(r"^mount -o rbind,rw /.*/snapshots/\d+ /mnt$", out, re.MULTILINE)
    assert run("snapd-native mounts", environment).splitlines()[1:] == []


def test_busctl_s_commands(environment: dict[str, str]) -> None:
    out = run(blocks("sh")[4], environment)
    assert 'a(ssstta{ss}) 1 "look" "view" "v1"' in out
    assert 'a(ssbsu) 1 "/mnt" "look" true "persistent" 0' in out


def test_the_daemon_s_command(tmp_path: Path) -> None:
    """It gets as far as there is a bus; the private daemon of all tests is started alike."""
    (line,) = blocks("sh")[1].splitlines()
    command = line.split()
    assert command[:3] == ["snapd-native", "daemon", "--state-directory"]
    outcome = subprocess.run(
        [sys.executable, "-m", "snapd_native", *command[1:3], str(tmp_path / "state")],
        env={**os.environ, "DBUS_SYSTEM_BUS_ADDRESS": f"unix:path={tmp_path}/none"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert outcome.returncode == 1
    assert "system bus" in outcome.stderr


def test_the_python_program(environment: dict[str, str]) -> None:
    (program,) = blocks("python")
    outcome = subprocess.run(
        [sys.executable, "-c", program],
        env=environment,
        capture_output=True,
        text=True,
        check=True,
    )
    assert "name='v1'" in outcome.stdout


def test_the_demonstration(tmp_path: Path) -> None:
    tree = tmp_path / "tree"
    tree.mkdir()
    (tree / "file").write_text("content")
    outcome = subprocess.run(
        [
            *(sys.executable, "-m", "snapd_native", "demo"),
            *("--tree", str(tree), "--directory", str(tmp_path)),
        ],
        capture_output=True,
        text=True,
        check=True,
    )
    assert "everything is cleaned up" in outcome.stdout
    assert "ended with status 0" in outcome.stdout
    assert sorted(tmp_path.iterdir()) == [tree]


def test_make_demo_is_the_demonstration() -> None:
    outcome = subprocess.run(
        ["make", "--dry-run", "--no-print-directory", "demo"],
        env={name: value for name, value in os.environ.items() if "MAKE" not in name},
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    assert outcome.stdout.rstrip().endswith("snapd-native demo")


def test_the_reference_names_every_member() -> None:
    text = (ROOT / "docs" / "dbus.md").read_text()
    shape, job = (shapes(contract())[name] for name in (MANAGER, JOB))
    methods = set(re.findall(r"^\| ([A-Z]\w+) \| \w", text, re.MULTILINE))
    assert set(shape.methods) <= methods
    assert all(f"`{name}" in text for name in [*shape.signals, *shape.properties])
    assert all(f"`{name}" in text for name in [*job.methods, *job.properties])
    assert all(kind.__name__ in text for kind in STATUSES)


def test_the_reference_names_every_command_and_exit_status() -> None:
    text = (ROOT / "docs" / "command-line.md").read_text()
    assert set(re.findall(r"^\| `(\w+)", text, re.MULTILINE)) == set(cli.commands)
    statuses = dict(re.findall(r"^\| (\d+) \| (\w+)", text, re.MULTILINE))
    assert {str(status): kind.__name__ for kind, status in STATUSES.items()}.items() <= set(
        statuses.items()
    )


@pytest.mark.parametrize(
    "document", ["README.md", *(f"docs/{p.name}" for p in (ROOT / "docs").glob("*.md"))]
)
def test_links_lead_somewhere(document: str) -> None:
    path = ROOT / document
    for target in re.findall(r"\]\(([^)#]+)\)", path.read_text()):
        if "://" not in target:
            assert (path.parent / target).exists(), target
