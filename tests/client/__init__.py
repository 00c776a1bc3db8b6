"""`snapd_native.client`: the asynchronous and the blocking client."""
