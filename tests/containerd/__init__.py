"""The snapshots plugin of containerd, by its socket and under real containerds."""
