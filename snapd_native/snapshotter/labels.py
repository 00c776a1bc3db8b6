"""What Update does to labels."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from snapd_native.errors import InvalidArgument
from snapd_native.model import check_labels, quote


def label_key(path: str) -> str | None:
    """Return the label that a field path names, or None for all."""
    if path == "labels":
        return None
    prefix, dot, key = path.partition(".")
    if prefix != "labels" or not dot or not key:
        raise InvalidArgument(
            f"the field path {quote(path)} cannot be updated: give labels or labels.KEY"
        )
    return key


def changed(
    old: Mapping[str, str], *, given: Mapping[str, str], keys: Sequence[str | None]
) -> Mapping[str, str]:
    """Return what is stored in place of ``old`` when the labels ``keys`` of ``given`` are set."""
    labels = dict(old)
    for key in keys:
        if key is None:
            labels = dict(given)
        elif key in given:
            labels[key] = given[key]
        else:
            labels.pop(key, None)
    return check_labels(labels)
