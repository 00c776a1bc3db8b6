"""Compile the messages of the containerd plugin when a wheel is built."""

import subprocess
import sys

from setuptools import setup
from setuptools.command.build_py import build_py


class Build(build_py):
    """Builds the package with what tools/protocol generates."""

    def run(self) -> None:
        """Build, then compile."""
        super().run()
        if not self.editable_mode:
            subprocess.run(["tools/protocol", sys.executable, self.build_lib], check=True)


setup(cmdclass={"build_py": Build})
