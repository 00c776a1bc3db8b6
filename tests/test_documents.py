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


HERE = {
    "demo": "make demo\n",
    "commands": "snapd-native prepare build\n",
    "mounting": "snapd-native prepare site\n",
    "calls": "busctl introspect ",
    "in C": "gdbus-codegen ",
    "full disk": "df ",
}
"""What is run by this module: how the README's blocks begin."""

ON_A_MACHINE = {
    "install": "make deb\n",
    "instance": "systemctl enable --now snapd-native@data\n",
    "check": "snapd-native check\n",
    "backup": "systemctl stop snapd-native\ntar --create ",
    "restore": "systemctl stop snapd-native\nmv ",
    "move": "systemctl stop snapd-native\ncp ",
    "rule": "groupadd ",
    "exposure": "systemd-analyze security ",
}
"""What needs systemd, and is run in the virtual machine."""


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", README, re.MULTILINE | re.DOTALL)


def block(name: str) -> str:
    """Return the commands that the README shows under one of the names above."""
    beginning = (HERE | ON_A_MACHINE)[name]
    (found,) = (block for block in blocks("sh") if block.startswith(beginning))
    return found


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
    assert {block(name) for name in HERE | ON_A_MACHINE} == set(blocks("sh"))


def test_the_program_s_commands(environment: dict[str, str]) -> None:
    out = run(block("commands"), environment)
    assert re.search(r"^v2 +committed +v1 ", out, re.MULTILINE)
    assert '"app": "web"' in out
    assert run("snapd-native ls", environment).splitlines()[1:] == []


def test_the_commands_about_mounts(environment: dict[str, str]) -> None:
    out = run(block("mounting"), environment)
    assert re.search(r"^/mnt +site +rw +persistent +0$", out, re.MULTILINE)
    assert re.search(r"^mount -o rbind,rw /.*/snapshots/\d+ /mnt$", out, re.MULTILINE)
    assert run("snapd-native mounts", environment).splitlines()[1:] == []


def test_busctl_s_commands(environment: dict[str, str]) -> None:
    out = run(block("calls"), environment)
    assert 'a(ssstta{ss}) 1 "look" "view" "v1"' in out
    assert 'a(ssbsu) 1 "/mnt" "look" true "persistent" 0' in out


def test_the_commands_for_a_full_disk(environment: dict[str, str]) -> None:
    filled = """
        snapd-native prepare build; snapd-native commit v1 build
        snapd-native prepare work v1; snapd-native commit -l snapd-native.standby=1 v2 work
    """
    # The state of this test is elsewhere.
    commands = block("full disk").replace("/var/lib/snapd-native", "/var/lib")
    out = run(filled + commands, environment)
    assert "Filesystem" in out
    assert "v1" in run("snapd-native ls", environment)
    assert "v2" not in run("snapd-native ls", environment)


def test_the_program_in_c(environment: dict[str, str], tmp_path: Path) -> None:
    (program,) = blocks("c")
    (tmp_path / "build.c").write_text(program)
    installed, xml = "/usr/share/dbus-1/interfaces/", ROOT / "dbus" / "org.snapdnative1.xml"
    commands = block("in C").replace(f"{installed}{xml.name}", str(xml))
    out = run(f"cd {tmp_path}\n{commands}", environment)
    assert out == run("snapd-native mounts build | cut -f 2", environment)


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
