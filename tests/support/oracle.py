"""Check that all changes acknowledged to a load exist after a power cut or a disk failure."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from typing import Any

Files = dict[str, str]
"""Digests by path."""

Labels = dict[str, str]


@dataclass
class InstanceOracle:
    """The contents that one instance must have, computed from the output of a load."""

    committed: dict[str, Files] = field(default_factory=dict)
    """Snapshots whose Commit was acknowledged and whose Remove has not begun."""
    uncertain: dict[str, Files] = field(default_factory=dict)
    """Snapshots whose Commit or Remove has begun and has no reply."""
    active: dict[str, Files] = field(default_factory=dict)
    """Snapshots whose Prepare has begun, with the files of the parent."""
    views: dict[str, bool] = field(default_factory=dict)
    """Views that can exist, and whether they must exist."""
    labels: dict[str, list[Labels]] = field(default_factory=dict)
    """Possible labels of committed snapshots; more than one after an Update without a reply."""
    acknowledged: int = 0
    """The number of acknowledged commits."""
    failures: list[str] = field(default_factory=list)
    """The errors of failed calls."""

    def begin(self, call: dict[str, Any]) -> None:
        key = call["key"]
        match call["operation"]:
            case "prepare":
                parent = call["parent"]
                self.active[key] = {**self.committed, **self.uncertain}.get(parent, {})
            case "commit":
                self.uncertain[call["name"]] = call["files"]
                self.labels[call["name"]] = [{}]
            case "view":
                self.views[key] = False
            case "update":
                self.labels[key].append(call["labels"])
            case "remove" if key in self.committed:
                self.uncertain[key] = self.committed.pop(key)
            case "remove" if key in self.views:
                self.views[key] = False

    def done(self, call: dict[str, Any]) -> None:
        key = call["key"]
        match call["operation"]:
            case "commit":
                self.acknowledged += 1
                # Another client can have begun to remove the snapshot before this line.
                self.committed[call["name"]] = self.uncertain.pop(call["name"])
                self.active.pop(key)
            case "view":
                self.views[key] = True
            case "update":
                self.labels[key] = [call["labels"]]
            case "remove":
                # The snapshot is in `committed` again if the Remove of another client has failed.
                self.committed.pop(key, None)
                self.uncertain.pop(key, None)
                self.active.pop(key, None)
                self.views.pop(key, None)

    def refused(self, call: dict[str, Any], *, gone: bool) -> None:
        assert call["operation"] != "commit", f"{call} was refused"
        self._undone(call, gone=gone)

    def failed(self, call: dict[str, Any], error: str, *, gone: bool) -> None:
        self.failures.append(error)
        if not call.get("doubtful"):
            self._undone(call, gone=gone)

    def _undone(self, call: dict[str, Any], *, gone: bool) -> None:
        """Restore the state before the call; ``gone``: another client may have removed the key."""
        key = call["key"]
        match call["operation"]:
            case "prepare":
                self.active.pop(key)
            case "commit":
                self.uncertain.pop(call["name"])
                self.labels.pop(call["name"])
            case "view":
                self.views.pop(key)
            case "update":
                self.labels[key].remove(call["labels"])
            case "remove" if gone:
                pass
            case "remove" if key in self.uncertain:
                self.committed[key] = self.uncertain.pop(key)
            case "remove" if key in self.views:
                self.views[key] = True

    def compare(self, found: dict[str, Any]) -> list[str]:
        """Return the differences from the expected contents, and expect ``found`` from now on."""
        if "error" in found:
            return [f"it does not answer: {found['error']}"]
        snapshots = {snapshot["name"]: snapshot for snapshot in found["snapshots"]}
        differences = [f"an orphan directory: {name}" for name in found["orphans"]]
        differences += [f"{name} is lost" for name in self.committed if name not in snapshots]
        differences += [
            f"{key} is lost"
            for key, must_exist in self.views.items()
            if must_exist and key not in snapshots
        ]
        for name, snapshot in snapshots.items():
            match snapshot["kind"]:
                case "view" if name not in self.views:
                    differences.append(f"{name} is there, and was removed or never made")
                case "active":
                    differences += self._compare_active(name, snapshot["files"])
                case "committed":
                    differences += self._compare_committed(name, snapshot)
        self._expect(snapshots)
        return differences

    def _compare_active(self, key: str, files: Files) -> list[str]:
        """Check that an active snapshot has the files of its parent that no client changes."""
        if key not in self.active:
            return [f"{key} is there, and was removed, committed or never prepared"]
        kept = {
            path: digest for path, digest in self.active[key].items() if path.startswith("kept/")
        }
        return [f"{key} lacks {path}" for path in kept if files.get(path) != kept[path]]

    def _compare_committed(self, name: str, snapshot: dict[str, Any]) -> list[str]:
        """Check that a committed snapshot has its files and one of its possible labels."""
        files, expected = snapshot["files"], self.committed.get(name, self.uncertain.get(name))
        if expected is None:
            return [f"{name} is there, and was removed or never committed"]
        if files != expected:
            paths = [path for path in files | expected if files.get(path) != expected.get(path)]
            return [f"{name} differs: {sorted(paths)[:5]}"]
        if snapshot["labels"] not in self.labels[name]:
            return [f"{name} has the labels {snapshot['labels']}"]
        return []

    def _expect(self, snapshots: dict[str, dict[str, Any]]) -> None:
        """Expect exactly these snapshots from now on."""
        by_kind: dict[str, dict[str, dict[str, Any]]] = {"view": {}, "active": {}, "committed": {}}
        for name, snapshot in snapshots.items():
            by_kind[snapshot["kind"]][name] = snapshot
        committed = by_kind["committed"].items()
        self.committed = {name: snapshot["files"] for name, snapshot in committed}
        self.labels = {name: [snapshot["labels"]] for name, snapshot in committed}
        self.active = {key: snapshot["files"] for key, snapshot in by_kind["active"].items()}
        self.views = dict.fromkeys(by_kind["view"], True)
        self.uncertain = {}


class Oracle:
    """The contents that all instances must have, over several loads."""

    def __init__(self, instances: tuple[str, ...]) -> None:
        self.instances = {instance: InstanceOracle() for instance in instances}
        self._calls: dict[int, dict[str, Any]] = {}
        self._lines: list[str] = []

    def read(self, line: str) -> None:
        self._lines.append(line)
        event = json.loads(line)
        if event["at"] == "begin":
            self._calls[event["call"]] = event
            self.instances[event["instance"]].begin(event)
            return
        call = self._calls.pop(event["call"])
        expected = self.instances[call["instance"]]
        # The Remove of another client can delete the snapshot, now or later.
        gone = event.get("gone", False) or any(
            (other["operation"], other["instance"], other["key"])
            == ("remove", call["instance"], call["key"])
            for other in self._calls.values()
        )
        match event["at"]:
            case "done":
                expected.done(call)
            case "refused":
                expected.refused(call, gone=gone)
            case "failed":
                expected.failed(call, f"{event['error']}: {event['message']}", gone=gone)

    def accept_open_calls(self) -> None:
        """Accept that open calls may have changed something, even if they fail later."""
        for call in self._calls.values():
            call["doubtful"] = True

    def end(self) -> None:
        """Forget the open calls, because they get no reply any more."""
        self._calls.clear()

    def acknowledged(self) -> int:
        """Return the number of acknowledged commits of the instance that has the fewest."""
        return min(expected.acknowledged for expected in self.instances.values())

    def lines_about(self, differences: list[str]) -> str:
        """Return the lines of the last load about the snapshots in ``differences``."""
        names = {json.dumps(word) for line in differences for word in line.split()}
        calls = {
            json.loads(line)["call"] for line in self._lines if any(name in line for name in names)
        }
        return "".join(line for line in self._lines if json.loads(line)["call"] in calls)

    def load_input(self, seed: int, workers: int, patient: bool = False) -> str:
        """Return the input of a new load, and forget the lines of the last load."""
        self._lines.clear()
        return json.dumps(
            {
                "seed": seed,
                "workers": workers,
                "known": {name: one.committed for name, one in self.instances.items()},
                "keys": {name: [*one.views, *one.active] for name, one in self.instances.items()},
                "patient": patient,
            }
        )
