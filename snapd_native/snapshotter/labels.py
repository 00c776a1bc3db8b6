"""Apply the field paths of Update to labels."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from snapd_native.errors import InvalidArgument
from snapd_native.model import DIGEST_LABEL, Info, check_labels, quote
from snapd_native.snapshotter import digests


def label_key(path: str) -> str | None:
    """Return the key of the label that a field path names; None means all labels."""
    if path == "labels":
        return None
    prefix, dot, key = path.partition(".")
    if prefix != "labels" or not dot or not key:
        raise InvalidArgument(
            f"the field path {quote(path)} cannot be updated: give labels or labels.KEY"
        )
    return key


def changed(
    old: Info, *, given: Mapping[str, str], keys: Sequence[str | None]
) -> Mapping[str, str]:
    """Return the labels after an Update: the ``keys`` are taken from ``given``."""
    labels = dict(old.labels)
    for key in keys:
        if key is None:
            labels = dict(given)
        elif key in given:
            labels[key] = given[key]
        else:
            labels.pop(key, None)
    return check_labels(digests.kept(old, labels, named=DIGEST_LABEL in keys))
