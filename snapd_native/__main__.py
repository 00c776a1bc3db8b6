"""``python -m snapd_native`` is the program ``snapd-native``."""

from snapd_native.cli import main

main()
