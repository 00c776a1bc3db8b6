"""`snapd_native.bus`: the service side of D-Bus, jobs, mounts and polkit."""
