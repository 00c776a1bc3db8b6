"""A load that ends in a disaster at any instant, and what is found after it."""

from __future__ import annotations

import json
import os
import select
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import IO, Any

from tests.support import PROJECT
from tests.support.oracle import Book
from tests.support.service import Service


def rage(
    book: Book, service: Service, order: str, commits: int, seconds: float, end: Callable[[], None]
) -> int:
    """Have clients change all they can, and call ``end`` some ``seconds`` after so many commits.

    Returns how many calls were acknowledged before the load ended by what came of it.
    """
    enough = book.acknowledged() + commits
    acknowledged = 0
    with load(order) as lines:
        while book.acknowledged() < enough:
            line = lines.readline()
            assert line, "the load has ended by itself"
            book.read(line)
            acknowledged += json.loads(line)["at"] == "done"
        # The instant is anywhere in what comes next.
        ended = os.pidfd_open(service.pid)
        assert not select.select([ended], [], [], seconds)[0]
        os.close(ended)
        end()
        for line in lines:
            # The last one may be cut off: it ends when the first call fails.
            if line.endswith("\n"):
                book.read(line)
                acknowledged += json.loads(line)["at"] == "done"
    book.end()
    return acknowledged


@contextmanager
def load(order: str) -> Iterator[IO[str]]:
    """Run clients that change all they can, and lend what they tell."""
    with subprocess.Popen(
        [sys.executable, PROJECT / "tests" / "support" / "storm_load.py"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    ) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        try:
            print(order, file=process.stdin, flush=True)
            yield process.stdout
        finally:
            process.kill()


def found() -> dict[str, Any]:
    """Return what there is, as `inspection` does in the machine."""
    command = [sys.executable, str(PROJECT / "tests" / "support" / "inspection.py"), ""]
    output = subprocess.run(command, stdout=subprocess.PIPE, check=True).stdout
    (one,) = json.loads(output).values()
    return dict(one)
