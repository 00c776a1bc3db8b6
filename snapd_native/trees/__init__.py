"""Directory trees: clone, measure, seal and delete them.

All functions work on file descriptors of directories. They never join names to paths and never
follow links, and the depth of a tree has no limit. `open_tree` opens a tree without the mounts
inside it.
"""

from snapd_native.trees.crew import Crew
from snapd_native.trees.delete import delete
from snapd_native.trees.opened import open_tree, reflink_works
from snapd_native.trees.seal import seal, sealing_works, unseal
from snapd_native.trees.walk import Report

__all__ = [
    "Crew",
    "Report",
    "delete",
    "open_tree",
    "reflink_works",
    "seal",
    "sealing_works",
    "unseal",
]
