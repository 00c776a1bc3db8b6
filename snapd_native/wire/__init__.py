"""Names, values and the connection, which the service and its clients share."""
