"""The metastore: every snapshot's record, in SQLite."""

from snapd_native.metastore.ledger import Ledger, Line
from snapd_native.metastore.records import Record
from snapd_native.metastore.reservations import Reservation
from snapd_native.metastore.store import Metastore

__all__ = ["Ledger", "Line", "Metastore", "Record", "Reservation"]
