"""The service on a whole machine; collected only where pytest is given one, see docs."""
