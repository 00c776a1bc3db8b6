"""The program ``snapd-native``."""

from snapd_native.cli.main import main

__all__ = ["main"]
