"""`snapd_native.daemon` and `snapd_native.logs`: start, stop, systemd and the journal."""
