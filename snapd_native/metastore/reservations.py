"""Keys and names that are held for calls that are running."""

from __future__ import annotations

from dataclasses import dataclass

from snapd_native.errors import AlreadyExists, FailedPrecondition
from snapd_native.metastore.records import Record
from snapd_native.model import quote


@dataclass(frozen=True, slots=True)
class Reservation:
    """A key or name that is held for one call, and what must stay until that call is done."""

    name: str
    id: int
    """The new snapshot's id; of a Commit, the id of the active one."""
    parent: Record | None
    committing: Record | None = None


class Reservations:
    """All of them, in memory: a crash releases them. Only one thread at a time may use them."""

    def __init__(self, first_id: int) -> None:
        """Give new snapshots ids from ``first_id`` on."""
        self._next_id = first_id
        self._held: dict[str, Reservation] = {}

    @property
    def last_id(self) -> int:
        """The highest id that was given so far."""
        return self._next_id - 1

    def skip(self, last_id: int) -> None:
        """Give no id up to ``last_id`` anymore."""
        self._next_id = max(self._next_id, last_id + 1)

    def ids(self) -> set[int]:
        """Return the ids of all."""
        return {held.id for held in self._held.values()}

    def hold(self, key: str, parent: Record | None) -> Reservation:
        """Hold ``key``, which is free, and an id for a new snapshot."""
        self._held[key] = made = Reservation(key, self._next_id, parent)
        self._next_id += 1
        return made

    def hold_commit(self, name: str, record: Record, parent: Record | None) -> Reservation:
        """Hold ``name``, which is free, for the active snapshot that is committed to it."""
        self._held[name] = made = Reservation(name, record.id, parent, record)
        return made

    def release(self, reservation: Reservation) -> None:
        """Give one up, unless it is given up already."""
        if self._held.get(reservation.name) is reservation:
            del self._held[reservation.name]

    def check_free(self, name: str, what: str) -> None:
        """Check that no call holds ``name``, which is ``what`` (key or name).

        Raises:
            AlreadyExists: somebody does.
        """
        if name in self._held:
            raise AlreadyExists(
                f"the {what} {quote(name)} is taken by a call that is still running:"
                " choose another or wait"
            )

    def check_not_committing(self, record: Record, doing: str) -> None:
        """Make sure that a snapshot is not being committed, before ``doing`` something to it.

        Raises:
            FailedPrecondition: it is.
        """
        if any(held.committing and held.id == record.id for held in self._held.values()):
            raise FailedPrecondition(
                f"cannot {doing} {quote(record.info.name)}: it is being committed,"
                " wait for that to end"
            )

    def is_parent(self, record: Record) -> bool:
        """Tell whether a snapshot is the parent of what will be one."""
        return any(held.parent and held.parent.id == record.id for held in self._held.values())
