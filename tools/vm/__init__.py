"""Make, keep and destroy the virtual machine in which `tests/vm` run."""
