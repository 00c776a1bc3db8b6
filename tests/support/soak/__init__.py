"""Clients of the soak test, their books, and the gauges of the daemon."""
