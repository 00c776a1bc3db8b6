"""The metastore: every snapshot's record, in SQLite."""

from snapd_native.metastore.ledger import Line
from snapd_native.metastore.store import Metastore, Record, Reservation

__all__ = ["Line", "Metastore", "Record", "Reservation"]
