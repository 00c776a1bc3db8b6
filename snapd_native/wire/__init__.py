"""What service and clients share: names on the bus, values on the wire, and the connection."""
