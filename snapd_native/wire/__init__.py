"""Shared by the service and its clients: names on the bus, values on the wire, the connection."""
