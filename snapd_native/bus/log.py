"""Log each operation: its arguments, duration, user and error."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

from dbus_next.errors import DBusError

from snapd_native import logs
from snapd_native.bus.incoming import Call
from snapd_native.bus.replies import described
from snapd_native.errors import DataLoss, Internal, ResourceExhausted, SnapdError
from snapd_native.model import quote

log = logging.getLogger(__name__)


@contextmanager
def logged(call: Call, uid: int, texts: Mapping[str, str], *, changes: bool) -> Iterator[None]:
    """Log the operation of the block, for the authorised caller with ``uid``.

    ``texts`` are its arguments. A call that changes nothing is logged with the level debug. A call
    without authorisation is not logged, because its caller could fill the log.

    Raises:
        Internal: the block has a bug, which is logged.
    """
    begun = time.monotonic()
    outcome, level, error = "done", logging.INFO if changes else logging.DEBUG, []
    try:
        yield
    except Exception as failure:
        name, outcome = described(failure)
        level, error = _level(failure, level), [("error", name)]
        if not isinstance(failure, (SnapdError, DBusError)):
            raise Internal(outcome) from failure
        raise
    finally:
        # PrepareJob does the same as Prepare, but the caller does not wait.
        operation = call.member.removesuffix("Job")
        given = [(name, text) for name, text in texts.items() if text]
        # The message and the field have the same number.
        microseconds = round((time.monotonic() - begun) * 1_000_000)
        title = " ".join([operation, *(f"{name}={quote(text)}" for name, text in given)])
        fields = [
            ("operation", operation),
            *given,
            # An entry is found by the key and by the name of a snapshot.
            *(("key", text) for name, text in given if name == "name"),
            *error,
            ("duration_usec", str(microseconds)),
            ("caller_uid", str(uid)),
            ("sender", call.sender),
        ]
        log.log(
            level,
            "%s: %s (uid %d, %.1f ms)",
            *(title, outcome, uid, microseconds / 1000),
            extra=logs.fields(fields),
        )


def _level(error: Exception, usual: int) -> int:
    if isinstance(error, ResourceExhausted):
        return logging.WARNING
    if isinstance(error, (DataLoss, Internal)) or not isinstance(error, (SnapdError, DBusError)):
        return logging.ERROR
    return usual
