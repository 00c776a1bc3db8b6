"""Filters, messages, manual pages, units: no root, no bus, no file system of its own."""
