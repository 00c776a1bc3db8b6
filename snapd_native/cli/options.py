"""Options and the connection that several commands share."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import click

from snapd_native.errors import InvalidArgument
from snapd_native.model import quote

if TYPE_CHECKING:
    from snapd_native.client import BlockingClient

json_option = click.option("--json", "as_json", is_flag=True, help="Print JSON.")

labels_option = click.option(
    "-l",
    "--label",
    "labels",
    multiple=True,
    metavar="KEY=VALUE",
    help="Set a label; can be given several times.",
)


@contextmanager
def connected() -> Iterator[BlockingClient]:
    """Connect to the instance of the command line."""
    from snapd_native.client import BlockingClient

    try:
        with BlockingClient(click.get_current_context().obj) as client:
            yield client
    except KeyboardInterrupt:
        raise click.Abort from None


def parsed_labels(texts: tuple[str, ...]) -> dict[str, str]:
    """Parse labels.

    Raises:
        InvalidArgument: a text is not ``KEY=VALUE``.
    """
    labels = {}
    for text in texts:
        key, equals, value = text.partition("=")
        if not equals or not key:
            raise InvalidArgument(f"{quote(text)} is no label: write KEY=VALUE")
        labels[key] = value
    return labels
