"""The service on the bus: its connection, dispatch, interface and authority."""
