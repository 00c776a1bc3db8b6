"""Random calls of the fuzz tests, and the connection that sends them."""
