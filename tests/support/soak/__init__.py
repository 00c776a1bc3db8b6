"""Clients of the soak test, the state that they expect, and measurements of the daemon."""
