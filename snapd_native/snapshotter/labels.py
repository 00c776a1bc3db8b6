"""What Commit and Update record in the labels of a snapshot, with the digest of its tree."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence

from snapd_native.errors import FailedPrecondition, InvalidArgument
from snapd_native.metastore import Record
from snapd_native.model import DIGEST_LABEL, Info, Kind, check_labels, quote

_ALGORITHM = "sha256:"
_DIGEST = re.compile(r"sha256:[0-9a-f]{64}", re.ASCII)


def wants_digest(labels: Mapping[str, str], asked: bool) -> bool:
    """Tell whether a Commit with ``labels`` records a digest.

    Raises:
        InvalidArgument: the label begins like a digest but is not one, or the labels leave no
            space for a digest.
    """
    text = labels.get(DIGEST_LABEL, "")
    if text.startswith(_ALGORITHM) and not _DIGEST.fullmatch(text):
        raise InvalidArgument(
            f"invalid value {quote(text)} of the label {DIGEST_LABEL}: give sha256: and 64"
            " hexadecimal digits, or any other text to have it recorded"
        )
    if not (asked or text):
        return False
    check_labels({**labels, DIGEST_LABEL: f"{_ALGORITHM}{0:064}"})
    return True


def with_digest(key: str, labels: Mapping[str, str], found: str) -> dict[str, str]:
    """Return the labels of a Commit of ``key`` with the digest added.

    Raises:
        FailedPrecondition: the label has another digest.
    """
    digest = _ALGORITHM + found
    expected = labels.get(DIGEST_LABEL, "")
    if expected.startswith(_ALGORITHM) and expected != digest:
        raise FailedPrecondition(
            f"cannot commit {quote(key)}: its digest is {digest}, not {expected}: repair its tree,"
            " or commit it with another label"
        )
    return {**labels, DIGEST_LABEL: digest}


def recorded_digest(record: Record) -> str:
    """Return the digest that Commit has recorded.

    Raises:
        FailedPrecondition: it has recorded none.
    """
    text = record.info.labels.get(DIGEST_LABEL, "")
    if record.info.kind is not Kind.COMMITTED or not _DIGEST.fullmatch(text):
        raise FailedPrecondition(
            f"cannot verify {quote(record.info.name)}: no digest was recorded when it was"
            " committed, commit the next one with the option digest"
        )
    return text.removeprefix(_ALGORITHM)


def update_of(
    labels: Mapping[str, str], fieldpaths: Sequence[str]
) -> Callable[[Info], Mapping[str, str]]:
    """Return a function that applies an Update to a record, and returns the new labels.

    Raises:
        InvalidArgument: a label or a path is invalid. The function raises it if the labels become
            too large, or if the recorded digest would change or is named to be deleted.
    """
    given = check_labels(labels)
    keys = [_label_key(path) for path in fieldpaths or ("labels",)]

    def updated(info: Info) -> Mapping[str, str]:
        new = dict(info.labels)
        for key in keys:
            if key is None:
                new = dict(given)
            elif key in given:
                new[key] = given[key]
            else:
                new.pop(key, None)
        if info.kind is Kind.COMMITTED:
            _keep_digest(info, new, named=DIGEST_LABEL in keys)
        return check_labels(new)

    return updated


def _label_key(path: str) -> str | None:
    """Return the key of the label that a field path names; None means all labels."""
    if path == "labels":
        return None
    prefix, dot, key = path.partition(".")
    if prefix != "labels" or not dot or not key:
        raise InvalidArgument(
            f"the field path {quote(path)} cannot be updated: give labels or labels.KEY"
        )
    return key


def _keep_digest(info: Info, new: dict[str, str], *, named: bool) -> None:
    old = info.labels.get(DIGEST_LABEL, "")
    # A label without a digest is older than the feature, and may be deleted.
    digest = old if _DIGEST.fullmatch(old) else ""
    text = new.get(DIGEST_LABEL, "")
    if text not in ("", old) or (named and digest and not text):
        raise InvalidArgument(
            f"the label {DIGEST_LABEL} of {quote(info.name)} cannot be changed: only Commit"
            " records a digest"
        )
    if digest:
        new[DIGEST_LABEL] = digest
