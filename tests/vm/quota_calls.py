"""A program in the guest: calls of an instance before, while and after a quota is exhausted.

It prints the answer to each call, as a JSON object.
"""

from __future__ import annotations

import errno
import json
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import suppress

from snapd_native.client import BlockingClient
from snapd_native.errors import ResourceExhausted, SnapdError

MIB = 1 << 20

TARGET = "/run/quota-calls"

VIEWS = 150
"""More views than the space that is reserved for the metadata can hold."""


def populate(client: BlockingClient) -> None:
    for number in range(4):
        tree = client.prepare("preparing").source
        with open(os.path.join(tree, "file"), "wb") as file:
            file.write(os.urandom(MIB))
        client.commit(f"base-{number}", "preparing")
    client.prepare("work", "base-0")
    client.prepare("more", "base-0")
    client.view("look", "base-0")
    os.makedirs(TARGET, exist_ok=True)


def use_all(scarce: str, root: str) -> None:
    """Use the last byte or inode that the quota allows."""
    filler = os.path.join(root, "filler")
    os.makedirs(filler, exist_ok=True)
    try:
        for number in range(1 << 20) if scarce == "inodes" else ():
            os.close(os.open(os.path.join(filler, str(number)), os.O_WRONLY | os.O_CREAT))
        with open(os.path.join(filler, "file"), "ab", buffering=0) as file:
            for size in (MIB, 4096, 1):
                append(file.fileno(), size)
    except OSError as error:
        if error.errno not in (errno.EDQUOT, errno.ENOSPC):
            raise


def append(fd: int, size: int) -> None:
    try:
        while True:
            os.write(fd, bytes(size))
    except OSError as error:
        if error.errno not in (errno.EDQUOT, errno.ENOSPC):
            raise


def answer_to(client: BlockingClient, call: Callable[..., object], *arguments: object) -> str:
    """Return ``done`` or the name of the error, with a remark if a failed call is not undone."""
    before = state(client)
    try:
        call(*arguments)
    except SnapdError as error:
        return type(error).__name__ + (", but not undone" if state(client) != before else "")
    return "done"


def state(client: BlockingClient) -> object:
    """Return all snapshots, mounts and directories."""
    snapshots = os.path.join(client.service().state_directory, "snapshots")
    return list(client.walk()), client.list_mounts(), sorted(os.listdir(snapshots))


def calls_while_exhausted(client: BlockingClient, scarce: str) -> Iterator[tuple[str, str]]:
    yield "prepare from base", answer_to(client, client.prepare, "new", "base-1")
    yield "prepare", answer_to(client, client.prepare, "new")
    yield "view", answer_to(client, client.view, "new")
    # Some space is reserved for calls that only write a record.
    with suppress(ResourceExhausted):
        for number in range(VIEWS if scarce == "blocks" else 1):
            client.view(f"view-{number}", "base-1")
    yield "view from base", answer_to(client, client.view, "new", "base-1")
    yield "update", answer_to(client, client.update, "base-1", {"of": "x" * 3000})
    yield "commit", answer_to(client, client.commit, "done", "work")
    yield "mount", answer_to(client, client.mount, "look", TARGET)
    for mounted in client.list_mounts():
        client.unmount(mounted.target)
    yield "stat", answer_to(client, client.stat, "base-1")
    yield "usage", answer_to(client, client.usage, "more")
    yield "mounts", answer_to(client, client.mounts, "more")
    yield "remove", answer_to(client, client.remove, "more")
    yield "remove a base", answer_to(client, client.remove, "base-3")
    yield "remove another", answer_to(client, client.remove, "base-2")
    yield "cleanup", answer_to(client, client.cleanup)
    yield "prepare with room", answer_to(client, client.prepare, "more", "base-0")


def calls_with_raised_limit(client: BlockingClient) -> Iterator[tuple[str, str]]:
    yield "prepare from base", answer_to(client, client.prepare, "late", "base-1")
    yield "prepare", answer_to(client, client.prepare, "later")
    yield "view", answer_to(client, client.view, "last", "base-1")
    yield "update", answer_to(client, client.update, "base-1", {"of": "y" * 3000})
    yield "commit", answer_to(client, client.commit, "at last", "late")
    yield "mount", answer_to(client, client.mount, "look", TARGET)
    yield "unmount", answer_to(client, client.unmount, TARGET)
    os.rmdir(TARGET)


def main() -> None:
    """Run the step that the arguments name, on the instance that they name."""
    instance, step, *arguments = sys.argv[1:]
    with BlockingClient(instance) as client:
        match step:
            case "fill":
                populate(client)
            case "exhausted":
                scarce, root = arguments
                use_all(scarce, root)
                json.dump(dict(calls_while_exhausted(client, scarce)), sys.stdout)
            case "raised":
                json.dump(dict(calls_with_raised_limit(client)), sys.stdout)


if __name__ == "__main__":
    main()
