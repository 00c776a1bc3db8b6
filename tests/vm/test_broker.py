"""The service on dbus-broker, the system bus of Fedora and Arch Linux."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from snapd_native.wire.names import MANAGER
from tests.support.readme import shell_block
from tests.vm.authorization import is_denied, try_to_prepare
from tests.vm.guest import INSTANCES, Guest

BUS = f"busctl call org.snapdnative1 /org/snapdnative1 {MANAGER}"

pytestmark = pytest.mark.usefixtures("broker")


@pytest.fixture(scope="module")
def broker(machine: Guest) -> Iterator[None]:
    """Boot the machine with dbus-broker as its system bus, and then with dbus-daemon again."""
    policy = shell_block("broker")
    assert policy.endswith("systemctl reload dbus\n")
    for instance in filter(None, INSTANCES):
        machine.run(policy.replace("snapdnative1.data", f"snapdnative1.{instance}"))
    try:
        machine.run("systemctl enable -q dbus-broker")
        machine.reboot()
        assert machine.run("systemctl show -P Id dbus").strip() == "dbus-broker.service"
        yield
    finally:
        machine.run("systemctl disable -q dbus-broker; rm /etc/dbus-1/system.d/org.snapdnative1.*")
        machine.reboot()
        assert machine.run("systemctl show -P Id dbus").strip() == "dbus.service"


def test_the_busctl_calls_of_the_readme_work_on_dbus_broker(guest: Guest) -> None:
    out = guest.run(shell_block("calls"))
    assert 'a(ssas) 1 "bind" "/var/lib/snapd-native/snapshots/' in out


def test_each_instance_answers_with_a_policy_of_its_own(guest: Guest) -> None:
    for instance in INSTANCES:
        assert guest.run(f"snapd-native --instance '{instance}' check") == ""


def test_a_call_activates_the_service(guest: Guest) -> None:
    out = guest.run(f"""
        systemctl stop snapd-native
        {BUS} List 'asa{{sv}}' 0 0 >/dev/null
        systemctl is-active snapd-native""")
    assert out == "active\n"


def test_polkit_decides_what_a_user_may_do(guest_with_rule: Guest) -> None:
    assert try_to_prepare(guest_with_rule) == "allowed\n"
    assert is_denied(guest_with_rule, user="nobody")


def test_another_user_cannot_own_a_name_of_the_service(guest: Guest) -> None:
    ask = "busctl call org.freedesktop.DBus / org.freedesktop.DBus RequestName su"
    for name in ("org.snapdnative1", "org.snapdnative1.other"):
        outcome = guest.attempt(f"runuser -u nobody -- {ask} {name} 4")
        assert "denied" in outcome.stderr.lower(), outcome


LIFETIMES = """
import asyncio, os
from snapd_native.client import Client
from snapd_native.model import Lifetime

async def main():
    async with Client() as client:
        await client.prepare("theirs")
        await client.mount("theirs", lifetime=Lifetime.CLIENT)
        tree = await client.open_tree("theirs")
        print(len(await client.list_mounts("theirs")), os.listdir(f"/proc/self/fd/{tree}"))
        os.close(tree)
    async with Client() as client:
        while await client.list_mounts("theirs"):
            await asyncio.sleep(0.1)
        print("unmounted")
asyncio.run(main())
"""


def test_a_mount_ends_with_its_client_and_open_tree_returns_a_descriptor(guest: Guest) -> None:
    assert guest.run("python3 -", stdin=LIFETIMES).splitlines() == ["1 []", "unmounted"]


CONNECTIONS = """
import asyncio
from contextlib import AsyncExitStack
from snapd_native.client import Client

async def main():
    async with AsyncExitStack() as stack:
        clients = [await stack.enter_async_context(Client()) for _ in range(100)]
        for number, client in enumerate(clients):
            await client.prepare(str(number))
        print(len(await clients[0].list(limit=1000)))
asyncio.run(main())
"""


def test_a_hundred_connections_are_served(guest: Guest) -> None:
    assert guest.run("python3 -", stdin=CONNECTIONS) == "100\n"


CLIENT_THAT_DOES_NOT_READ = f"""
import asyncio
from dbus_next import BusType, Message
from dbus_next.aio import MessageBus

async def main():
    bus = await MessageBus(bus_type=BusType.SYSTEM).connect()
    # It reads nothing more.
    asyncio.get_running_loop().remove_reader(bus._fd)
    for _ in range(200):
        bus.send(Message(
            destination="org.snapdnative1", path="/org/snapdnative1", interface="{MANAGER}",
            member="List", signature="asa{{sv}}", body=[[], {{}}]))
    print("sent", flush=True)
    await asyncio.sleep(3600)
asyncio.run(main())
"""


def test_a_client_that_does_not_read_does_not_delay_other_clients(guest: Guest) -> None:
    """dbus-broker has no statistics by which the service limits what waits for a client."""
    guest.run("python3 -", stdin=CONNECTIONS)
    out = guest.run(
        f"""
        cat >/run/unread.py
        python3 /run/unread.py >/run/sent & reader=$!
        until grep -q sent /run/sent; do sleep 0.1; done
        for _ in 1 2 3; do {BUS} Stat s 1 | cut -d ' ' -f 1; done
        kill $reader
        {BUS} Remove 'sa{{sv}}' 1 0
        snapd-native check
        systemctl show -P NRestarts snapd-native
        rm /run/unread.py /run/sent""",
        stdin=CLIENT_THAT_DOES_NOT_READ,
    )
    assert out.split("\n")[-2] == "0", out
    assert out.count("(ssstta{ss})\n") == 3, out
