"""How the workers of one tree share the work."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol


class Peers(Protocol):
    """The others who work on the same tree.

    A directory is a tuple of the fds that the work needs. A worker does itself what no peer takes.
    """

    def are_idle(self) -> bool:
        """Tell whether any of them has nothing to do."""

    def take_directory(self, *directory: int) -> bool:
        """Offer everything in a directory; tell whether somebody does it."""

    def take_names(self, names: Sequence[str], *directory: int) -> bool:
        """Offer entries of a directory, none of which is one; tell whether somebody does them."""

    def finish(self) -> None:
        """Return when all names that they have taken are done."""


class Work(Protocol):
    """The work on a tree; its methods take the arguments that `Peers` takes."""

    @property
    def directory(self) -> Callable[..., None]:
        """Does everything in a directory but what peers take."""

    @property
    def names(self) -> Callable[..., None]:
        """Does entries of a directory."""
