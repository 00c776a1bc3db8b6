"""Send the log to systemd's journal with fields, or to standard error."""

from __future__ import annotations

import logging
import os
import socket
import struct
import sys
from collections.abc import Iterable, Mapping, Sequence
from itertools import starmap
from pathlib import Path

_JOURNAL = Path("/run/systemd/journal/socket")

_FIELDS = "journal_fields"


def fields(values: Iterable[tuple[str, str]]) -> Mapping[str, Sequence[tuple[str, str]]]:
    """Return the ``extra`` of a log record for fields in the journal.

    A field becomes ``SNAPD_NATIVE_<NAME>``, once for each of its values; see
    systemd.journal-fields(7).
    """
    return {_FIELDS: [(f"SNAPD_NATIVE_{name.upper()}", text) for name, text in values]}


def configure(level: int) -> None:
    """Log to the journal if standard error is connected to it, else to standard error."""
    handler: logging.Handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(logging.Formatter("%(levelname)s %(name)s: %(message)s"))
    if _journal_reads_stderr():
        handler = _JournalHandler(_JOURNAL)
    logging.basicConfig(level=level, handlers=[handler])


def _journal_reads_stderr() -> bool:
    """Tell whether standard error is the ``JOURNAL_STREAM``; see systemd.exec(5)."""
    try:
        stderr = os.fstat(2)
    except OSError:
        return False
    return os.environ.get("JOURNAL_STREAM") == f"{stderr.st_dev}:{stderr.st_ino}"


class _JournalHandler(logging.Handler):
    """Speaks the Native Journal Protocol, https://systemd.io/JOURNAL_NATIVE_PROTOCOL."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.setFormatter(logging.Formatter("%(message)s"))
        self._path = path
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._stderr = logging.StreamHandler(sys.stderr)
        self._stderr.setFormatter(_PriorityFormatter())

    def emit(self, record: logging.LogRecord) -> None:
        values = [
            ("MESSAGE", self.format(record)),
            ("PRIORITY", str(_priority(record))),
            ("SYSLOG_IDENTIFIER", "snapd-native"),
            ("LOGGER", record.name),
            *getattr(record, _FIELDS, ()),
        ]
        try:
            self._socket.sendto(b"".join(starmap(_entry, values)), str(self._path))
        except OSError:
            # The journal restarts, or the entry is too large.
            self._stderr.emit(record)

    def close(self) -> None:
        self._socket.close()
        super().close()


class _PriorityFormatter(logging.Formatter):
    """Puts the syslog priority in front of each line; see sd-daemon(3)."""

    def format(self, record: logging.LogRecord) -> str:
        prefix = f"<{_priority(record)}>"
        return "\n".join(prefix + line for line in super().format(record).splitlines())


def _entry(name: str, text: str) -> bytes:
    value = text.encode(errors="replace")
    if b"\n" in value:
        return name.encode() + b"\n" + struct.pack("<Q", len(value)) + value + b"\n"
    return name.encode() + b"=" + value + b"\n"


def _priority(record: logging.LogRecord) -> int:
    known = {logging.DEBUG: 7, logging.INFO: 6, logging.WARNING: 4, logging.ERROR: 3}
    return known.get(record.levelno, 2)
