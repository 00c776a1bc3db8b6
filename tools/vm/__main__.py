"""Test the service in a virtual machine: build package and box, make the machine, run tests.

`up` makes a machine and keeps it running, or updates the kept machine. `down` destroys the machine.
`test` and `powercut` use the kept machine if there is one, and leave it running. Otherwise they
make a machine and destroy it at the end, also after an error. Only the box stays for the next run.
"""

from __future__ import annotations

import argparse
import fcntl
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path

from tools.vm import machine, package, plan
from tools.vm.box import Box, fastest_driver, known_driver
from tools.vm.machine import NAME, Machine
from tools.vm.plan import Command, Situation
from tools.vm.release import suite
from tools.vm.steps import ROOT, StepError, Steps

LOCK = Path("/run") / f"{NAME}.lock"
POWERCUT = [
    f"{plan.TESTS}/test_powercut.py",
    f"{plan.TESTS}/test_failing_disk.py",
    # With the long tests: control runs, which show that the others would find losses.
    "-m",
    "",
    "--cuts=20",
]

ENVIRONMENT = """
environment:
  VM_DEBIAN  the release of Debian in the machine: 13 (default) or 12
  VM_DRIVER  kvm or qemu; by default kvm where it works, else qemu
  VM_CACHE   where the box and the durations of the steps stay for the next run; by default
             /var/cache/snapd-native-vm
  VM_LOGS    where logs are left; by default in /tmp, and only of a run that failed
"""


class Session:
    """One command. No other command runs at the same time."""

    def __init__(self, command: Command, tests: Sequence[str], steps: Steps) -> None:
        self._command = command
        self._tests = tests
        self._steps = steps
        self._machine = Machine(steps)
        self._missing = [] if command is Command.DOWN else machine.missing_packages()
        self._now = _situation(steps, self._missing)
        self._plan = plan.planned(command, self._now)

    def announce(self) -> None:
        """Print what the command will do."""
        if not self._plan:
            print("no machine is kept", flush=True)
            return
        of = plan.machine_of(self._command, self._now)
        print(f"make vm-{self._command.value}: {of}")
        for line in plan.lines(self._plan, self._tests, self._steps.durations.read()):
            print(line)
        print(flush=True)

    def execute(self) -> int:
        """Execute the command, and return its status."""
        with ExitStack() as undo:
            undo.callback(self._machine.hang_up)
            match self._command:
                case Command.DOWN:
                    if self._plan:
                        self._machine.destroy()
                    return 0
                case Command.UP:
                    self._bring_up(undo)
                    undo.pop_all()
                    self._machine.hang_up()
                    print("the machine stays: make vm-test uses it, make vm-down destroys it")
                    return 0
                case Command.TEST | Command.POWERCUT:
                    self._check_choice()
                    self._bring_up(undo)
                    status = self._run_tests()
                    if not self._now.kept:
                        self._machine.destroy()
                    return status

    def _bring_up(self, undo: ExitStack) -> None:
        """Provide a machine with the package; ``undo`` destroys a machine that was made here."""
        if self._now.kept:
            self._machine.answer()
        if "packages" in self._plan:
            self._install_packages()
        if "package" in self._plan:
            package.build(self._steps)
        box = _box(self._steps)
        if self._now.kept:
            self._machine.update(box)
            return
        image = box.image or box.build()
        undo.callback(self._machine.clean_up)
        self._machine.start_libvirt()
        self._machine.make(box, known_driver() or fastest_driver(self._steps, image))
        if self._command is Command.UP:
            self._machine.keep(box)

    def _install_packages(self) -> None:
        install = ["apt-get", "-qy", "-o", "DPkg::Lock::Timeout=120", "install"]
        self._steps.step(
            "packages",
            900,
            # An update can fail because of a package source that is not needed here.
            ["sh", "-c", "apt-get -qy update || true"],
            [*install, "--no-install-recommends", *self._missing],
        )

    def _check_choice(self) -> None:
        """Check that pytest finds the tests, before a machine is made for them.

        Raises:
            StepError: pytest finds no tests, or cannot read them.
        """
        if self._now.kept:
            return
        collect = ("-m", "pytest", "--collect-only", "-q", "--hosts=ssh://default")
        asked = subprocess.run(
            [sys.executable, *collect, *self._tests],
            cwd=ROOT,
            capture_output=True,
            text=True,
            check=False,
        )
        if asked.returncode != 0:
            raise StepError(
                f"pytest cannot run {' '.join(self._tests)}:\n{asked.stdout}{asked.stderr}"
            )

    def _run_tests(self) -> int:
        begin = time.monotonic()
        status = self._machine.test(self._tests)
        if status == 0:
            step = plan.key("tests", self._tests)
            self._steps.durations.record(step, time.monotonic() - begin)
        return status


def _box(steps: Steps) -> Box:
    deb = package.newest()
    if deb is None:
        raise StepError("there is no package in dist")
    return Box(steps, deb)


def _situation(steps: Steps, missing: Sequence[str]) -> Situation:
    current = package.is_current()
    return Situation(
        kept=machine.is_kept(),
        remains=machine.remains(),
        packages=not missing,
        package=current,
        box=current and _box(steps).image is not None,
        driver=known_driver() is not None,
    )


@contextmanager
def alone() -> Iterator[None]:
    """Wait until no other run is active, and let no other run begin in the block."""
    with LOCK.open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            print("another run is going on: waiting for its end", flush=True)
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


def leave(number: int, _frame: object) -> None:
    """End the program after a signal, and ignore more signals, so that the clean-up completes."""
    for each in (signal.SIGHUP, signal.SIGINT, signal.SIGTERM):
        signal.signal(each, signal.SIG_IGN)
    sys.exit(128 + number)


def arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m tools.vm",
        description=__doc__,
        epilog=ENVIRONMENT,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    test = commands.add_parser("test", help="run tests in the kept machine or in a new one")
    test.add_argument(
        "--only",
        help="the tests to run: paths such as tests/vm/test_calls.py or FILE::TEST if they exist,"
        " or else an expression of pytest's -k",
    )
    commands.add_parser("powercut", help="cut the power 20 times, and make disks fail")
    commands.add_parser("up", help="make a machine and keep it, or update the kept one")
    commands.add_parser("down", help="destroy the kept machine and everything of it")
    return parser.parse_args()


def main() -> int:
    """Run one command."""
    given = arguments()
    command = Command(given.command)
    only = given.only if command is Command.TEST else None
    tests = POWERCUT if command is Command.POWERCUT else plan.chosen(only, ROOT)
    if os.geteuid() != 0:
        print("a machine of the system's libvirt needs root: run it by sudo", file=sys.stderr)
        return 1
    for number in (signal.SIGHUP, signal.SIGINT, signal.SIGTERM):
        signal.signal(number, leave)
    logs_stay = os.environ.get("VM_LOGS")
    logs = Path(logs_stay or tempfile.mkdtemp(prefix=f"{NAME}."))
    logs.mkdir(parents=True, exist_ok=True)
    cache = Path(os.environ.get("VM_CACHE") or "/var/cache/snapd-native-vm")
    status = 1
    begin = time.monotonic()
    try:
        steps = Steps(logs, cache, suite())
        with alone():
            session = Session(command, tests, steps)
            session.announce()
            status = session.execute()
    except StepError as error:
        print(error, file=sys.stderr)
    finally:
        print(f"in all {time.monotonic() - begin:.0f} s")
        if status == 0 and not logs_stay:
            shutil.rmtree(logs)
        else:
            print(f"logs: {logs}")
    return status


if __name__ == "__main__":
    sys.exit(main())
