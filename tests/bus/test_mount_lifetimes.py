"""Mount lifetimes: mounts that end with their client, and mounts that persist."""

from __future__ import annotations

import asyncio
import signal
import subprocess
import sys
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import (
    ExitStack,
    asynccontextmanager,
    contextmanager,
)
from pathlib import Path
from typing import TypeVar

import pytest
from dbus_next.constants import MessageType
from dbus_next.message import Message
from dbus_next.signature import Variant

from snapd_native import daemon
from snapd_native.client import BlockingClient
from snapd_native.errors import Unavailable
from snapd_native.model import Lifetime
from snapd_native.private import private_bus
from tests.support.bus_mounts import (
    MOUNT,
    UNMOUNT,
    is_unmounted,
    list_mounts,
    populate_service,
)
from tests.support.file_systems import on_ext4
from tests.support.kernel_mounts import make_target, mounted_on, mounts_below, run_process_in
from tests.support.service import (
    Service,
    call_method,
    connection,
    run_daemon,
)
from tests.support.waiting import wait_until, wait_until_equal

pytestmark = on_ext4

T = TypeVar("T")

CLIENT_WITH_MOUNT = """
import os, sys
from snapd_native.client import BlockingClient
from snapd_native.model import Lifetime
with BlockingClient() as client:
    client.mount("work", sys.argv[1], lifetime=Lifetime.CLIENT)
    if sys.argv[2] == "inside":
        os.chdir(sys.argv[1])
    print(flush=True)
    input()
"""


@contextmanager
def run_client_with_mount(target: Path, how: str = "") -> Iterator[subprocess.Popen[bytes]]:
    """Run a client with a client mount at ``target``; with ``how`` "inside", it works in there."""
    with subprocess.Popen(
        [sys.executable, "-c", CLIENT_WITH_MOUNT, str(target), how],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    ) as process:
        try:
            assert process.stdout
            assert process.stdout.readline() == b"\n"
            yield process
        finally:
            process.kill()


@pytest.mark.parametrize("how", ["ends", "is killed", "inside"])
def test_a_client_mount_is_unmounted_when_its_client_leaves(
    populated_service: Service, places: Path, how: str
) -> None:
    here = make_target(places)
    with run_client_with_mount(here, how) as client:
        assert list_mounts() == [[str(here), "work", False, "client", 0]]
        if how == "ends":
            client.communicate(b"\n")
            assert client.returncode == 0
        else:
            client.kill()
            client.wait()
        wait_until(lambda: is_unmounted(here))
    assert list(here.iterdir()) == []
    call_method("Remove", "sa{sv}", "work", {})


def test_a_client_mount_is_unmounted_while_another_process_uses_it(
    populated_service: Service, places: Path
) -> None:
    here = make_target(places)
    with (
        run_client_with_mount(here) as client,
        run_process_in(here) as cat,
    ):
        client.kill()
        client.wait()
        wait_until(lambda: is_unmounted(here))
        assert cat.poll() is None
        assert Path(f"/proc/{cat.pid}/cwd/file").read_text() == "text"
    call_method("Remove", "sa{sv}", "work", {})


def test_only_the_client_mounts_of_a_leaving_client_are_unmounted(
    populated_service: Service, shared_client: BlockingClient, places: Path
) -> None:
    made = [make_target(places, f"{number}") for number in range(20)]
    kept, others = str(make_target(places, "kept")), str(make_target(places, "other"))
    shared_client.mount("work", others, lifetime=Lifetime.CLIENT)
    with BlockingClient() as client:
        client.mount("work", kept)
        for target in made:
            client.mount("look", str(target), lifetime=Lifetime.CLIENT)
        client.mount("look", lifetime=Lifetime.CLIENT)
        assert len(list_mounts()) == 23
    wait_until(lambda: len(list_mounts()) == 2)
    assert mounts_below(places) == [others, kept]


def test_a_client_that_leaves_during_mount_leaves_no_mount(
    populated_service: Service, places: Path
) -> None:
    made = [str(make_target(places, f"{number}")) for number in range(60)]
    options = {"lifetime": Variant("s", "client")}

    async def scenario() -> None:
        for number in range(0, len(made), 3):
            async with connection() as bus:
                calls = [
                    asyncio.ensure_future(
                        bus.ask(member="Mount", signature=MOUNT, body=["work", target, options])
                    )
                    for target in made[number : number + 3]
                ]
                # Alternately wait for the first reply, or only until the bus has the calls.
                if number % 2:
                    await asyncio.wait(calls, return_when=asyncio.FIRST_COMPLETED)
                else:
                    await bus.ask_driver("GetId", "", [])
            await asyncio.gather(*calls, return_exceptions=True)

    asyncio.run(scenario())
    # The daemon unmounts for this client after it has unmounted for all clients before.
    last = make_target(places, "last")
    with run_client_with_mount(last, "is killed"):
        pass
    wait_until(lambda: is_unmounted(last) and mounts_below(places) == [])


@pytest.mark.parametrize("meanwhile", [False, True])
def test_a_client_mount_stays_when_the_daemon_is_killed_and_ends_with_its_client(
    on_bus: str, scratch: Path, places: Path, meanwhile: bool
) -> None:
    here, state = make_target(places), scratch / "state"
    with ExitStack() as stack:
        with run_daemon(on_bus, state, status=-signal.SIGKILL) as service:
            with BlockingClient() as client:
                populate_service(client)
            holder = stack.enter_context(run_client_with_mount(here))
            before = mounted_on(here)
            service.daemon.process.kill()
            service.daemon.process.wait()
            assert before
            assert mounted_on(here) == before
        if meanwhile:
            stack.close()
            assert mounted_on(here) == before
        with run_daemon(on_bus, state):
            if not meanwhile:
                # The start is complete when the daemon unmounts for a client that leaves later.
                with BlockingClient() as client:
                    client.mount("look", lifetime=Lifetime.CLIENT)
                wait_until_equal(list_mounts, [[str(here), "work", False, "client", 0]])
                assert mounted_on(here) == before
                holder.kill()
            wait_until(lambda: is_unmounted(here))


@pytest.mark.parametrize("how", [signal.SIGTERM, signal.SIGKILL])
def test_persistent_mounts_survive_the_end_of_the_daemon(
    on_bus: str, scratch: Path, places: Path, how: signal.Signals
) -> None:
    here, there, state = make_target(places), make_target(places, "there"), scratch / "state"
    with run_daemon(on_bus, state, status=0 if how is signal.SIGTERM else -how) as service:
        with BlockingClient() as client:
            populate_service(client)
            client.mount("work", str(here))
            client.mount("look", str(there))
        before, rows = [mounted_on(here), mounted_on(there)], list_mounts()
        service.daemon.process.send_signal(how)
        service.daemon.process.wait()
    for _ in range(2):
        with run_daemon(on_bus, state):
            assert list_mounts() == rows
            assert mounts_below(places) == [str(here), str(there)]
            assert [mounted_on(here), mounted_on(there)] == before
    with run_daemon(on_bus, state):
        for target in (here, there):
            call_method("Unmount", UNMOUNT, str(target), {})
            assert mounted_on(target) is None


def test_client_mounts_of_an_earlier_bus_are_unmounted_at_start(
    scratch: Path, places: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    here, kept, state = make_target(places), make_target(places, "kept"), scratch / "state"
    name = ""

    async def hold(buses: ExitStack, service: Service) -> str:
        async with connection() as bus:
            options = {"lifetime": Variant("s", "client")}
            await bus.ask(member="Mount", signature=MOUNT, body=["work", str(here), options])
            await bus.ask(member="Mount", signature=MOUNT, body=["look", str(kept), {}])
            buses.close()
            await asyncio.to_thread(service.daemon.process.wait)
            return str(bus.unique_name)

    with ExitStack() as buses:
        address = buses.enter_context(private_bus())
        monkeypatch.setenv("DBUS_SYSTEM_BUS_ADDRESS", address)
        with run_daemon(address, state, status=1) as service:
            with BlockingClient() as client:
                populate_service(client)
            name = asyncio.run(hold(buses, service))
    assert mounts_below(places) == [str(here), str(kept)]

    async def look(address: str) -> None:
        async with connection() as first:
            assert first.unique_name
            others = [connection()]
            while (await others[-1].__aenter__()).unique_name != name:
                others.append(connection())
            # Another connection has the unique name of the client now.
            await asyncio.to_thread(serve, address)
            for other in others:
                other.disconnect()

    def serve(address: str) -> None:
        with run_daemon(address, state):
            wait_until(lambda: mounted_on(here) is None)
            assert [row[0] for row in list_mounts()] == [str(kept)]

    with private_bus() as address:
        monkeypatch.setenv("DBUS_SYSTEM_BUS_ADDRESS", address)
        asyncio.run(look(address))
    assert mounts_below(places) == [str(kept)]


SYSTEMD_POLICY = """
<!DOCTYPE busconfig PUBLIC "-//freedesktop//DTD D-BUS Bus Configuration 1.0//EN"
 "http://www.freedesktop.org/standards/dbus/1.0/busconfig.dtd">
<busconfig>
  <policy user="root">
    <allow own="org.freedesktop.systemd1"/>
    <allow send_destination="org.freedesktop.systemd1"/>
  </policy>
</busconfig>
"""


@pytest.fixture
def systemd_bus(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """Run a bus on which a test can own the name of systemd."""
    policy = tmp_path / "systemd.conf"
    policy.write_text(SYSTEMD_POLICY.strip())
    with private_bus([policy]) as address:
        monkeypatch.setenv("DBUS_SYSTEM_BUS_ADDRESS", address)
        yield address


@asynccontextmanager
async def own_systemd_name(
    answer: Callable[[Message], Message | bool | None],
) -> AsyncIterator[None]:
    """Own the name of systemd on the bus during the block; ``answer`` handles the messages."""
    async with connection() as owner:
        owner.add_message_handler(answer)
        await owner.ask_driver("RequestName", "su", ["org.freedesktop.systemd1", 0])
        yield


def test_a_persistent_mount_is_restored_after_a_soft_reboot(
    systemd_bus: str, scratch: Path, places: Path
) -> None:
    """A mount that disappears without a soft reboot is not: an administrator has unmounted it."""
    here = make_target(places)
    soft_reboots = 0

    def answer(message: Message) -> Message | None:
        if message.body != ["org.freedesktop.systemd1.Manager", "SoftRebootsCount"]:
            return None
        return Message.new_method_return(message, "v", [Variant("u", soft_reboots)])

    def serve(call: Callable[[BlockingClient], T]) -> T:
        with run_daemon(systemd_bus, scratch / "state"), BlockingClient() as client:
            return call(client)

    def mount(client: BlockingClient) -> None:
        populate_service(client)
        client.mount("work", str(here))

    def mounted(client: BlockingClient) -> list[str]:
        return [each.target for each in client.list_mounts()]

    async def scenario() -> None:
        nonlocal soft_reboots
        async with own_systemd_name(answer):
            await asyncio.to_thread(serve, mount)
            for _ in range(2):
                soft_reboots += 1
                subprocess.run(["umount", here], check=True)
                assert await asyncio.to_thread(serve, mounted) == [str(here)]
                assert mounts_below(places) == [str(here)]
            subprocess.run(["umount", here], check=True)
            assert await asyncio.to_thread(serve, mounted) == []

    asyncio.run(scenario())


@pytest.mark.usefixtures("systemd_bus", "filesystem")
def test_a_start_raises_unavailable_when_systemd_does_not_answer(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(daemon, "SYSTEMD_SECONDS", 0.1)

    async def scenario() -> None:
        async with own_systemd_name(
            lambda message: message.message_type is MessageType.METHOD_CALL
        ):
            with pytest.raises(Unavailable, match="systemd does not answer"):
                await daemon._soft_reboots()

    asyncio.run(scenario())
