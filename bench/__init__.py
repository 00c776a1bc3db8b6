"""Benchmarks, to be run by hand."""
