"""Print the contents of instances as JSON. Committed snapshots are read through views.

`tests/vm` runs this in the guest, and `storm.inspect_service` runs it for a service of a test.
"""

from __future__ import annotations

import hashlib
import json
import os
import sys
from collections.abc import Iterator

from snapd_native.client import BlockingClient
from snapd_native.errors import SnapdError
from snapd_native.model import Kind


def digests(root: str) -> dict[str, str]:
    found = {}
    for directory, _, names in os.walk(root):
        for name in names:
            path = os.path.join(directory, name)
            with open(path, "rb") as file:
                digest = hashlib.file_digest(file, "sha256").hexdigest()
            found[os.path.relpath(path, root)] = digest
    return found


def snapshots(client: BlockingClient) -> Iterator[dict[str, object]]:
    for info in list(client.walk()):
        found = {
            "name": info.name,
            "kind": info.kind.value,
            "parent": info.parent,
            "labels": dict(info.labels),
        }
        if info.kind is Kind.VIEW:
            yield {**found, "source": client.mounts(info.name).source}
        elif info.kind is Kind.COMMITTED:
            source = client.view("inspection", info.name).source
            try:
                yield {**found, "source": source, "files": digests(source)}
            finally:
                client.remove("inspection")
        else:
            source = client.mounts(info.name).source
            yield {**found, "source": source, "files": digests(source)}


def main() -> None:
    """Print ``{INSTANCE: {"snapshots": [...], "orphans": [...]}}``.

    ``orphans`` has the directories that belong to no snapshot. If an instance does not answer,
    it is ``{INSTANCE: {"error": ...}}``.
    """
    report: dict[str, object] = {}
    for instance in sys.argv[1:]:
        try:
            with BlockingClient(instance) as client:
                found = list(snapshots(client))
                client.cleanup()
                state = client.service().state_directory
        except (SnapdError, OSError) as error:
            report[instance] = {"error": str(error)}
        else:
            known = {os.path.basename(str(one["source"])) for one in found}
            orphans = sorted(set(os.listdir(os.path.join(state, "snapshots"))) - known)
            report[instance] = {"snapshots": found, "orphans": orphans}
    json.dump(report, sys.stdout)


if __name__ == "__main__":
    main()
