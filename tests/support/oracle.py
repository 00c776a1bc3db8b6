"""Check that all changes acknowledged to a load exist after a power cut or a disk failure."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from typing import Any

Files = dict[str, str]
"""Digests by path."""

Labels = dict[str, str]


@dataclass
class Ledger:
    """The contents that one instance must have, from the output of the load."""

    committed: dict[str, Files] = field(default_factory=dict)
    """Snapshots whose Commit was acknowledged and whose Remove has not begun."""
    perhaps: dict[str, Files] = field(default_factory=dict)
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
                self.active[key] = {**self.committed, **self.perhaps}.get(parent, {})
            case "commit":
                self.perhaps[call["name"]] = call["files"]
                self.labels[call["name"]] = [{}]
            case "view":
                self.views[key] = False
            case "update":
                self.labels[key].append(call["labels"])
            case "remove" if key in self.committed:
                self.perhaps[key] = self.committed.pop(key)
            case "remove" if key in self.views:
                self.views[key] = False

    def done(self, call: dict[str, Any]) -> None:
        key = call["key"]
        match call["operation"]:
            case "commit":
                self.acknowledged += 1
                # Another client can have begun to remove the snapshot before this line.
                self.committed[call["name"]] = self.perhaps.pop(call["name"])
                self.active.pop(key)
            case "view":
                self.views[key] = True
            case "update":
                self.labels[key] = [call["labels"]]
            case "remove":
                # The snapshot is in `committed` again if the Remove of another client has failed.
                self.committed.pop(key, None)
                self.perhaps.pop(key, None)
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
                self.perhaps.pop(call["name"])
                self.labels.pop(call["name"])
            case "view":
                self.views.pop(key)
            case "update":
                self.labels[key].remove(call["labels"])
            case "remove" if gone:
                pass
            case "remove" if key in self.perhaps:
                self.committed[key] = self.perhaps.pop(key)
            case "remove" if key in self.views:
                self.views[key] = True

    def compare(self, found: dict[str, Any]) -> list[str]:
        """Return the differences from the expected contents, and expect ``found`` from now on."""
        if "error" in found:
            return [f"it does not answer: {found['error']}"]
        troubles = [f"an orphan directory: {name}" for name in found["left"]]
        there = {one["name"]: one for one in found["snapshots"]}
        troubles += [f"{name} is lost" for name in self.committed if name not in there]
        troubles += [
            f"{key} is lost" for key, must in self.views.items() if must and key not in there
        ]
        for name, one in there.items():
            if one["kind"] == "view":
                if name not in self.views:
                    troubles.append(f"{name} is there, and was removed or never made")
                continue
            if one["kind"] == "active":
                troubles += self._compare_active(name, one["files"])
                continue
            promised = self.committed.get(name, self.perhaps.get(name))
            if promised is None:
                troubles.append(f"{name} is there, and was removed or never committed")
            elif promised != one["files"]:
                differing = [
                    path
                    for path in {*promised, *one["files"]}
                    if promised.get(path) != one["files"].get(path)
                ]
                troubles.append(f"{name} differs: {sorted(differing)[:5]}")
            elif one["labels"] not in self.labels[name]:
                troubles.append(f"{name} has the labels {one['labels']}")
        self.committed = {n: o["files"] for n, o in there.items() if o["kind"] == "committed"}
        self.active = {n: o["files"] for n, o in there.items() if o["kind"] == "active"}
        self.views = {n: True for n, o in there.items() if o["kind"] == "view"}
        self.labels = {n: [o["labels"]] for n, o in there.items() if o["kind"] == "committed"}
        self.perhaps = {}
        return troubles

    def _compare_active(self, key: str, files: Files) -> list[str]:
        """Check that an active snapshot has the files of its parent that no client changes."""
        if key not in self.active:
            return [f"{key} is there, and was removed, committed or never prepared"]
        kept = {p: d for p, d in self.active[key].items() if p.startswith("kept/")}
        return [f"{key} lacks {path}" for path in kept if files.get(path) != kept[path]]


class Book:
    """The contents that all instances must have, over several loads."""

    def __init__(self, instances: tuple[str, ...]) -> None:
        self.ledgers = {instance: Ledger() for instance in instances}
        self._calls: dict[int, dict[str, Any]] = {}
        self._lines: list[str] = []

    def read(self, line: str) -> None:
        self._lines.append(line)
        told = json.loads(line)
        if told["at"] == "begin":
            self._calls[told["call"]] = told
            self.ledgers[told["instance"]].begin(told)
            return
        call = self._calls.pop(told["call"])
        ledger = self.ledgers[call["instance"]]
        # The Remove of another client can delete the snapshot, now or later.
        gone = told.get("gone", False) or any(
            (other["operation"], other["instance"], other["key"])
            == ("remove", call["instance"], call["key"])
            for other in self._calls.values()
        )
        match told["at"]:
            case "done":
                ledger.done(call)
            case "refused":
                ledger.refused(call, gone=gone)
            case "failed":
                ledger.failed(call, f"{told['error']}: {told['message']}", gone=gone)

    def doubt(self) -> None:
        """Accept that open calls may have changed something, even if they fail later."""
        for call in self._calls.values():
            call["doubtful"] = True

    def end(self) -> None:
        """Forget the open calls, because they get no reply any more."""
        self._calls.clear()

    def acknowledged(self) -> int:
        """Return the number of acknowledged commits of the instance that has the fewest."""
        return min(ledger.acknowledged for ledger in self.ledgers.values())

    def story(self, troubles: list[str]) -> str:
        """Return the lines of the last load about the snapshots in ``troubles``."""
        names = {json.dumps(word) for trouble in troubles for word in trouble.split()}
        calls = {
            json.loads(line)["call"] for line in self._lines if any(name in line for name in names)
        }
        return "".join(line for line in self._lines if json.loads(line)["call"] in calls)

    def order(self, seed: int, workers: int, patient: bool = False) -> str:
        """Return the input of a new load, and forget the lines of the last load."""
        self._lines.clear()
        return json.dumps(
            {
                "seed": seed,
                "workers": workers,
                "known": {name: one.committed for name, one in self.ledgers.items()},
                "keys": {name: [*one.views, *one.active] for name, one in self.ledgers.items()},
                "patient": patient,
            }
        )
