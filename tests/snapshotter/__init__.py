"""`snapd_native.snapshotter`: the engine as a Python library, without a bus."""
