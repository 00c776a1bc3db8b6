"""Steps that run programs, with their logs, durations and time limits."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

from tools.vm.plan import Durations

ROOT = Path(__file__).resolve().parents[2]


class StepError(Exception):
    """A step failed; the message says why."""


class Steps:
    """Runs the steps of one command, in one environment."""

    def __init__(self, logs: Path, cache: Path, suite: str) -> None:
        """Keep the durations of each release in a file of its own."""
        self.logs = logs
        self.cache = cache
        self.durations = Durations(cache / f"durations-{suite}.json")
        self.environment = {
            **{name: value for name, value in os.environ.items() if "MAKE" not in name},
            "DEBIAN_FRONTEND": "noninteractive",
            "LC_ALL": "C.UTF-8",
            "LIBVIRT_DEFAULT_URI": "qemu:///system",
            "PATH": f"{os.environ['PATH']}:/usr/sbin:/sbin",
            "VAGRANT_CHECKPOINT_DISABLE": "1",
            "VAGRANT_HOME": str(cache / "vagrant"),
        }

    def step(self, name: str, limit: float, *commands: Sequence[str | Path]) -> None:
        """Run programs one after the other; their output goes into a log.

        Raises:
            StepError: one of them failed or took longer than ``limit`` seconds.
        """
        with self.timed(name):
            for command in commands:
                self.run(name, limit, command)

    def run(self, step: str, limit: float, command: Sequence[str | Path]) -> None:
        """Run one program of a step that `timed` measures, as `step` does."""
        log = self.logs / f"{step}.log"
        status = run(command, self.environment, log, limit)
        if status != 0:
            raise StepError(f"{command[0]}: status {status}\n{tail(log)}")

    def quietly(self, *command: str | Path, limit: float = 120) -> bool:
        """Run a program that may fail, and return whether it succeeded."""
        return run(command, self.environment, self.logs / "quiet.log", limit) == 0

    def output(self, *command: str | Path) -> str:
        """Run a program that must succeed, and return its output."""
        return subprocess.run(
            command,
            cwd=ROOT,
            env=self.environment,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            check=True,
        ).stdout

    @contextmanager
    def timed(self, name: str) -> Iterator[None]:
        """Print how long a step takes, and record it if the step succeeds."""
        print(f"{name:<10}", end=" ", flush=True)
        begin = time.monotonic()
        try:
            yield
        except BaseException:
            print(f"FAILED after {time.monotonic() - begin:.0f} s", flush=True)
            raise
        seconds = time.monotonic() - begin
        print(f"{seconds:6.1f} s", flush=True)
        self.durations.record(name, seconds)


def run(command: Sequence[str | Path], environment: dict[str, str], log: Path, limit: float) -> int:
    """Run a program, and return its status; 124 if it takes longer than ``limit`` seconds.

    At the end, also if this process is ended, the program and its children are ended.
    """
    with (
        log.open("ab") as out,
        subprocess.Popen(
            command,
            cwd=ROOT,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=out,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        ) as process,
    ):
        try:
            return process.wait(limit)
        except subprocess.TimeoutExpired:
            out.write(f"given up after {limit:.0f} s\n".encode())
            return 124
        finally:
            end_group(process)


def end_group(process: subprocess.Popen[bytes]) -> None:
    """End a process and its group: by SIGTERM, and after 5 seconds by SIGKILL."""
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGTERM)
        for _ in range(50):
            process.poll()
            os.killpg(process.pid, 0)
            time.sleep(0.1)
        os.killpg(process.pid, signal.SIGKILL)


def tail(log: Path, lines: int = 40) -> str:
    """Return the last lines of a log, without Vagrant's progress."""
    words = log.read_text(errors="replace").splitlines()
    return "\n".join([f"    {line}" for line in words if "Progress:" not in line][-lines:])
