"""The digest that Commit records of a tree, for Verify."""

from __future__ import annotations

import re
from collections.abc import Mapping

from snapd_native.errors import FailedPrecondition, InvalidArgument
from snapd_native.metastore import Record
from snapd_native.model import DIGEST_LABEL, Info, Kind, check_labels, quote

_ALGORITHM = "sha256:"
_DIGEST = re.compile(r"sha256:[0-9a-f]{64}", re.ASCII)


def wanted(labels: Mapping[str, str], asked: bool) -> bool:
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


def recorded(key: str, labels: Mapping[str, str], found: str) -> dict[str, str]:
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


def of(record: Record) -> str:
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


def kept(info: Info, labels: Mapping[str, str], *, named: bool) -> Mapping[str, str]:
    """Return the ``labels`` of an Update with the recorded digest added.

    Raises:
        InvalidArgument: the Update changes the digest, or names its label in ``named`` to delete
            it.
    """
    if info.kind is not Kind.COMMITTED:
        return labels
    old = info.labels.get(DIGEST_LABEL, "")
    # A label without a digest is older than the feature, and may be deleted.
    digest = old if _DIGEST.fullmatch(old) else ""
    text = labels.get(DIGEST_LABEL, "")
    if text not in ("", old) or (named and digest and not text):
        raise InvalidArgument(
            f"the label {DIGEST_LABEL} of {quote(info.name)} cannot be changed: only Commit"
            " records a digest"
        )
    return {**labels, DIGEST_LABEL: digest} if digest else labels
