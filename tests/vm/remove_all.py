"""A program in the guest that removes all mounts and snapshots of the named instances."""

from __future__ import annotations

import sys

from snapd_native.client import BlockingClient
from snapd_native.errors import FailedPrecondition


def remove_all(client: BlockingClient) -> None:
    for mounted in client.list_mounts():
        client.unmount(mounted.target)
    left = [info.name for info in client.walk()]
    while left:
        children = list(left)
        left.clear()
        for name in reversed(children):
            try:
                client.remove(name)
            except FailedPrecondition:
                left.append(name)
        if left == children[::-1]:
            raise SystemExit(f"cannot remove {left}")
    client.cleanup()


if __name__ == "__main__":
    for instance in sys.argv[1:]:
        with BlockingClient(instance) as client:
            remove_all(client)
