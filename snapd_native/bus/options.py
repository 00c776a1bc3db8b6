"""The ``options`` argument of the contract's methods."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from dbus_next.signature import Variant

from snapd_native.errors import InvalidArgument
from snapd_native.model import quote


def unpack(options: Mapping[str, Variant], **signatures: str) -> dict[str, Any]:
    """Return the values of ``options``; ``signatures`` contains the valid ones with their types.

    A hyphen in the name of an option becomes an underscore.

    Raises:
        InvalidArgument: an option is unknown, or has another type.
    """
    values = {}
    types = {name.replace("_", "-"): signature for name, signature in signatures.items()}
    for name, variant in options.items():
        signature = types.get(name)
        if signature is None:
            known = ", ".join(sorted(types)) or "none"
            raise InvalidArgument(
                f"there is no option {quote(name)} here: leave it out (known: {known})"
            )
        if variant.signature != signature:
            raise InvalidArgument(
                f"the option {name} has the type {quote(variant.signature)}: give {signature}"
            )
        values[name.replace("-", "_")] = variant.value
    return values
