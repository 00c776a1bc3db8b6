"""The virtual machine in which `tests/vm` run: how it is made, kept and destroyed."""
