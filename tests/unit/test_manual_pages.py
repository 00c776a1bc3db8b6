"""The manual pages: they are well-formed, and document exactly the existing interfaces."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import click
import pytest

from snapd_native.bus.authority import Action
from snapd_native.bus.introspection import contract, interfaces
from snapd_native.cli.exits import STATUSES
from snapd_native.cli.main import cli
from snapd_native.model import Trouble
from snapd_native.wire.names import JOB, MANAGER
from tests.support import PROJECT
from tests.support.markers import needs_program

PAGES = sorted((PROJECT / "man").iterdir())
PROGRAM, SERVICE, INTERFACE = (
    (PROJECT / "man" / name).read_text()
    for name in ("snapd-native.1", "snapd-native.service.8", "org.snapdnative1.5")
)
COMMANDS = {
    name: [option for option in command.params if isinstance(option, click.Option)]
    for name, command in cli.commands.items()
}


def long_options(options: list[click.Option]) -> set[str]:
    return {name for option in options for name in option.opts if name.startswith("--")}


def section(command: str) -> str:
    """Return the description of a command in the page, up to the next command."""
    parts = re.split(r"^\.It Ic (?=\w)", PROGRAM, flags=re.MULTILINE)
    found = [part for part in parts if part.split(maxsplit=1)[0] == command]
    return "".join(re.split(r"^\.Sh ", part, flags=re.MULTILINE)[0] for part in found)


def flags(text: str) -> set[str]:
    """Return the long options in a text; roff has them as ``Fl -json``."""
    return {f"-{name}" for name in re.findall(r"\bFl (-[a-z-]+)", text)}


@pytest.mark.parametrize("page", PAGES, ids=lambda path: path.name)
@needs_program("mandoc")
def test_each_manual_page_passes_mandoc_lint(page: Path) -> None:
    command = ["mandoc", "-T", "lint", "-W", "warning", str(page)]
    outcome = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (outcome.stdout, outcome.returncode) == ("", 0)


def test_the_package_installs_all_manual_pages() -> None:
    script = (PROJECT / "tools" / "install").read_text()
    installed = re.findall(r" man/(\S+)$", script, re.MULTILINE)
    assert sorted(installed) == [page.name for page in PAGES]


@pytest.mark.parametrize("command", COMMANDS)
def test_the_manual_documents_the_options_of_each_command(command: str) -> None:
    assert flags(section(command)) - {"--help"} == long_options(COMMANDS[command])


def test_the_manual_documents_exactly_the_commands() -> None:
    assert set(re.findall(r"^\.It Ic (\w+)", PROGRAM, re.MULTILINE)) == set(COMMANDS)


def test_the_manual_documents_the_global_options() -> None:
    described = PROGRAM[: PROGRAM.index(".Ss Making")]
    own = [option for option in cli.params if isinstance(option, click.Option)]
    assert flags(described) - {"--help", "--json"} == long_options(own)


def test_the_manual_documents_each_exit_status() -> None:
    for kind, status in STATUSES.items():
        of = "Internal error" if status == 1 else kind.__name__
        assert re.search(rf"^\.It {status}\n{of}", PROGRAM, re.MULTILINE)


def test_the_manual_documents_the_whole_interface() -> None:
    shape, job = (interfaces(contract())[name] for name in (MANAGER, JOB))
    named = set(re.findall(r"^\.It Fn (\w+)", INTERFACE, re.MULTILINE))
    assert named == {*shape.methods, *shape.signals, *job.methods}
    for properties in (shape.properties, job.properties):
        assert all(re.search(rf"^\.It Va .*\b{name}\b", INTERFACE, re.M) for name in properties)
    errors = set(re.findall(r"^\.It Li ([A-Z]\w+)$", INTERFACE, re.MULTILINE))
    theirs = {"AccessDenied", "InteractiveAuthorizationRequired"}
    assert errors == {kind.__name__ for kind in STATUSES} - theirs
    assert all(f"Error.{name}" in INTERFACE for name in theirs)
    assert all(f".It Li {action.value}\n" in INTERFACE for action in Action)
    assert all(kind.value in INTERFACE for kind in Trouble)


def test_the_manual_names_the_arguments_as_the_contract_does() -> None:
    for name, arguments in interfaces(contract())[MANAGER].arguments.items():
        (line,) = re.findall(rf"^\.It Fn {name}\b(.*)", INTERFACE, re.MULTILINE)
        assert [text.split()[-1] for text in re.findall('"([^"]+)"', line)] == [*arguments]


def test_the_manual_documents_the_journal_fields_that_are_written() -> None:
    shape = interfaces(contract())[MANAGER]
    arguments: set[str] = set()
    for method, names in shape.arguments.items():
        takes = shape.methods[method][0]
        # The text arguments at the beginning of the call.
        arguments.update(names[: len(takes) - len(takes.lstrip("s"))])
    code = (PROJECT / "snapd_native" / "bus" / "log.py").read_text()
    written = set(re.findall(r'\("(\w+)", ', code)) | arguments | {"job"}
    named = set(re.findall(r"SNAPD_NATIVE_([A-Z_]+)", SERVICE))
    assert named == {name.upper() for name in written}


def test_the_manual_pages_refer_to_each_other() -> None:
    for page in PAGES:
        name, number = page.stem, page.suffix[1:]
        for other in PAGES:
            if other != page:
                assert f".Xr {name} {number}" in other.read_text()
