"""The plan of the virtual machine's commands: steps, tests and last durations."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.support import PROJECT
from tools.vm.plan import STEPS, Command, Durations, Situation, chosen, key, lines, planned

NOTHING = Situation(packages=False, package=False, box=False, driver=False)


@pytest.fixture
def durations(tmp_path: Path) -> Durations:
    return Durations(tmp_path / "cache" / "durations.json")


def test_on_a_fresh_host_each_step_is_planned_in_order() -> None:
    before = ["packages", "package", "box", "libvirt", "kvm", "up", "ssh"]
    assert planned(Command.TEST, NOTHING) == [*before, "tests", "destroy"]
    assert planned(Command.UP, NOTHING) == before


def test_steps_whose_result_exists_are_not_planned() -> None:
    assert planned(Command.UP, Situation()) == ["libvirt", "up", "ssh"]


@pytest.mark.parametrize("command", [Command.TEST, Command.POWERCUT])
def test_a_kept_machine_is_neither_made_nor_destroyed(command: Command) -> None:
    assert planned(command, Situation(kept=True)) == ["answer", "update", "tests"]


def test_a_changed_source_is_built_and_installed_in_a_kept_machine() -> None:
    now = Situation(kept=True, package=False, box=False)
    assert planned(Command.UP, now) == ["answer", "package", "update"]


@pytest.mark.parametrize("kept", [True, False])
def test_down_plans_destroy_only_if_there_is_a_machine(kept: bool) -> None:
    assert planned(Command.DOWN, Situation(kept=kept, remains=True)) == ["destroy"]
    assert planned(Command.DOWN, Situation()) == []


@pytest.mark.parametrize(
    "paths",
    [
        "tests/vm/test_calls.py",
        "tests/vm/test_life.py::test_a_restart_keeps_mounts",
        "tests/vm/test_access.py tests/vm/test_life.py",
    ],
)
def test_paths_that_exist_are_given_to_pytest(paths: str) -> None:
    assert chosen(paths, PROJECT) == paths.split()


@pytest.mark.parametrize("expression", ["watchdog", "access or boot", "tests/vm/no_such_test.py"])
def test_other_text_is_given_to_pytest_as_an_expression(expression: str) -> None:
    assert chosen(expression, PROJECT) == ["tests/vm", "-k", expression]


@pytest.mark.parametrize("only", [None, ""])
def test_without_a_choice_all_tests_run(only: str | None) -> None:
    assert chosen(only, PROJECT) == ["tests/vm"]


def test_the_last_duration_of_a_step_is_kept(durations: Durations) -> None:
    for seconds in (3.0, 2.04):
        durations.record("up", seconds)
    durations.record("ssh", 1)
    assert durations.read() == {"up": 2.0, "ssh": 1}


@pytest.mark.parametrize(
    "damaged", [b"", b"{", b"[]", b"\xff", b'{"up": "long"}', b'{"up": null}', b'{"up": true}']
)
def test_a_damaged_file_of_durations_is_read_as_empty(tmp_path: Path, damaged: bytes) -> None:
    path = tmp_path / "durations.json"
    path.write_bytes(damaged)
    durations = Durations(path)
    assert durations.read() == {}
    durations.record("up", 1)
    assert durations.read() == {"up": 1}


def test_an_unreadable_file_of_durations_is_read_as_empty(tmp_path: Path) -> None:
    assert Durations(tmp_path).read() == {}
    assert Durations(tmp_path / "absent.json").read() == {}


def test_each_choice_of_tests_has_its_own_duration(durations: Durations) -> None:
    durations.record(key("tests", ["tests/vm/test_calls.py"]), 20)
    durations.record(key("destroy", []), 4)
    steps = ["tests", "destroy"]
    (whole, destroy) = lines(steps, ["tests/vm"], durations.read())
    assert whole.endswith(" not run yet")
    assert destroy.endswith(" 4.0 s last time")
    (calls, _) = lines(steps, ["tests/vm/test_calls.py"], durations.read())
    assert calls.endswith(" 20.0 s last time")


def test_the_plan_has_a_line_for_each_step() -> None:
    assert len(list(lines(list(STEPS), [], {}))) == len(STEPS)
