"""The service on a whole machine; pytest collects this only with --hosts, see docs."""
