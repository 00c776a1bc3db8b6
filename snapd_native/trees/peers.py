"""The interface by which the workers of one tree share the work."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol


class Peers(Protocol):
    """The other workers of the same tree.

    A directory is a tuple of the fds that the work needs. A worker does itself what no peer takes.
    """

    def are_idle(self) -> bool:
        """Tell whether a peer has nothing to do."""

    def take_directory(self, *directory: int) -> bool:
        """Offer everything below a directory; return whether a peer takes it."""

    def take_names(self, names: Sequence[str], *directory: int) -> bool:
        """Offer non-directories of a directory; return whether a peer takes them."""

    def finish(self) -> None:
        """Wait until peers have done all names that they have taken."""


class Work(Protocol):
    """The work on a tree. Its methods take the arguments of the methods of `Peers`."""

    @property
    def directory(self) -> Callable[..., None]:
        """Do everything below a directory that no peer takes."""

    @property
    def names(self) -> Callable[..., None]:
        """Do entries of a directory."""
