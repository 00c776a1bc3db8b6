"""`snapd_native.trees`: clone, measure, digest and delete directory trees."""
