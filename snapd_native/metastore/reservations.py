"""Keys and names that running calls have reserved."""

from __future__ import annotations

from dataclasses import dataclass

from snapd_native.errors import AlreadyExists, FailedPrecondition
from snapd_native.metastore.records import Record
from snapd_native.model import quote


@dataclass(frozen=True, slots=True)
class Reservation:
    """A key or name that is reserved for one call, and what must not change during the call."""

    name: str
    id: int
    """The id of the new snapshot; for a Commit, of the active one."""
    parent: Record | None
    committing: Record | None = None


class Reservations:
    """All reservations. They are in memory only, so that a crash ends them. Not thread-safe."""

    def __init__(self, first_id: int) -> None:
        """Start with the id ``first_id``."""
        self._next_id = first_id
        self._held: dict[str, Reservation] = {}

    @property
    def last_id(self) -> int:
        """The highest id so far."""
        return self._next_id - 1

    def skip(self, last_id: int) -> None:
        """Do not use the ids up to ``last_id``."""
        self._next_id = max(self._next_id, last_id + 1)

    def ids(self) -> set[int]:
        """Return the ids of all reservations."""
        return {held.id for held in self._held.values()}

    def hold(self, key: str, parent: Record | None) -> Reservation:
        """Reserve ``key``, which is free, and an id for a new snapshot."""
        self._held[key] = made = Reservation(key, self._next_id, parent)
        self._next_id += 1
        return made

    def hold_commit(self, name: str, record: Record, parent: Record | None) -> Reservation:
        """Reserve ``name``, which is free, for the Commit of an active snapshot."""
        self._held[name] = made = Reservation(name, record.id, parent, record)
        return made

    def release(self, reservation: Reservation) -> None:
        """End a reservation; one that has ended already is ignored."""
        if self._held.get(reservation.name) is reservation:
            del self._held[reservation.name]

    def check_free(self, name: str, what: str) -> None:
        """Check that no call has reserved ``name``; ``what`` is "key" or "name".

        Raises:
            AlreadyExists: a call has.
        """
        if name in self._held:
            raise AlreadyExists(
                f"the {what} {quote(name)} is taken by a call that is still running:"
                " choose another or wait"
            )

    def check_not_committing(self, record: Record, doing: str) -> None:
        """Check that no Commit of the snapshot is running; ``doing`` is what the caller wants.

        Raises:
            FailedPrecondition: it is.
        """
        if any(held.committing and held.id == record.id for held in self._held.values()):
            raise FailedPrecondition(
                f"cannot {doing} {quote(record.info.name)}: it is being committed,"
                " wait for that to end"
            )

    def is_parent(self, record: Record) -> bool:
        """Tell whether a reservation has the snapshot as its parent."""
        return any(held.parent and held.parent.id == record.id for held in self._held.values())
