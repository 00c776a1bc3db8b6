"""Describe the machine of the measurements."""

from __future__ import annotations

import os
import platform
import re
import subprocess
from pathlib import Path

import snapd_native


def machine(directory: Path, programs: list[str]) -> dict[str, str]:
    """Describe the machine, the disk below ``directory`` and the versions in use."""
    found = {
        "processor": f"{_processor()}, {os.cpu_count()} CPUs",
        "memory": _memory(),
        "kernel": f"Linux {platform.release().partition('-')[0]}",
        "disk": _disk(directory),
        "python": platform.python_version(),
        "snapd-native": snapd_native.__version__,
    }
    return found | {program: _version(program) for program in programs}


def _processor() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    models = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(models, platform.machine())


def _memory() -> str:
    pages = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return f"{pages / (1 << 30):.0f} GiB"


def _disk(directory: Path) -> str:
    """Name the file system of the images and, if known, its device."""
    source, kind = _output("findmnt", "-no", "SOURCE,FSTYPE", "-T", str(directory)).split()
    device = " ".join(_output("lsblk", "-dno", "NAME,SIZE,MODEL", source).split())
    return f"{kind} on {device or source}"


def _version(program: str) -> str:
    found = re.search(r"\d+\.\d[^\s,]*", _output(program, "--version"))
    return found.group() if found else "unknown"


def _output(*command: str) -> str:
    done = subprocess.run(command, check=False, capture_output=True, text=True)
    return done.stdout
