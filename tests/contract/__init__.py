"""The promises of the D-Bus interface, over a real bus: every call, error and order of checks."""
