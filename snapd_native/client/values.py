"""Values that describe the service and its work."""

from __future__ import annotations

from dataclasses import dataclass

from snapd_native.model import Usage


@dataclass(frozen=True, slots=True)
class Service:
    """The service's properties."""

    version: str
    state_directory: str
    filesystem_type: str
    reflink: bool


@dataclass(frozen=True, slots=True)
class Standby:
    """Clones of a committed snapshot that make Prepare quick."""

    ready: int
    wanted: int


@dataclass(frozen=True, slots=True)
class Job:
    """Something long that the service does for somebody."""

    id: int
    operation: str
    key: str
    uid: int
    """The user that started it."""


@dataclass(frozen=True, slots=True)
class Progress:
    """How far a job is."""

    done: Usage
    total: Usage
    """Zeros while that is unknown."""
