"""The documents: their commands work, and their tables are complete."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tomllib
import xml.etree.ElementTree as ET
from collections.abc import Iterable, Iterator
from pathlib import Path

import pytest

from snapd_native.bus.introspection import contract, interfaces
from snapd_native.cli.exits import STATUSES
from snapd_native.cli.main import cli
from snapd_native.cli.processes import containerd
from snapd_native.private import private_bus, private_daemon
from snapd_native.wire.names import JOB, MANAGER
from tests.support import PROJECT
from tests.support.commands import run_command
from tests.support.readme import IN_MACHINE_TESTS, IN_PACKAGING_TESTS, code_blocks, shell_block


@pytest.fixture
def environment(host_state: Path) -> Iterator[dict[str, str]]:
    """Yield the environment of a user on a machine where the service runs."""
    with private_bus() as address, private_daemon(address, host_state):
        yield {
            **os.environ,
            "DBUS_SYSTEM_BUS_ADDRESS": address,
            "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        }


def run(script: str, environment: dict[str, str]) -> str:
    outcome = subprocess.run(
        ["bash", "-eu", "-c", script],
        env=environment,
        cwd=PROJECT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert outcome.returncode == 0, outcome.stderr
    assert outcome.stderr == ""
    return outcome.stdout


def test_every_shell_block_of_the_documents_belongs_to_a_test() -> None:
    assert {shell_block(name) for name in IN_PACKAGING_TESTS | IN_MACHINE_TESTS} == set(
        code_blocks("sh")
    )


def test_the_documented_snapshot_commands_work(environment: dict[str, str]) -> None:
    out = run(shell_block("commands"), environment)
    assert re.search(r"^v2 +committed +v1 ", out, re.MULTILINE)
    assert '"app": "web"' in out
    assert run("snapd-native ls", environment).splitlines()[1:] == []


@pytest.mark.alone  # The README mounts on /mnt.
def test_the_documented_mount_commands_work(environment: dict[str, str]) -> None:
    out = run(shell_block("mounting"), environment)
    assert re.search(r"^/mnt +site +rw +persistent +0$", out, re.MULTILINE)
    assert re.search(r"^mount -o rbind,rw /.*/snapshots/\d+ /mnt$", out, re.MULTILINE)
    assert run("snapd-native mounts", environment).splitlines()[1:] == []


@pytest.mark.alone  # The README mounts on /mnt.
def test_the_documented_busctl_commands_work(environment: dict[str, str]) -> None:
    out = run(shell_block("calls"), environment)
    assert 'a(ssstta{ss}) 1 "look" "view" "v1"' in out
    assert 'a(ssbsu) 1 "/mnt" "look" true "persistent" 0' in out


def test_the_documented_commands_for_a_full_disk_work(environment: dict[str, str]) -> None:
    filled = """
        snapd-native prepare build; snapd-native commit v1 build
        snapd-native prepare work v1; snapd-native commit -l snapd-native.standby=1 v2 work
    """
    # The state directory of this test has another path.
    commands = shell_block("full disk").replace("/var/lib/snapd-native", "/var/lib")
    out = run(filled + commands, environment)
    assert "Filesystem" in out
    assert "v1" in run("snapd-native ls", environment)
    assert "v2" not in run("snapd-native ls", environment)


def test_the_documented_c_program_works(environment: dict[str, str], tmp_path: Path) -> None:
    (program,) = code_blocks("c")
    (tmp_path / "build.c").write_text(program)
    installed, xml = "/usr/share/dbus-1/interfaces/", PROJECT / "dbus" / "org.snapdnative1.xml"
    commands = shell_block("in C").replace(f"{installed}{xml.name}", str(xml))
    out = run(f"cd {tmp_path}\n{commands}", environment)
    assert out == run("snapd-native mounts build | cut -f 2", environment)


def test_the_documented_python_program_works(environment: dict[str, str]) -> None:
    (program,) = code_blocks("python")
    outcome = subprocess.run(
        [sys.executable, "-c", program],
        env=environment,
        capture_output=True,
        text=True,
        check=True,
    )
    assert "name='v1'" in outcome.stdout


@pytest.mark.parametrize("version", [2, 3])
def test_the_documented_configurations_of_containerd_name_the_socket(version: int) -> None:
    (socket,) = (option for option in containerd.params if option.name == "socket")
    (configuration,) = (
        parsed for parsed in map(tomllib.loads, code_blocks("toml")) if parsed["version"] == version
    )
    assert configuration["proxy_plugins"]["snapd-native"] == {
        "type": "snapshot",
        "address": str(socket.default),
        "exports": {"root": "/var/lib/snapd-native"},
    }


def test_containerd_reads_the_documented_configuration(tmp_path: Path) -> None:
    """Debian 12 and 13 have the versions that read the first one."""
    (configuration,) = (block for block in code_blocks("toml") if block.startswith("version = 2\n"))
    path = tmp_path / "config.toml"
    path.write_text(configuration)
    dumped = tomllib.loads(run_command("containerd", "--config", path, "config", "dump"))
    assert dumped["proxy_plugins"]["snapd-native"]["type"] == "snapshot"
    images = dumped["plugins"]["io.containerd.grpc.v1.cri"]["containerd"]
    assert images["snapshotter"] == "snapd-native"


def test_the_demo_command_works_and_leaves_no_files(tmp_path: Path) -> None:
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
    drawn = ET.parse(PROJECT / "docs" / "session.svg").getroot().itertext()  # noqa: S314 - our own
    assert _steps(drawn) == _steps(outcome.stdout.splitlines())


def _steps(lines: Iterable[str]) -> list[str]:
    """Return the first words of the lines that show a step of the demonstration."""
    return [line.split()[0] for line in lines if line.endswith(" ms")]


def test_make_demo_runs_the_demo_command() -> None:
    outcome = subprocess.run(
        ["make", "--dry-run", "--no-print-directory", "demo"],
        env={name: value for name, value in os.environ.items() if "MAKE" not in name},
        cwd=PROJECT,
        capture_output=True,
        text=True,
        check=True,
    )
    assert outcome.stdout.rstrip().endswith("snapd-native demo")


def test_the_reference_names_every_member() -> None:
    text = (PROJECT / "docs" / "dbus.md").read_text()
    shape, job = (interfaces(contract())[name] for name in (MANAGER, JOB))
    methods = set(re.findall(r"^\| ([A-Z]\w+) \| \w", text, re.MULTILINE))
    assert set(shape.methods) <= methods
    assert all(f"`{name}" in text for name in [*shape.signals, *shape.properties])
    assert all(f"`{name}" in text for name in [*job.methods, *job.properties])
    assert all(kind.__name__ in text for kind in STATUSES)


def test_the_reference_names_every_command_and_exit_status() -> None:
    text = (PROJECT / "docs" / "command-line.md").read_text()
    assert set(re.findall(r"^\| `(\w+)", text, re.MULTILINE)) == set(cli.commands)
    statuses = dict(re.findall(r"^\| (\d+) \| (\w+)", text, re.MULTILINE))
    assert {str(status): kind.__name__ for kind, status in STATUSES.items()}.items() <= set(
        statuses.items()
    )


@pytest.mark.parametrize(
    "document",
    [
        str(path.relative_to(PROJECT))
        for path in [*PROJECT.glob("*.md"), *PROJECT.glob("docs/*.md")]
    ],
)
def test_links_between_documents_have_a_target(document: str) -> None:
    path = PROJECT / document
    for target in re.findall(r"\]\(([^)#]+)\)", path.read_text()):
        if "://" not in target:
            assert (path.parent / target).exists(), target
