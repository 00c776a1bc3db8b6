"""`snapd_native.metastore`: records, reservations and SQLite."""
