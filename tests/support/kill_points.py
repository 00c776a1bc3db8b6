"""Kill a process between any two steps of a call.

A step is a call of a function of `os` or `snapd_native.linux` that changes something, or an SQL
statement that changes something. The process can be killed before each step. The calling thread
copies trees, so that each changing system call of a copy is a step, too. The service has no code
for this.

With ``python -m tests.support.kill_points``, this module runs as a server. It reads one `KillOrder`
a line, executes it in a fork of itself, and prints the outcome.
"""

from __future__ import annotations

import json
import os
import signal
import sqlite3
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType, TracebackType
from typing import Any, Self

import pytest

from snapd_native import linux
from snapd_native.errors import Cancelled
from snapd_native.jobs import Job
from snapd_native.metastore.connections import Connections
from snapd_native.model import STANDBY_LABEL, Change
from snapd_native.snapshotter import Snapshotter
from tests.support import PROJECT
from tests.support.in_process import without_workers
from tests.support.sealing import unsealed
from tests.support.waiting import wait_until

_STEPS: dict[ModuleType, tuple[str, ...]] = {
    os: (
        *("chmod", "chown", "fchmod", "fchown", "setxattr", "removexattr", "utime"),
        *("mkdir", "mknod", "symlink", "link", "open", "rename", "rmdir", "unlink"),
        *("copy_file_range", "ftruncate", "posix_fallocate", "fsync"),
    ),
    linux: (*("change_flags", "ficlone", "mount_setattr", "move_mount", "syncfs", "umount2"),),
}
"""The functions that change something, by module."""

_CHANGING = (
    *("BEGIN", "COMMIT", "ROLLBACK", "INSERT", "UPDATE", "DELETE"),
    *("CREATE", "ALTER", "REINDEX", "PRAGMA user_v"),
)

KillPoint = tuple[str, int]
"""A point in a call: the name of the thread, and the number of its next step."""


@dataclass(frozen=True)
class Case:
    """A call, and the state before it."""

    call: Callable[[Snapshotter, Path], object]
    """The call; its argument is a directory to mount on."""
    set_up: Callable[[Snapshotter, Path], object] = lambda *_: None
    damage: Callable[[Path], object] = lambda _: None
    """A function that changes the state directory while no engine has it open."""
    includes_start: bool = False
    """Whether the start of the engine is a part of the call that is killed."""


def _request_clone(engine: Snapshotter, _: Path) -> None:
    engine.update("base", {STANDBY_LABEL: "1"}, [f"labels.{STANDBY_LABEL}"])
    wait_until(lambda: engine.standby("base") == (1, 1))


def _prepare_from_clone(engine: Snapshotter, place: Path) -> None:
    engine.prepare("new", "base")
    wait_until(lambda: engine.standby("base") == (1, 1))


def _request_no_clone(engine: Snapshotter, _: Path) -> None:
    engine.update("base", {}, [f"labels.{STANDBY_LABEL}"])
    wait_until(lambda: not engine._state.standbys())


def _request_clone_of_unused_base(engine: Snapshotter, place: Path) -> None:
    _request_clone(engine, place)
    for key in ("work", "look"):
        engine.remove(key)


def _remove_base(engine: Snapshotter, _: Path) -> None:
    engine.remove("base")
    wait_until(lambda: not engine._state.standbys())


def _cancel_a_prepare(engine: Snapshotter, _: Path) -> None:
    class Cancels(Job):
        def report(self, inodes: int, size: int) -> None:
            self.cancel()
            super().report(inodes, size)

    with suppress(Cancelled):
        engine.prepare("new", "base", job=Cancels())


def _mount_for_a_client(engine: Snapshotter, place: Path) -> None:
    engine.mounter.mount("work", str(place), owner="a client")


def _release(engine: Snapshotter, _: Path) -> None:
    engine.mounter.release("a client")
    wait_until(lambda: not engine.mounter.owners())


def _make_orphans(state: Path) -> None:
    for name in ("new-71", "rm-72", "73"):
        _make_directory(state, name)


def _make_all_leftovers(state: Path) -> None:
    _make_orphans(state)
    # Only the start of an engine finds an incomplete clone that no thread is making.
    _make_directory(state, "making-1-74")


def _make_directory(state: Path, name: str) -> None:
    directory = state / "snapshots" / name / "directory"
    directory.mkdir(parents=True)
    (directory / "file").touch()


def _mark_as_unsynced(state: Path) -> None:
    """Mark `lone` as made in another boot, so that its tree may not be on the disk."""
    with closing(sqlite3.connect(state / "metadata.db")) as db, db:
        db.execute("UPDATE snapshots SET boot = 'another' WHERE name = 'lone'")


CASES = {
    "prepare without a parent": Case(lambda engine, _: engine.prepare("new", labels={"of": "new"})),
    "prepare": Case(lambda engine, _: engine.prepare("new", "base", {"of": "new"})),
    "prepare from a standby clone": Case(_prepare_from_clone, _request_clone),
    "view": Case(lambda engine, _: engine.view("new", "base", {"of": "new"})),
    "view without a parent": Case(lambda engine, _: engine.view("new")),
    "commit": Case(lambda engine, _: engine.commit("done", "work", {"of": "done"})),
    "commit with a digest": Case(lambda engine, _: engine.commit("done", "work", digest=True)),
    "commit with a parent": Case(lambda engine, _: engine.commit("done", "lone", parent="base")),
    "commit a mounted snapshot": Case(
        lambda engine, _: engine.commit("done", "work"),
        lambda engine, place: engine.mounter.mount("work", str(place)),
    ),
    "update": Case(lambda engine, _: engine.update("base", {"of": "another"})),
    "remove": Case(lambda engine, _: engine.remove("lone")),
    "remove a view": Case(lambda engine, _: engine.remove("look")),
    "remove the parent of a standby clone": Case(_remove_base, _request_clone_of_unused_base),
    "make a standby clone": Case(_request_clone),
    "drop a standby clone": Case(_request_no_clone, _request_clone),
    "a cancelled prepare": Case(_cancel_a_prepare),
    "mount": Case(lambda engine, place: engine.mounter.mount("look", str(place))),
    "mount without a target": Case(lambda engine, _: engine.mounter.mount("work")),
    "unmount": Case(
        lambda engine, place: engine.mounter.unmount(str(place)),
        lambda engine, place: engine.mounter.mount("work", str(place)),
    ),
    "unmount a mount without a target": Case(
        lambda engine, _: engine.mounter.unmount(engine.mounter.list_mounts()[0].target),
        lambda engine, _: engine.mounter.mount("work"),
    ),
    "unmount lazily": Case(
        lambda engine, place: engine.mounter.unmount(str(place), lazy=True),
        lambda engine, place: engine.mounter.mount("work", str(place)),
    ),
    "release": Case(_release, _mount_for_a_client),
    "cleanup": Case(
        lambda engine, _: engine.upkeep.cleanup(),
        lambda engine, _: _make_orphans(engine.state_directory),
    ),
    "repair": Case(
        lambda engine, _: engine.upkeep.repair(),
        lambda engine, _: _make_orphans(engine.state_directory),
    ),
    "the first start": Case(
        lambda engine, _: engine.check_health(),
        damage=lambda state: subprocess.run(["rm", "-r", unsealed(state)], check=True),
        includes_start=True,
    ),
    "a start that finds leftovers": Case(
        lambda engine, _: engine.check_health(), damage=_make_all_leftovers, includes_start=True
    ),
    "a start after a power cut": Case(
        lambda engine, _: engine.check_health(), damage=_mark_as_unsynced, includes_start=True
    ),
}


@dataclass(frozen=True)
class KillOrder:
    """A call, and the point at which the process is killed."""

    case: str
    directory: str
    """The parent of ``state``, ``run`` and ``place``, which is a directory to mount on."""
    kill: KillPoint | None
    """The point before whose step the process is killed; None to let the process end normally."""


@dataclass
class Outcome:
    """The outcome of an order."""

    points: dict[KillPoint, str] = field(default_factory=dict)
    """The points that the process has passed, each with its step."""
    answered: bool = False
    """Whether the call has returned."""
    status: int = 0


class KillClient:
    """The client of the server that this module runs as."""

    def __enter__(self) -> Self:
        self._server = subprocess.Popen(
            [sys.executable, "-m", "tests.support.kill_points"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            cwd=PROJECT,
            text=True,
        )
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._server.communicate()

    def execute(self, order: KillOrder) -> Outcome:
        """Execute an order, and return the outcome."""
        assert self._server.stdin is not None
        assert self._server.stdout is not None
        self._server.stdin.write(json.dumps(vars(order)) + "\n")
        self._server.stdin.flush()
        outcome = Outcome()
        for line in self._server.stdout:
            match json.loads(line):
                case ["passed", thread, number, text]:
                    outcome.points[thread, number] = text
                case ["answered"]:
                    outcome.answered = True
                case ["ended", status]:
                    outcome.status = status
                    return outcome
        raise AssertionError("the server has ended")


class _Killer:
    """Counts the steps of each thread while it is armed, and kills the process at one step."""

    def __init__(self, kill: KillPoint | None) -> None:
        self._kill = kill
        self._armed = False
        self._count: Counter[str] = Counter()

    def arm(self) -> None:
        self._armed = True
        self.step("begin")

    def disarm(self) -> None:
        self._armed = False

    def step(self, text: str) -> None:
        if not self._armed:
            return
        thread = threading.current_thread().name
        self._count[thread] += 1
        if self._kill == (thread, self._count[thread]):
            os.kill(os.getpid(), signal.SIGKILL)
        _print_event("passed", thread, self._count[thread], text)

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Make each call of a function that changes something a step."""
        with pytest.MonkeyPatch.context() as patch, without_workers():
            for module, names in _STEPS.items():
                for name in names:
                    patch.setattr(module, name, self._watched(name, getattr(module, name)))
            patch.setattr(Connections, "_connect", self._connected(Connections._connect))
            yield

    def _watched(self, name: str, real: Callable[..., object]) -> Callable[..., object]:
        def watched(*given: Any, **also: Any) -> object:  # noqa: ANN401 - whatever is given
            if name != "open" or given[1] & os.O_CREAT:
                texts = [text for text in given if isinstance(text, str)]
                self.step(" ".join([name, *texts]))
            return real(*given, **also)

        return watched

    def _connected(
        self, real: Callable[[Connections], sqlite3.Connection]
    ) -> Callable[[Connections], sqlite3.Connection]:
        def trace(statement: str) -> None:
            if statement.lstrip().startswith(_CHANGING):
                self.step(" ".join(statement.split())[:60])

        def connected(connections: Connections) -> sqlite3.Connection:
            db = real(connections)
            db.set_trace_callback(trace)
            return db

        return connected


def _print_event(*what: object) -> None:
    # A single write is not mixed with the writes of other threads.
    os.write(1, json.dumps(what).encode() + b"\n")


def _execute(order: KillOrder) -> None:
    case = CASES[order.case]
    directory = Path(order.directory)
    killer = _Killer(order.kill)

    def announce(_: Change) -> None:
        killer.step("announce")

    with killer.watching():
        if case.includes_start:
            killer.arm()
        engine = Snapshotter(directory / "state", announce, runtime=directory / "run")
        with closing(engine):
            case.set_up(engine, directory / "place")
            _wait_for_background_work(engine)
            killer.arm()
            case.call(engine, directory / "place")
            _print_event("answered")
            _wait_for_background_work(engine)
            killer.step("end")
            killer.disarm()


def _wait_for_background_work(engine: Snapshotter) -> None:
    """Wait until the work in the background is done."""
    engine._reaper.catch_up(lambda *_: None)
    engine._syncer.submit(lambda: None).result()
    wait_until(lambda: all(complete for *_, complete in engine._state.standbys()))


def main() -> None:
    """Execute orders until the end of the input."""
    for line in sys.stdin:
        order = json.loads(line)
        kill = order["kill"] and tuple(order["kill"])
        child = os.fork()
        if child == 0:
            _execute(KillOrder(order["case"], order["directory"], kill))
            os._exit(0)
        _, status = os.waitpid(child, 0)
        _print_event("ended", os.waitstatus_to_exitcode(status))


if __name__ == "__main__":
    main()
