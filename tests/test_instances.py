"""Several services on one bus, told apart by name, under the policy that is shipped."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from snapd_native.client import BlockingClient
from snapd_native.errors import InvalidArgument, Unavailable
from snapd_native.private import private_bus, private_daemon
from tests.service import NOBODY, as_user, refused

ROOT = Path(__file__).parent.parent

BAD_NAMES = ["a-b", "9a", "a.b", "a b", "ü", "a/b", "..", "a" * 65, "a\n"]


@pytest.fixture(scope="module")
def address(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Run the service and its instances ``one`` and ``two``."""
    with ExitStack() as stack:
        address = stack.enter_context(private_bus([ROOT / "dbus" / "org.snapdnative1.conf"]))
        for instance in ("", "one", "two"):
            state = tmp_path_factory.mktemp("state") / instance
            stack.enter_context(private_daemon(address, state, instance=instance))
        yield address


def program(
    address: str, *arguments: str, instance: str = "", user: int = 0
) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [*as_user(user), sys.executable, "-m", "snapd_native", *arguments],
        env={
            **os.environ,
            "DBUS_SYSTEM_BUS_ADDRESS": address,
            "SNAPD_NATIVE_INSTANCE": instance,
        },
        capture_output=True,
        text=True,
        check=False,
        cwd=ROOT,
    )


def test_each_has_snapshots_of_its_own(address: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DBUS_SYSTEM_BUS_ADDRESS", address)
    instances = ("", "one", "two")
    clients = {instance: BlockingClient(instance) for instance in instances}
    with ExitStack() as stack:
        for instance, client in clients.items():
            stack.enter_context(client).prepare("key", labels={"instance": instance or "none"})
        assert len({client.service().state_directory for client in clients.values()}) == 3
        for instance, client in clients.items():
            assert client.stat("key").labels == {"instance": instance or "none"}
            client.commit("base", "key", progress=lambda _: None)
            client.remove("base")


def test_the_program_speaks_to_the_one_that_is_named(address: str) -> None:
    assert program(address, "--instance", "one", "prepare", "by option").returncode == 0
    assert "by option" in program(address, "ls", instance="one").stdout
    assert "by option" in program(address, "--instance", "one", "ls", instance="two").stdout
    assert "by option" not in program(address, "ls", instance="two").stdout
    assert "by option" not in program(address, "ls").stdout
    assert program(address, "rm", "by option", instance="one").returncode == 0


def test_one_that_does_not_run(address: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DBUS_SYSTEM_BUS_ADDRESS", address)
    with (
        BlockingClient("three") as client,
        refused(Unavailable, "systemctl start snapd-native@three"),
    ):
        client.stat("key")


@pytest.mark.parametrize("name", BAD_NAMES)
def test_a_name_that_cannot_be(name: str, tmp_path: Path) -> None:
    with refused(InvalidArgument, "letters"):
        BlockingClient(name)
    outcome = program(
        "unix:path=/nowhere",
        *("--instance", name, "daemon", "--state-directory", str(tmp_path / "state")),
    )
    assert outcome.returncode == 3
    (line,) = outcome.stderr.splitlines()
    assert line.startswith("snapd-native: the instance")
    assert not (tmp_path / "state").exists()


@pytest.mark.parametrize("name", ["org.snapdnative1", "org.snapdnative1.one"])
def test_nobody_else_may_own_a_name(address: str, name: str) -> None:
    """Nor one that no service has taken yet."""
    for wanted in (name, f"{name}.more"):
        outcome = subprocess.run(
            [
                *as_user(NOBODY),
                *("busctl", f"--address={address}", "call", "org.freedesktop.DBus"),
                *("/org/freedesktop/DBus", "org.freedesktop.DBus", "RequestName", "su"),
                *(wanted, "0"),
            ],
            capture_output=True,
            text=True,
            check=False,
        )
        assert outcome.returncode != 0
        assert "Access denied" in outcome.stderr


def test_the_policy_lets_everybody_be_judged(address: str) -> None:
    for arguments in (["ls"], ["--instance", "one", "ls"]):
        outcome = program(address, *arguments, user=NOBODY)
        assert outcome.returncode == 11
        assert f"uid {NOBODY}" in outcome.stderr
