"""Shared by the tests: real buses, daemons, file systems, engines, and ways to hold and await them.

`README.md` beside this file says what is where.
"""

from pathlib import Path

PROJECT = Path(__file__).parents[2]
"""The root of the repository."""
