"""Fixtures of the machine that `tools/vm` names with --hosts and --ssh-config."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.vm.authorization import POLKIT_RULE, RULE_FILE
from tests.vm.guest import Guest, remove_all
from tests.vm.plugin import containerd

__all__ = ["containerd"]

LAST = ("test_powercut", "test_package")
"""The modules that run last: one cuts the power repeatedly, the other removes the package."""

ONLY_ON_13 = ("test_broker", "test_docker")
"""The modules that are not for Debian 12."""

TEST_LIMIT = 3600
"""Seconds after which a test that hangs fails; its steps have their own limit."""


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--cuts", type=int, default=3, help="how often the power of a machine is cut")
    parser.addoption("--domain", default="snapd-native-test_default", help="of libvirt")


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    """Without a machine there is nothing to test.

    dbus-broker and Docker are tested on Debian 13: the dbus-broker of Debian 12 is older than those
    of its distributions, and its Docker cannot use containerd's snapshots.
    """
    if not config.getoption("--hosts", None):
        return True
    is_old = os.environ.get("VM_DEBIAN") == "12"
    return True if is_old and collection_path.stem in ONLY_ON_13 else None


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    def turn(item: pytest.Item) -> int:
        return LAST.index(item.path.stem) if item.path.stem in LAST else -1

    items.sort(key=turn)
    for item in items:
        item.add_marker(pytest.mark.timeout(TEST_LIMIT))


@pytest.fixture(scope="session")
def machine(request: pytest.FixtureRequest) -> Iterator[Guest]:
    """Yield the machine, without mounts and snapshots."""
    ssh_config = Path(request.config.getoption("--ssh-config")).absolute()
    guest = Guest(str(ssh_config), request.config.getoption("--domain"))
    guest.connect()
    # In a machine that was kept, an interrupted run can have left mounts and snapshots.
    remove_all(guest)
    yield guest
    guest.disconnect()


@pytest.fixture
def guest(machine: Guest) -> Iterator[Guest]:
    """Yield the machine, and remove all mounts and snapshots afterwards."""
    yield machine
    remove_all(machine)


@pytest.fixture
def guest_with_rule(guest: Guest) -> Iterator[Guest]:
    """Yield a machine with a polkit rule that lets one user manage snapshots."""
    guest.run(f"cat >{RULE_FILE}; systemctl restart polkit", stdin=POLKIT_RULE)
    yield guest
    guest.run(f"rm -f {RULE_FILE}; systemctl restart polkit")
