"""The package of containerd's plugin in the machine."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.support.readme import code_blocks
from tests.vm.guest import Guest

UNIT = "snapd-native-containerd"
PACKAGE = f"$(ls -t /vagrant/dist/{UNIT}_*_all.deb | head -n 1)"


@pytest.fixture(scope="module")
def containerd(machine: Guest) -> Iterator[None]:
    """Install the package in the machine, and run containerd with the documented configuration."""
    (configuration,) = (block for block in code_blocks("toml") if block.startswith("version = 2\n"))
    machine.run(
        f"""
        dpkg -i {PACKAGE} </dev/null >/dev/null
        mkdir -p /etc/containerd
        touch /etc/containerd/config.toml
        cp -p /etc/containerd/config.toml /var/tmp/config.toml
        cat >/etc/containerd/config.toml
        systemctl restart containerd""",
        stdin=configuration,
    )
    try:
        yield
    finally:
        machine.run(f"""
            systemctl stop containerd
            mv /var/tmp/config.toml /etc/containerd/config.toml
            dpkg -P {UNIT} >/dev/null 2>&1""")
