"""The release of Debian in the machine."""

from __future__ import annotations

import os

from tools.vm.steps import StepError

SUITES = {"12": "bookworm", "13": "trixie"}
"""Code names by version."""


def suite() -> str:
    """Return the code name of the release that ``VM_DEBIAN`` names; the default is Debian 13.

    Raises:
        StepError: it names another release.
    """
    release = os.environ.get("VM_DEBIAN") or "13"
    if release not in SUITES:
        raise StepError(f"VM_DEBIAN is {release}: set it to {' or '.join(SUITES)}")
    return SUITES[release]
