"""Clients that change snapshots all the time and report each call.

`tests/vm` runs this in the guest, and `storm` runs it for a service of a test. The program reads
from stdin one JSON object, ``{"seed": int, "workers": int, "known": {INSTANCE: {NAME: {PATH:
DIGEST}}}, "keys": {INSTANCE: [KEY]}, "patient": bool}``. It prints a JSON line before each call and
one after it, until it is killed or a client ends with an error. A client that is patient continues
after a call that has failed with an error in `RESOURCE_ERRORS`. The program does not read the
contents of trees: it computes the digests from the data that it writes.
"""

from __future__ import annotations

import hashlib
import json
import os
import random
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import count

from snapd_native.client import BlockingClient
from snapd_native.errors import (
    DataLoss,
    FailedPrecondition,
    Internal,
    NotFound,
    ResourceExhausted,
)

MAX_SNAPSHOTS = 12
"""The approximate number of committed snapshots of an instance, because its disk is small."""

RESOURCE_ERRORS = (DataLoss, ResourceExhausted, Internal)
"""The errors of calls that failed for lack of resources."""

Files = dict[str, str]

_output = threading.Lock()
_numbers = count(1)


def print_event(**fields: object) -> None:
    with _output:
        sys.stdout.write(json.dumps(fields) + "\n")
        sys.stdout.flush()


@contextmanager
def report_call(instance: str, operation: str, key: str, **fields: object) -> Iterator[None]:
    call = next(_numbers)
    print_event(call=call, at="begin", instance=instance, operation=operation, key=key, **fields)
    try:
        yield
    except (FailedPrecondition, NotFound) as error:
        print_event(call=call, at="refused", gone=isinstance(error, NotFound))
        raise
    except RESOURCE_ERRORS as error:
        print_event(call=call, at="failed", error=type(error).__name__, message=str(error))
        raise
    print_event(call=call, at="done")


class Worker:
    """One client of one instance. Its snapshots have names that no other worker uses."""

    def __init__(self, instance: str, name: str, known: dict[str, Files], patient: bool) -> None:
        self._instance = instance
        self._name = name
        self._known = known
        self._patient = patient
        self._random = random.Random(name)

    def run(self, keys: list[str]) -> None:
        with BlockingClient(self._instance) as client:
            for key in keys:
                with report_call(self._instance, "remove", key):
                    client.remove(key)
            for number in count():
                try:
                    self._run_round(client, f"{self._name}-{number}")
                except RESOURCE_ERRORS:
                    if not self._patient:
                        raise

    def _run_round(self, client: BlockingClient, name: str) -> None:
        key = f"{name}-active"
        parent = self._random.choice(["", *list(self._known)])
        files = dict(self._known.get(parent, {}))
        try:
            with report_call(self._instance, "prepare", key, parent=parent):
                mount = client.prepare(key, parent)
        except (FailedPrecondition, NotFound):
            return
        try:
            self._change(mount.source, name, files)
        except OSError:
            if not self._patient:
                raise
            return
        if self._random.random() < 0.15:
            return
        with report_call(self._instance, "commit", key, name=name, parent=parent, files=files):
            client.commit(name, key)
        self._known[name] = files
        if self._random.random() < 0.3:
            self._make_short_calls(client, name)
        if len(self._known) > MAX_SNAPSHOTS:
            # The service does not remove snapshots that have children.
            for name in self._random.sample(list(self._known), k=5):
                self._remove(client, name)

    def _make_short_calls(self, client: BlockingClient, name: str) -> None:
        """Make calls that change no tree. Another client may remove the snapshot between them."""
        key = f"{name}-view"
        try:
            with report_call(self._instance, "view", key):
                client.view(key, name)
            client.usage(key)
            sum(1 for _ in client.walk([f"parent=={name}"]))
            with report_call(self._instance, "update", name, labels={"of": key}):
                client.update(name, {"of": key})
            if self._random.random() < 0.7:
                with report_call(self._instance, "remove", key):
                    client.remove(key)
        except (FailedPrecondition, NotFound):
            return

    def _remove(self, client: BlockingClient, name: str) -> None:
        try:
            with report_call(self._instance, "remove", name):
                client.remove(name)
        except (FailedPrecondition, NotFound):
            return
        self._known.pop(name, None)

    def _change(self, root: str, name: str, files: Files) -> None:
        """Add files that no client changes later, and add, overwrite, rename and delete others."""
        for number in range(self._random.randrange(1, 4)):
            self._write(root, f"kept/{name}/{number}", files)
        changing = [path for path in files if path.startswith("changing/")]
        self._random.shuffle(changing)
        for path in changing[:2]:
            self._write(root, path, files)
        for path in changing[2:4]:
            os.unlink(os.path.join(root, path))
            del files[path]
        for path in changing[4:5]:
            os.rename(os.path.join(root, path), os.path.join(root, f"changing/{name}-renamed"))
            files[f"changing/{name}-renamed"] = files.pop(path)
        for number in range(self._random.randrange(1, 4)):
            self._write(root, f"changing/{name}-{number}", files)

    def _write(self, root: str, path: str, files: Files) -> None:
        data = self._random.randbytes(int(self._random.paretovariate(0.6) * 100) % 150_000)
        os.makedirs(os.path.dirname(os.path.join(root, path)), exist_ok=True)
        with open(os.path.join(root, path), "wb") as file:
            file.write(data)
        files[path] = hashlib.sha256(data).hexdigest()


def main() -> None:
    """Start the workers, and end when one of them fails."""
    order = json.loads(sys.stdin.readline())
    failed = threading.Event()

    def work(worker: Worker, keys: list[str]) -> None:
        try:
            worker.run(keys)
        finally:
            failed.set()

    for instance, known in order["known"].items():
        for number in range(order["workers"]):
            worker = Worker(instance, f"{order['seed']}-{number}", known, order["patient"])
            keys = order["keys"][instance] if number == 0 else []
            threading.Thread(target=work, args=(worker, keys), daemon=True).start()
    failed.wait()
    sys.exit(1)


if __name__ == "__main__":
    main()
