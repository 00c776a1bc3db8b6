"""A demonstration: one real tree through its whole life."""

from __future__ import annotations

import os
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing, contextmanager
from pathlib import Path
from typing import TypeVar

from snapd_native import trees
from snapd_native.cli import render
from snapd_native.client import BlockingClient
from snapd_native.errors import FailedPrecondition
from snapd_native.model import Usage
from snapd_native.private import private_bus, private_daemon, temporary_state

_T = TypeVar("_T")


def run(source: Path, directory: Path) -> None:
    """Take the tree at ``source`` through every call, keeping snapshots below ``directory``.

    Raises:
        FailedPrecondition: the tree cannot be read.
    """
    source = source.resolve()
    try:
        _run(source, directory)
    except (OSError, subprocess.CalledProcessError) as error:
        raise FailedPrecondition(f"the demonstration stopped: {error}") from None


def _run(source: Path, directory: Path) -> None:
    with ExitStack() as stack:
        state = stack.enter_context(temporary_state(directory))
        address = stack.enter_context(private_bus())
        daemon = stack.enter_context(private_daemon(address, state))
        stack.enter_context(_environment("DBUS_SYSTEM_BUS_ADDRESS", address))
        client = stack.enter_context(BlockingClient())
        service = client.service()
        print(
            f"snapd-native {service.version} serves {service.state_directory}"
            f" ({service.filesystem_type}, reflink {'works' if service.reflink else 'does not'})\n"
            f"The tree: {source}, {_described(_measure(source))}\n"
        )
        _life(client, source)
        print(f"\nThe daemon ended with status {daemon.stop()}; everything is cleaned up.")


def _life(client: BlockingClient, source: Path) -> None:
    base = _step("prepare import", lambda: client.prepare("import"))
    print(f"    -> {base.type} {base.source} {','.join(base.options)}")
    _step(
        f"write: cp -a {source}/.",
        lambda: subprocess.run(["cp", "-a", f"{source}/.", base.source], check=True),
    )
    _step("commit base import", lambda: client.commit("base", "import", {"demo": "first"}))
    print(f"    -> {_described(client.usage('base'))}, survives a power cut")

    work = _step("prepare work base", lambda: client.prepare("work", "base"))
    print(f"    -> a private copy: {_described(client.usage('work'))}")
    note = Path(work.source) / "written-by-the-demo"
    _step("write: one new file", lambda: note.write_text("only in the copy\n"))
    _step("commit next work", lambda: client.commit("next", "work", {"demo": "second"}))

    for key, parent in (("old", "base"), ("new", "next")):
        seen = _step(f"view {key} {parent}", lambda k=key, p=parent: client.view(k, p))  # type: ignore[misc]
        found = (Path(seen.source) / note.name).exists()
        print(f"    -> {','.join(seen.options)}, {'with' if found else 'without'} the new file")

    print("\nls:")
    render.table(client.walk(), as_json=False)
    print("\ntree:")
    render.lineage(client.walk(), as_json=False)
    print()
    for key in ("old", "new", "next", "base"):
        _step(f"rm {key}", lambda k=key: client.remove(k))  # type: ignore[misc]
    _step("cleanup", client.cleanup)
    print(f"    -> {len(client.list())} snapshots left")


def _step(what: str, action: Callable[[], _T]) -> _T:
    start = time.perf_counter()
    result = action()
    print(f"{what:<32} {(time.perf_counter() - start) * 1000:10,.1f} ms", flush=True)
    return result


def _described(usage: Usage) -> str:
    return f"{usage.inodes:,} inodes, {render.size(usage.size)}"


def _measure(path: Path) -> Usage:
    parent = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        with closing(trees.Crew()) as crew, trees.open_tree(parent, path.name or ".") as tree:
            return crew.measure(tree, lambda *_: None)
    finally:
        os.close(parent)


@contextmanager
def _environment(name: str, value: str) -> Iterator[None]:
    before = os.environ.get(name)
    os.environ[name] = value
    try:
        yield
    finally:
        if before is None:
            del os.environ[name]
        else:
            os.environ[name] = before
