"""`snapd_native.mounts` and the mounter of the engine: what is mounted where, and what uses it."""
