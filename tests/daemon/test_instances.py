"""Several daemons with instance names on one bus, under the shipped bus policy."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from snapd_native.client import BlockingClient
from snapd_native.errors import InvalidArgument, Unavailable
from snapd_native.private import private_bus, private_daemon
from tests.support import PROJECT
from tests.support.command_line import run_program
from tests.support.service import NOBODY, as_user, expect_error

BAD_NAMES = ["a-b", "9a", "a.b", "a b", "ü", "a/b", "..", "a" * 65, "a\n"]


@pytest.fixture(scope="module")
def instances(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Run the service and its instances ``one`` and ``two``."""
    with ExitStack() as stack:
        address = stack.enter_context(private_bus([PROJECT / "dbus" / "org.snapdnative1.conf"]))
        for instance in ("", "one", "two"):
            state = tmp_path_factory.mktemp("state") / instance
            stack.enter_context(private_daemon(address, state, instance=instance))
        yield address


@pytest.fixture
def address(instances: str, monkeypatch: pytest.MonkeyPatch) -> str:
    """Make the bus of `instances` the system bus of the test, and return its address."""
    monkeypatch.setenv("DBUS_SYSTEM_BUS_ADDRESS", instances)
    return instances


@pytest.mark.usefixtures("address")
def test_each_instance_has_its_own_snapshots() -> None:
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


@pytest.mark.usefixtures("address")
def test_the_program_takes_the_instance_from_its_option_or_the_environment() -> None:
    assert run_program("--instance", "one", "prepare", "by option").returncode == 0
    assert "by option" in run_program("ls", environment={"SNAPD_NATIVE_INSTANCE": "one"}).stdout
    assert (
        "by option"
        in run_program(
            "--instance", "one", "ls", environment={"SNAPD_NATIVE_INSTANCE": "two"}
        ).stdout
    )
    assert "by option" not in run_program("ls", environment={"SNAPD_NATIVE_INSTANCE": "two"}).stdout
    assert "by option" not in run_program("ls", environment={"SNAPD_NATIVE_INSTANCE": ""}).stdout
    assert (
        run_program("rm", "by option", environment={"SNAPD_NATIVE_INSTANCE": "one"}).returncode == 0
    )


@pytest.mark.usefixtures("address")
def test_a_call_to_a_stopped_instance_raises_unavailable() -> None:
    with (
        BlockingClient("three") as client,
        expect_error(Unavailable, "systemctl start snapd-native@three"),
    ):
        client.stat("key")


@pytest.mark.parametrize("name", BAD_NAMES)
def test_a_bad_instance_name_raises_invalid_argument(name: str, tmp_path: Path) -> None:
    with expect_error(InvalidArgument, "letters"):
        BlockingClient(name)
    outcome = run_program(
        *("--instance", name, "daemon", "--state-directory", str(tmp_path / "state")),
        environment={"DBUS_SYSTEM_BUS_ADDRESS": "unix:path=/nowhere"},
    )
    assert outcome.returncode == 3
    (line,) = outcome.stderr.splitlines()
    assert line.startswith("snapd-native: invalid instance")
    assert not (tmp_path / "state").exists()


@pytest.mark.parametrize("name", ["org.snapdnative1", "org.snapdnative1.one"])
def test_another_user_cannot_own_a_bus_name_of_the_daemon(address: str, name: str) -> None:
    """They cannot own a name that no service owns yet either."""
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


@pytest.mark.usefixtures("address")
def test_the_bus_policy_delivers_the_calls_of_every_user() -> None:
    for arguments in (["ls"], ["--instance", "one", "ls"]):
        outcome = run_program(*arguments, user=NOBODY)
        assert outcome.returncode == 11
        assert f"uid {NOBODY}" in outcome.stderr
