"""`snapd_native.cli`: the commands, as real processes."""
