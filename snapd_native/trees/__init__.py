"""Directory trees: clone, measure and delete them.

A tree is walked by directory file descriptors only, so names are never joined to paths, links
are never followed, and depth has no limit. A tree is opened by `open_tree`, which shows it without
anything that is mounted inside it.
"""

from snapd_native.trees.crew import Crew
from snapd_native.trees.delete import delete
from snapd_native.trees.opened import open_tree, reflink_works
from snapd_native.trees.walk import Report

__all__ = ["Crew", "Report", "delete", "open_tree", "reflink_works"]
