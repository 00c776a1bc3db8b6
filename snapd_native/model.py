"""The values of the contract, and the rules for names and labels."""

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
"""The label with the number of standby clones of a committed snapshot."""

DIGEST_LABEL = "snapd-native.digest"
"""The label with the digest of the tree. A Commit with this label records the digest."""

MAX_STANDBY = 64
"""Standby clones of one snapshot at most."""

MAX_LABELS = 1 << 20
"""Bytes of UTF-8 in all labels of one snapshot, so that every reply fits a message."""


class Lifetime(StrEnum):
    """How long a mount lasts; the value is its name on the wire."""

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
    """Something in ``snapshots`` is not the service's."""
    MOUNT = "mount"
    """The mounts and the ledger differ."""
    MODE = "mode"
    """Other users can access the state, or the tree of a committed snapshot can be changed."""


@dataclass(frozen=True, slots=True)
class Finding:
    """A fault that Check has found."""

    kind: Trouble
    key: str
    """The key or name of the snapshot; empty if the finding is not about one."""
    what: str
    """One sentence that says what to do."""


@dataclass(frozen=True, slots=True)
class Mounted:
    """A mount that the service has made."""

    target: str
    key: str
    read_only: bool
    lifetime: Lifetime
    uid: int
    """The user that called Mount."""


@dataclass(frozen=True, slots=True)
class Info:
    """The record of a snapshot. Times are microseconds since the Unix epoch, UTC."""

    name: str
    kind: Kind
    parent: str
    created: int
    updated: int
    labels: Mapping[str, str]


@dataclass(frozen=True, slots=True)
class Mount:
    """A mount of a snapshot, in the terms of mount(8)."""

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
    """Prepare or View has created a snapshot."""

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
    """The labels of a snapshot were changed."""

    name: str


@dataclass(frozen=True, slots=True)
class Removed:
    """A snapshot was removed."""

    key: str


Change = Added | Committed | Updated | Removed
"""A change that is durable."""


def shown(text: str) -> str:
    """Escape what is not printable, for a terminal, a log or a message.

    A backslash is not escaped: the text is for reading, not for parsing.
    """
    return "".join(
        char if char.isprintable() else char.encode("unicode_escape").decode("ascii")
        for char in text
    )


def quote(text: str, most: int = 80) -> str:
    """Quote a text of a caller for a message: escaped, and cut if it is long."""
    return f'"{shown(text if len(text) <= most else text[:most] + "…")}"'


def quote_path(path: str) -> str:
    """Quote a path for a message: escaped, and complete."""
    return quote(path, most=4096)


def check_name(name: str, what: str = "key") -> str:
    """Return ``name`` if it is a valid key or name.

    Raises:
        InvalidArgument: it is empty, over `MAX_NAME` bytes, or cannot be sent in a message.
    """
    if not name:
        raise InvalidArgument(f"the {what} is empty: give it 1 to {MAX_NAME} bytes")
    size = _size(what, name)
    if size > MAX_NAME:
        raise InvalidArgument(
            f"the {what} {quote(name, 40)} has {size} bytes: at most {MAX_NAME} are allowed"
        )
    return name


def is_text(text: object, most: int | None = None) -> bool:
    """Tell whether this is a text of at most ``most`` bytes that a message can contain."""
    if not isinstance(text, str):
        return False
    try:
        size = _size("text", text)
    except InvalidArgument:
        return False
    return most is None or size <= most


def is_name(name: object) -> bool:
    """Tell whether this is a valid key or name; see `check_name`."""
    return bool(name) and is_text(name, MAX_NAME)


def check_labels(labels: Mapping[str, str]) -> dict[str, str]:
    """Return the labels without those whose values are empty, as containerd stores them.

    See containerd's ``boltutil.WriteLabels``.

    Raises:
        InvalidArgument: a key is empty, a label cannot be sent in a message, a size is over
            `MAX_LABEL` or `MAX_LABELS`, or `STANDBY_LABEL` is not a number up to `MAX_STANDBY`.
    """
    total = 0
    for key, value in labels.items():
        if not key:
            raise InvalidArgument("a label has an empty key: name it")
        size = _size("label", key, value)
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


def _size(what: str, name: str, value: str = "") -> int:
    """Return the bytes of a name with its value, or raise if no message can contain them."""
    if "\0" in name + value:
        raise InvalidArgument(f"the {what} {quote(name)} contains a NUL character: leave it out")
    try:
        return len(name.encode()) + len(value.encode())
    except UnicodeEncodeError:
        raise InvalidArgument(f"the {what} {quote(name)} is not valid UTF-8: correct it") from None


def standby_number(labels: Mapping[str, str]) -> int:
    """Return how many standby clones the labels want.

    The number is 0 if the label is not a number: it can be older than the feature.
    """
    return _standby(labels) or 0


def _standby(labels: Mapping[str, str]) -> int | None:
    text = labels.get(STANDBY_LABEL, "")
    number = int(text) if re.fullmatch("[0-9]{1,2}", text) else None
    return number if number is None or number <= MAX_STANDBY else None
