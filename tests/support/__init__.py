"""Real buses, daemons, file systems and engines for tests, with ways to block and await them.

`README.md` in this directory lists the modules.
"""

from pathlib import Path

PROJECT = Path(__file__).parents[2]
"""The root of the repository."""
