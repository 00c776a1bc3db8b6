"""Make mounts with the kernel's new mount API, find them, and tell which processes use them."""

from snapd_native.mounts.attach import MOVED, attach, detach, detached, make_read_only, restore
from snapd_native.mounts.processes import users, writers
from snapd_native.mounts.table import Entry, Place, Table, hidden_from_host
from snapd_native.mounts.targets import Target, open_target, plain

__all__ = [
    "MOVED",
    "Entry",
    "Place",
    "Table",
    "Target",
    "attach",
    "detach",
    "detached",
    "hidden_from_host",
    "make_read_only",
    "open_target",
    "plain",
    "restore",
    "users",
    "writers",
]
