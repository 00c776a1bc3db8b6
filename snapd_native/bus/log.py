"""One line in the log for each operation: what, how long, for whom, and why not."""

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
    """Log what is done inside the block, which a caller with ``uid`` may do.

    ``texts`` are its arguments. A call that ``changes`` nothing is logged for debugging only. A
    call without authorisation is not logged: its caller could fill the log.

    Raises:
        Internal: what is done has a bug, which is logged.
    """
    begun = time.monotonic()
    # PrepareJob and the like do the same, only that nobody waits.
    operation = call.member.removesuffix("Job")
    given = {name: text for name, text in texts.items() if text}
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
        # One number, so that the message and the field agree.
        microseconds = round((time.monotonic() - begun) * 1_000_000)
        log.log(
            level,
            "%s: %s (uid %d, %.1f ms)",
            " ".join([operation, *(f"{name}={quote(text)}" for name, text in given.items())]),
            outcome,
            uid,
            microseconds / 1000,
            extra=logs.fields(
                [
                    ("operation", operation),
                    *given.items(),
                    # A snapshot is looked for by its key or its name, and is found by either.
                    *([("key", given["name"])] if "name" in given else []),
                    *error,
                    ("duration_usec", str(microseconds)),
                    ("caller_uid", str(uid)),
                    ("sender", call.sender),
                ]
            ),
        )


def _level(error: Exception, usual: int) -> int:
    if isinstance(error, ResourceExhausted):
        return logging.WARNING
    if isinstance(error, (DataLoss, Internal)) or not isinstance(error, (SnapdError, DBusError)):
        return logging.ERROR
    return usual
