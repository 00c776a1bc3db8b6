"""Measure the peak memory of processes."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path


class Peak:
    """The peaks of a process and of its children, in bytes of resident memory."""

    def __init__(self, pid: int) -> None:
        self._pid = pid
        self.process = 0
        self.children = 0

    def sample(self) -> None:
        """Read the peaks again; a child that has ended since the last time is not counted.

        What the children have taken is the sum of their own peaks, those of the moment.
        """
        status = Path("/proc", str(self._pid), "status")
        self.process = max(self.process, _fields(status).get("VmHWM", 0))
        total = 0
        for path in Path("/proc").glob("[0-9]*/status"):
            with suppress(OSError):
                fields = _fields(path)
                if fields["PPid"] == self._pid:
                    total += fields.get("VmHWM", 0)
        self.children = max(self.children, total)


def _fields(status: Path) -> dict[str, int]:
    """Return the numbers of a status file, with sizes in bytes."""
    found = {}
    for line in status.read_text().splitlines():
        name, _, value = line.partition(":")
        number, *unit = value.split() or [""]
        if number.isdecimal():
            found[name] = int(number) * (1024 if unit == ["kB"] else 1)
    return found
