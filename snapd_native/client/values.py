"""Values that describe the service and its work."""

from __future__ import annotations

from dataclasses import dataclass

from snapd_native.model import Usage


@dataclass(frozen=True, slots=True)
class Service:
    """The properties of the service."""

    version: str
    state_directory: str
    filesystem_type: str
    reflink: bool


@dataclass(frozen=True, slots=True)
class Standby:
    """The standby clones of a committed snapshot."""

    ready: int
    wanted: int


@dataclass(frozen=True, slots=True)
class Job:
    """A call that takes long."""

    id: int
    operation: str
    key: str
    uid: int
    """The user that has started it."""


@dataclass(frozen=True, slots=True)
class Progress:
    """The progress of a job."""

    done: Usage
    total: Usage
    """The work in all; zeros while it is unknown."""
