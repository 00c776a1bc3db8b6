"""`snapd_native.mounts` and the mounter: mounts, their targets and their users."""
