"""The words of the contract as plain values, and the rules for what a caller may name."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum

from snapd_native.errors import InvalidArgument

MAX_NAME = 4096
"""Bytes of UTF-8 in a key or name."""

MAX_LABEL = 4096
"""Bytes of UTF-8 in a label's key and value together, as in containerd's ``labels.Validate``."""

STANDBY_LABEL = "snapd-native.standby"
"""The label that says how many clones of a committed snapshot are kept ready."""

DIGEST_LABEL = "snapd-native.digest"
"""The label that asks Commit for a digest of the tree, and holds it from then on."""

MAX_STANDBY = 64
"""Clones of one snapshot that may be kept ready."""

MAX_LABELS = 1 << 20
"""Bytes of UTF-8 in all labels of one snapshot, so that every answer fits a bus message."""


class Lifetime(StrEnum):
    """How long a mount stands; the value is its name on the wire."""

    PERSISTENT = "persistent"
    """Until it is unmounted, also over a restart of the machine."""
    CLIENT = "client"
    """Until the client that called Mount leaves the bus."""


class Kind(StrEnum):
    """The kind of a snapshot; the value is its name on the wire."""

    VIEW = "view"
    ACTIVE = "active"
    COMMITTED = "committed"


class Trouble(StrEnum):
    """The subject of a finding; the value is its name on the wire."""

    DATABASE = "database"
    """The database is damaged, or breaks its own rules."""
    TREE = "tree"
    """A snapshot's directory is gone."""
    ORPHAN = "orphan"
    """A directory is no snapshot's."""
    LEFTOVER = "leftover"
    """The directory of a removed snapshot could not be deleted."""
    FOREIGN = "foreign"
    """Something lies among the directories that the service did not make."""
    MOUNT = "mount"
    """A mount and what the ledger says of it differ."""
    MODE = "mode"
    """Somebody else may reach the state."""


@dataclass(frozen=True, slots=True)
class Finding:
    """Something that is not as it should be."""

    kind: Trouble
    key: str
    """The snapshot's; nothing where it is not about one."""
    what: str
    """One sentence that says what to do."""


@dataclass(frozen=True, slots=True)
class Mounted:
    """A snapshot that the service has mounted."""

    target: str
    key: str
    read_only: bool
    lifetime: Lifetime
    uid: int
    """The user that called Mount."""


@dataclass(frozen=True, slots=True)
class Info:
    """A snapshot's record. Times are microseconds since the Unix epoch, UTC."""

    name: str
    kind: Kind
    parent: str
    created: int
    updated: int
    labels: Mapping[str, str]


@dataclass(frozen=True, slots=True)
class Mount:
    """A mount that makes a snapshot usable, as mount(8) would take it."""

    type: str
    source: str
    options: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Usage:
    """Allocated bytes and inodes; a hard-linked file counts once."""

    size: int
    inodes: int


@dataclass(frozen=True, slots=True)
class Added:
    """A key came to be by Prepare or View."""

    key: str
    kind: Kind
    parent: str


@dataclass(frozen=True, slots=True)
class Committed:
    """The active snapshot ``key`` became the committed snapshot ``name``."""

    name: str
    key: str


@dataclass(frozen=True, slots=True)
class Updated:
    """A snapshot's labels were set."""

    name: str


@dataclass(frozen=True, slots=True)
class Removed:
    """A key or name is gone."""

    key: str


Change = Added | Committed | Updated | Removed
"""Something that happened, and is durable."""


def shown(text: str) -> str:
    """Make text safe for a terminal, a log or a message: what is not printable is escaped.

    A backslash stays as it is: the text is for reading, not for parsing.
    """
    return "".join(
        char if char.isprintable() else char.encode("unicode_escape").decode("ascii")
        for char in text
    )


def quote(text: str, most: int = 80) -> str:
    """Show a caller's text inside a one-line message: escaped, and cut at the end."""
    return f'"{shown(text if len(text) <= most else text[:most] + "…")}"'


def quote_path(path: str) -> str:
    """Show a path inside a one-line message: escaped, and whole."""
    return quote(path, most=4096)


def check_name(name: str, what: str = "key") -> str:
    """Return ``name`` if it can name a snapshot.

    Raises:
        InvalidArgument: it is empty, over `MAX_NAME` bytes, or no text that UTF-8 can carry.
    """
    if not name:
        raise InvalidArgument(f"the {what} is empty: give it 1 to {MAX_NAME} bytes")
    try:
        size = len(name.encode())
    except UnicodeEncodeError:
        raise InvalidArgument(
            f"the {what} {quote(name)} is not valid UTF-8: choose another"
        ) from None
    if size > MAX_NAME:
        raise InvalidArgument(
            f"the {what} {quote(name, 40)} has {size} bytes: at most {MAX_NAME} are allowed"
        )
    if "\0" in name:
        raise InvalidArgument(f"the {what} {quote(name)} contains a NUL character: leave it out")
    return name


def is_text(text: object, most: int | None = None) -> bool:
    """Tell whether this is a text of at most ``most`` bytes that a message may carry."""
    if not isinstance(text, str) or "\0" in text:
        return False
    try:
        size = len(text.encode())
    except UnicodeEncodeError:
        return False
    return most is None or size <= most


def is_name(name: object) -> bool:
    """Tell whether this can name a snapshot; see `check_name`."""
    return bool(name) and is_text(name, MAX_NAME)


def check_labels(labels: Mapping[str, str]) -> dict[str, str]:
    """Return the labels that would be stored: a label with an empty value is as good as none.

    That rule is containerd's ``boltutil.WriteLabels``.

    Raises:
        InvalidArgument: a label's key is empty, a label is no text that a message may carry, a size
            is over `MAX_LABEL` or `MAX_LABELS`, or `STANDBY_LABEL` is no number up to
            `MAX_STANDBY`.
    """
    total = 0
    for key, value in labels.items():
        if not key:
            raise InvalidArgument("a label has an empty key: name it")
        if "\0" in key + value:
            raise InvalidArgument(f"the label {quote(key)} contains a NUL character: leave it out")
        try:
            size = len(key.encode()) + len(value.encode())
        except UnicodeEncodeError:
            raise InvalidArgument(f"the label {quote(key)} is not valid UTF-8: mend it") from None
        if size > MAX_LABEL:
            raise InvalidArgument(
                f"the label {quote(key, 40)} has {size} bytes with its value:"
                f" at most {MAX_LABEL} are allowed"
            )
        total += size
    if total > MAX_LABELS:
        raise InvalidArgument(
            f"the labels have {total} bytes in all: at most {MAX_LABELS} are allowed"
        )
    if labels.get(STANDBY_LABEL) and _standby(labels) is None:
        raise InvalidArgument(
            f"invalid value {quote(labels[STANDBY_LABEL])} of the label {STANDBY_LABEL}:"
            f" give 0 to {MAX_STANDBY}"
        )
    return {key: value for key, value in labels.items() if value}


def standby_number(labels: Mapping[str, str]) -> int:
    """Return how many standby clones labels ask for.

    None are where the label says anything else, as it could before it had a meaning.
    """
    return _standby(labels) or 0


def _standby(labels: Mapping[str, str]) -> int | None:
    text = labels.get(STANDBY_LABEL, "")
    number = int(text) if re.fullmatch("[0-9]{1,2}", text) else None
    return number if number is None or number <= MAX_STANDBY else None
