"""Mount, Unmount, ListMounts and OpenTree on the bus: types, errors, rights, and how mounts end."""

from __future__ import annotations

import asyncio
import os
import shutil
import signal
import sqlite3
import subprocess
import sys
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator, Sequence
from contextlib import (
    AbstractAsyncContextManager,
    ExitStack,
    asynccontextmanager,
    closing,
    contextmanager,
    suppress,
)
from pathlib import Path
from typing import Any

import pytest
from dbus_next.auth import AuthExternal
from dbus_next.constants import MessageFlag, MessageType
from dbus_next.message import Message
from dbus_next.signature import Variant

from snapd_native.client import BlockingClient
from snapd_native.errors import FailedPrecondition, Unavailable
from snapd_native.model import Lifetime
from snapd_native.private import private_bus
from snapd_native.wire.names import BUS_NAME, MANAGER, OBJECT_PATH
from tests.filesystems import on_ext4
from tests.mounting import below, mounted_on, place, tmpfs
from tests.service import (
    NOBODY,
    PATIENCE,
    Service,
    check_sentence,
    committed,
    connection,
    refused,
    request,
    serving,
)
from tests.test_bus_jobs import stopping
from tests.waiting import eventually
from tests.watching import Watch, held_up, watch

pytestmark = on_ext4

MOUNT, UNMOUNT, OPEN_TREE = "ssa{sv}", "sa{sv}", "sa{sv}"


def stock(client: BlockingClient) -> None:
    """Make `base`, which is committed, and `work` and `look` of it."""
    committed(client, "base", files={"file": "text"})
    client.prepare("work", "base")
    client.view("look", "base")


@contextmanager
def stocked_with_snapshots(service: Service) -> Iterator[Service]:
    """Lend a service that has what `stock` makes; all is unmounted in the end."""
    with BlockingClient() as client:
        stock(client)
    try:
        yield service
    finally:
        with BlockingClient() as client:
            for mounted in client.list_mounts():
                client.unmount(mounted.target, lazy=True)


@pytest.fixture
def stocked(shared: Service) -> Iterator[Service]:
    with stocked_with_snapshots(shared) as service:
        yield service


def listed() -> list[list[object]]:
    (rows,) = request("ListMounts", "s", "")
    assert isinstance(rows, list)
    return rows


def is_gone(path: Path) -> bool:
    return mounted_on(path) is None and listed() == []


@pytest.mark.parametrize(
    ("key", "read_only", "lifetime", "shown"),
    [
        ("work", None, None, False),
        ("work", False, "persistent", False),
        ("work", True, "client", True),
        ("look", None, "client", True),
        ("look", True, None, True),
    ],
)
@pytest.mark.parametrize("lazy", [None, False, True])
def test_the_calls_and_their_types(
    stocked: Service,
    places: Path,
    key: str,
    read_only: bool | None,
    lifetime: str | None,
    shown: bool,
    lazy: bool | None,
) -> None:
    here = str(place(places))
    given = {} if read_only is None else {"read-only": Variant("b", read_only)}
    given |= {} if lifetime is None else {"lifetime": Variant("s", lifetime)}
    row = [here, key, shown, lifetime or "persistent", 0]

    async def scenario() -> None:
        async with connection() as bus:
            reply = await bus.ask(member="Mount", signature=MOUNT, body=[key, here, given])
            assert (reply.signature, reply.body) == ("s", [here])
            entry = mounted_on(here)
            assert entry
            assert entry.read_only is shown
            for asked in (key, ""):
                reply = await bus.ask(member="ListMounts", signature="s", body=[asked])
                assert (reply.signature, reply.body) == ("a(ssbsu)", [[row]])
            how = {} if lazy is None else {"lazy": Variant("b", lazy)}
            reply = await bus.ask(member="Unmount", signature=UNMOUNT, body=[here, how])
            assert (reply.message_type, reply.body) == (MessageType.METHOD_RETURN, [])
            assert mounted_on(here) is None
            reply = await bus.ask(member="ListMounts", signature="s", body=[key])
            assert reply.body == [[]]

    asyncio.run(scenario())


def test_the_calls_as_a_person_types_them(stocked: Service, places: Path) -> None:
    here = str(place(places))
    options = ("2", "read-only", "b", "true", "lifetime", "s", "persistent")
    assert stocked.call("Mount", MOUNT, "work", here, *options).stdout == f's "{here}"\n'
    row = f'a(ssbsu) 1 "{here}" "work" true "persistent" 0\n'
    assert stocked.call("ListMounts", "s", "work").stdout == row
    assert stocked.call("OpenTree", OPEN_TREE, "work", "0").stdout.startswith("h ")
    assert stocked.call("Unmount", UNMOUNT, here, "1", "lazy", "b", "true").returncode == 0
    made = stocked.call("Mount", MOUNT, "look", "", "0").stdout.split('"')[1]
    assert (Path(made) / "file").read_text() == "text"
    assert stocked.call("Unmount", UNMOUNT, made, "0").returncode == 0
    assert not Path(made).exists()


YES, TEXT, LONG = Variant("b", True), Variant("s", "true"), "k" * 5000

REFUSALS: list[tuple[str, str, str, list[object]]] = [
    ("InvalidArgument", "Mount", MOUNT, ["", "@here", {}]),
    ("InvalidArgument", "Mount", MOUNT, [LONG, "@here", {}]),
    ("InvalidArgument", "Mount", MOUNT, ["work", "here", {}]),
    ("InvalidArgument", "Mount", MOUNT, ["work", "@link", {}]),
    ("InvalidArgument", "Mount", MOUNT, ["work", "@file", {}]),
    ("InvalidArgument", "Mount", MOUNT, ["work", "@none", {}]),
    ("InvalidArgument", "Mount", MOUNT, ["work", "/", {}]),
    ("InvalidArgument", "Mount", MOUNT, ["look", "@here", {"read-only": Variant("b", False)}]),
    ("InvalidArgument", "Mount", MOUNT, ["none", "@here", {"colour": TEXT}]),
    ("InvalidArgument", "Mount", MOUNT, ["work", "@here", {"read_only": YES}]),
    ("InvalidArgument", "Mount", MOUNT, ["work", "@here", {"read-only": TEXT}]),
    ("InvalidArgument", "Mount", MOUNT, ["work", "@here", {"read-only": Variant("v", YES)}]),
    ("InvalidArgument", "Mount", MOUNT, ["work", "@here", {"lifetime": Variant("u", 1)}]),
    ("InvalidArgument", "Mount", MOUNT, ["work", "@here", {"lifetime": Variant("s", "")}]),
    ("InvalidArgument", "Mount", MOUNT, ["work", "@here", {"lifetime": Variant("s", "Client")}]),
    ("InvalidArgument", "Mount", MOUNT, ["work", "@here", {"lazy": YES}]),
    ("InvalidArgument", "Mount", "ss", ["work", "@here"]),
    ("InvalidArgument", "Unmount", UNMOUNT, ["there", {}]),
    ("InvalidArgument", "Unmount", UNMOUNT, ["", {}]),
    ("InvalidArgument", "Unmount", UNMOUNT, ["@there", {"lazy": TEXT}]),
    ("InvalidArgument", "Unmount", UNMOUNT, ["@there", {"force": YES}]),
    ("InvalidArgument", "Unmount", "s", ["@there"]),
    ("InvalidArgument", "ListMounts", "s", [LONG]),
    ("InvalidArgument", "ListMounts", "", []),
    ("InvalidArgument", "OpenTree", OPEN_TREE, ["", {}]),
    ("InvalidArgument", "OpenTree", OPEN_TREE, ["look", {"read-only": Variant("b", False)}]),
    ("InvalidArgument", "OpenTree", OPEN_TREE, ["work", {"read-only": Variant("y", 1)}]),
    ("InvalidArgument", "OpenTree", OPEN_TREE, ["work", {"lifetime": Variant("s", "client")}]),
    ("NotFound", "Mount", MOUNT, ["none", "@here", {}]),
    ("NotFound", "Unmount", UNMOUNT, ["@here", {}]),
    ("NotFound", "Unmount", UNMOUNT, ["@none", {"lazy": YES}]),
    ("NotFound", "ListMounts", "s", ["none"]),
    ("NotFound", "OpenTree", OPEN_TREE, ["none", {}]),
    ("AlreadyExists", "Mount", MOUNT, ["look", "@there", {}]),
    ("FailedPrecondition", "Mount", MOUNT, ["base", "@here", {}]),
    ("FailedPrecondition", "OpenTree", OPEN_TREE, ["base", {}]),
    ("FailedPrecondition", "Unmount", UNMOUNT, ["@covered", {}]),
    ("FailedPrecondition", "Remove", "sa{sv}", ["work", {}]),
]


def placed(places: Path, body: Sequence[object]) -> list[object]:
    """Put paths in ``places`` where the arguments of a call have an @."""
    return [
        str(places / each[1:]) if isinstance(each, str) and each.startswith("@") else each
        for each in body
    ]


def test_what_is_refused_changes_nothing(stocked: Service, places: Path) -> None:
    here, there, covered = (place(places, name) for name in ("here", "there", "covered"))
    (places / "link").symlink_to(here)
    (places / "file").touch()

    async def scenario() -> None:
        async with connection() as bus:
            for target in (there, covered):
                await bus.ask(member="Mount", signature=MOUNT, body=["work", str(target), {}])
            with tmpfs(covered):
                before, descriptors = below(places), stocked.descriptors()
                for name, member, signature, body in REFUSALS:
                    given = placed(places, body)
                    reply = await bus.ask(member=member, signature=signature, body=given)
                    error = f"org.snapdnative1.Error.{name}"
                    assert (reply.error_name, member, body) == (error, member, body)
                    check_sentence(reply.body[0])
                    assert below(places) == before
                eventually(lambda: has_open(stocked, descriptors))
            reply = await bus.ask(member="ListMounts", signature="s", body=["work"])
            assert [row[0] for row in reply.body[0]] == [str(there), str(covered)]

    asyncio.run(scenario())


def test_a_tree_that_is_lost(stocked: Service, shared_client: BlockingClient, places: Path) -> None:
    shutil.rmtree(shared_client.mounts("work").source)
    here = str(place(places))
    for name, text in (
        answer("Mount", MOUNT, "work", here, {}),
        answer("OpenTree", OPEN_TREE, "work", {}),
    ):
        assert name == "org.snapdnative1.Error.DataLoss"
        check_sentence(text, '"work"', "backup")
    assert below(places) == []


def answer(member: str, signature: str, *body: object) -> tuple[str, str]:
    """Return the name and the message of the error that a call fails with."""

    async def scenario() -> tuple[str, str]:
        async with connection() as bus:
            reply = await bus.ask(member=member, signature=signature, body=[*body])
            return reply.error_name, reply.body[0]

    return asyncio.run(scenario())


def test_what_is_being_committed_is_not_mounted(stocked: Service, places: Path) -> None:
    async def scenario(watched: Watch) -> None:
        with held_up(stocked):
            (path,) = await watched.call("CommitJob", "ssa{sv}", "name", "work", {})
            with refused(FailedPrecondition, '"work"', "being committed"):
                await watched.call("Mount", MOUNT, "work", str(place(places)), {})
            with refused(FailedPrecondition, '"work"', "being committed"):
                await watched.call("OpenTree", OPEN_TREE, "work", {})
        await watched.signal("JobRemoved", path)

    watch(scenario)
    assert below(places) == []


def test_too_many_calls_at_once(stocked: Service, places: Path) -> None:
    here, more = str(place(places)), 44

    async def scenario() -> None:
        async with connection() as one, connection() as two, connection() as three:
            with closing(
                sqlite3.connect(stocked.state / "metadata.db", isolation_level=None)
            ) as db:
                # Nobody can write into the ledger now. The bus lets nobody ask for it all.
                db.execute("BEGIN IMMEDIATE")
                calls = {
                    asyncio.ensure_future(
                        bus.ask(member="Mount", signature=MOUNT, body=["work", here, {}])
                    )
                    for bus in (one, two, three)
                    for _ in range((256 + more) // 3)
                }
                refused_at_once: set[asyncio.Future[Message]] = set()
                while len(refused_at_once) < more:
                    done, calls = await asyncio.wait(calls, return_when=asyncio.FIRST_COMPLETED)
                    refused_at_once |= done
                assert not (await one.ask(member="Stat", signature="s", body=["work"])).error_name
            for call in refused_at_once:
                name, (text,) = (await call).error_name, (await call).body
                assert name == "org.snapdnative1.Error.ResourceExhausted"
                check_sentence(text, "256")
            outcomes = await asyncio.gather(*calls)
            assert sum(reply.body == [here] for reply in outcomes) == 1

    asyncio.run(scenario())
    assert below(places) == [here]


def test_nothing_is_mounted_when_the_service_stops(
    on_bus: str, scratch: Path, places: Path
) -> None:
    here = str(place(places))

    async def scenario(watched: Watch) -> None:
        async with stopping(service, watched):
            for member, signature, body in (
                ("Mount", MOUNT, ["work", here, {}]),
                ("Unmount", UNMOUNT, [here, {}]),
                ("ListMounts", "s", [""]),
                ("OpenTree", OPEN_TREE, ["work", {}]),
            ):
                with refused(Unavailable, "is stopping"):
                    await watched.call(member, signature, *body)
        await watched.signal("JobRemoved")

    with serving(on_bus, scratch / "state") as service:
        with BlockingClient() as client:
            stock(client)
        watch(scenario)
    assert below(places) == []


class _AsNobody(AuthExternal):
    def _authentication_start(self, negotiate_unix_fd: bool = False) -> str:
        super()._authentication_start(negotiate_unix_fd)
        return f"AUTH EXTERNAL {str(NOBODY).encode().hex()}"


@asynccontextmanager
async def stranger() -> AsyncIterator[connection]:
    """Connect as somebody who may not call anything."""
    os.seteuid(NOBODY)
    try:
        made = connection()
    finally:
        os.seteuid(0)
    made._auth = _AsNobody()  # type: ignore[has-type]
    async with made as bus:
        yield bus


ASKED: dict[str, tuple[str, list[list[object]]]] = {
    "Mount": (
        MOUNT,
        [
            ["work", "@there", {}],
            ["work", "@here", {}],
            ["none", "@none", {}],
            ["", "here", {"colour": YES}],
        ],
    ),
    "Unmount": (
        UNMOUNT,
        [["@there", {}], ["@here", {}], ["", {}], ["@there", {"colour": YES}]],
    ),
    "ListMounts": ("s", [["work"], ["base"], [""], ["none"]]),
    "OpenTree": (OPEN_TREE, [["work", {}], ["base", {}], ["none", {}], ["", {"colour": YES}]]),
}


@pytest.mark.parametrize("member", ASKED)
def test_a_stranger_is_denied_and_learns_nothing(
    stocked: Service, shared_client: BlockingClient, places: Path, member: str
) -> None:
    place(places)
    there = shared_client.mount("work", str(place(places, "there")))
    signature, bodies = ASKED[member]

    async def scenario() -> set[tuple[str, ...]]:
        async with stranger() as bus:
            asked = [
                await bus.ask(member=member, signature=signature, body=placed(places, body))
                for body in bodies
            ]
            asked.append(await bus.ask(member=member, signature="u", body=[1]))
            return {(reply.error_name, *reply.body) for reply in asked}

    ((name, text),) = asyncio.run(scenario())
    assert name == "org.freedesktop.DBus.Error.AccessDenied"
    check_sentence(text, member, str(NOBODY), "root")
    assert below(places) == [there]


@pytest.mark.parametrize("member", ASKED)
def test_a_stranger_is_denied_however_long_the_call_is(stocked: Service, member: str) -> None:
    signature, (body, *_) = ASKED[member]

    async def scenario() -> Message:
        async with stranger() as bus:
            long = ["k" * (5 << 20), *body[1:]]
            return await bus.ask(member=member, signature=signature, body=long)

    assert asyncio.run(scenario()).error_name == "org.freedesktop.DBus.Error.AccessDenied"


def test_a_stranger_holds_up_nobody(stocked: Service) -> None:
    options = {str(number): YES for number in range(50_000)}
    large = Message(
        destination=BUS_NAME,
        path=OBJECT_PATH,
        interface=MANAGER,
        member="Unmount",
        signature=UNMOUNT,
        body=["/here", options],
        serial=1,
    )
    data = bytearray(large._marshall())

    async def scenario() -> None:
        async with connection() as bus, stranger() as other:
            denied = asyncio.Event()
            other.add_message_handler(lambda _: denied.set())
            for _ in range(60):
                data[8:12] = other.next_serial().to_bytes(4, "little")
                other._writer.messages.put_nowait((bytes(data), [], None))
            other._writer.schedule_write()
            await denied.wait()
            async with asyncio.timeout(3):
                reply = await bus.ask(member="ListMounts", signature="s", body=[""])
            assert reply.body == [[]]

    asyncio.run(scenario())


def test_who_mounted_may_unmount(
    stocked: Service, shared_client: BlockingClient, places: Path
) -> None:
    here, there, again = (str(place(places, name)) for name in ("here", "there", "again"))
    for target in (here, there, again):
        shared_client.mount("work", target)
    with closing(sqlite3.connect(stocked.state / "metadata.db")) as db, db:
        db.execute("UPDATE mounts SET uid = ? WHERE target <> ?", (NOBODY, there))
    uids = {mounted.target: mounted.uid for mounted in shared_client.list_mounts()}
    assert uids == {here: NOBODY, there: 0, again: NOBODY}
    for call in (
        ("Unmount", UNMOUNT, there, "0"),
        ("Unmount", "s", here),
        ("Mount", MOUNT, "look", str(places), "0"),
        ("ListMounts", "s", ""),
        ("OpenTree", OPEN_TREE, "work", "0"),
    ):
        assert "Access denied" in stocked.call(*call, user=NOBODY).stderr
    assert below(places) == [here, there, again]
    done = stocked.call("Unmount", UNMOUNT, f"{here}/", "0", user=NOBODY)
    assert (done.returncode, done.stderr) == (0, "")
    with subprocess.Popen(["cat"], stdin=subprocess.PIPE, cwd=again):
        assert "cat (pid" in stocked.call("Unmount", UNMOUNT, again, "0", user=NOBODY).stderr
        lazily = ("Unmount", UNMOUNT, again, "1", "lazy", "b", "true")
        assert stocked.call(*lazily, user=NOBODY).returncode == 0
    assert below(places) == [there]
    # What is gone is nobody's.
    assert "Access denied" in stocked.call("Unmount", UNMOUNT, here, "0", user=NOBODY).stderr


def test_what_is_mounted_is_not_removed(
    stocked: Service, shared_client: BlockingClient, places: Path
) -> None:
    here, there = (str(place(places, name)) for name in ("here", "there"))
    for target in (here, there):
        shared_client.mount("look", target)
    shared_client.unmount(there)
    with refused(FailedPrecondition, 'cannot remove "look"', here, "unmount"):
        request("Remove", "sa{sv}", "look", {})
    assert [row[0] for row in listed()] == [here]
    request("Unmount", UNMOUNT, here, {})
    request("Remove", "sa{sv}", "look", {})


def test_a_busy_mount_is_not_unmounted(
    stocked: Service, shared_client: BlockingClient, places: Path
) -> None:
    here = place(places)
    shared_client.mount("work", str(here))
    with subprocess.Popen(["cat"], stdin=subprocess.PIPE, cwd=here) as cat:
        with refused(FailedPrecondition, str(here), f"cat (pid {cat.pid})", "lazily"):
            request("Unmount", UNMOUNT, str(here), {})
        assert [row[0] for row in listed()] == [str(here)]
        cat.communicate()
    request("Unmount", UNMOUNT, str(here), {})
    assert is_gone(here)


HOLDER = """
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
def holding(target: Path, how: str = "") -> Iterator[subprocess.Popen[bytes]]:
    """Run a client, perhaps inside of what is mounted for it."""
    with subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(target), how],
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
def test_a_clients_mount_goes_with_it(stocked: Service, places: Path, how: str) -> None:
    here = place(places)
    with holding(here, how) as client:
        assert listed() == [[str(here), "work", False, "client", 0]]
        if how == "ends":
            client.communicate(b"\n")
            assert client.returncode == 0
        else:
            client.kill()
            client.wait()
        eventually(lambda: is_gone(here))
    assert list(here.iterdir()) == []
    request("Remove", "sa{sv}", "work", {})


def test_a_clients_mount_goes_while_others_use_it(stocked: Service, places: Path) -> None:
    here = place(places)
    with (
        holding(here) as client,
        subprocess.Popen(["cat"], stdin=subprocess.PIPE, cwd=here) as cat,
    ):
        client.kill()
        client.wait()
        eventually(lambda: is_gone(here))
        assert cat.poll() is None
        assert Path(f"/proc/{cat.pid}/cwd/file").read_text() == "text"
    request("Remove", "sa{sv}", "work", {})


def test_only_a_clients_own_mounts_go_with_it(
    stocked: Service, shared_client: BlockingClient, places: Path
) -> None:
    made = [place(places, f"{number}") for number in range(20)]
    kept, others = str(place(places, "kept")), str(place(places, "other"))
    shared_client.mount("work", others, lifetime=Lifetime.CLIENT)
    with BlockingClient() as client:
        client.mount("work", kept)
        for target in made:
            client.mount("look", str(target), lifetime=Lifetime.CLIENT)
        client.mount("look", lifetime=Lifetime.CLIENT)
        assert len(listed()) == 23
    eventually(lambda: len(listed()) == 2)
    assert below(places) == [others, kept]


def test_a_client_may_leave_while_something_is_mounted_for_it(
    stocked: Service, places: Path
) -> None:
    made = [str(place(places, f"{number}")) for number in range(60)]
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
                # By turns, nothing and something was answered.
                if number % 2:
                    await asyncio.wait(calls, return_when=asyncio.FIRST_COMPLETED)
                else:
                    await bus.ask_driver("GetId", "", [])
            await asyncio.gather(*calls, return_exceptions=True)

    asyncio.run(scenario())
    # Those of the next client go after all of them.
    last = place(places, "last")
    with holding(last, "is killed"):
        pass
    eventually(lambda: is_gone(last) and below(places) == [])


@pytest.mark.parametrize("meanwhile", [False, True])
def test_a_clients_mount_outlives_a_killed_daemon_but_not_the_client(
    on_bus: str, scratch: Path, places: Path, meanwhile: bool
) -> None:
    here, state = place(places), scratch / "state"
    with ExitStack() as stack:
        with serving(on_bus, state, status=-signal.SIGKILL) as service:
            with BlockingClient() as client:
                stock(client)
            holder = stack.enter_context(holding(here))
            before = mounted_on(here)
            service.daemon.process.kill()
            service.daemon.process.wait()
            assert before
            assert mounted_on(here) == before
        if meanwhile:
            stack.close()
            assert mounted_on(here) == before
        with serving(on_bus, state):
            if not meanwhile:
                # What the daemon does at its start is done before it unmounts for somebody else.
                with BlockingClient() as client:
                    client.mount("look", lifetime=Lifetime.CLIENT)
                eventually(lambda: listed() == [[str(here), "work", False, "client", 0]])
                assert mounted_on(here) == before
                holder.kill()
            eventually(lambda: is_gone(here))


@pytest.mark.parametrize("how", [signal.SIGTERM, signal.SIGKILL])
def test_persistent_mounts_outlive_the_daemon(
    on_bus: str, scratch: Path, places: Path, how: signal.Signals
) -> None:
    here, there, state = place(places), place(places, "there"), scratch / "state"
    with serving(on_bus, state, status=0 if how is signal.SIGTERM else -how) as service:
        with BlockingClient() as client:
            stock(client)
            client.mount("work", str(here))
            client.mount("look", str(there))
        before, rows = [mounted_on(here), mounted_on(there)], listed()
        service.daemon.process.send_signal(how)
        service.daemon.process.wait()
    for _ in range(2):
        with serving(on_bus, state):
            assert listed() == rows
            assert below(places) == [str(here), str(there)]
            assert [mounted_on(here), mounted_on(there)] == before
    with serving(on_bus, state):
        for target in (here, there):
            request("Unmount", UNMOUNT, str(target), {})
            assert mounted_on(target) is None


def test_a_clients_mount_does_not_outlive_the_bus(
    scratch: Path, places: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    here, kept, state = place(places), place(places, "kept"), scratch / "state"
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
        with serving(address, state, status=1) as service:
            with BlockingClient() as client:
                stock(client)
            name = asyncio.run(hold(buses, service))
    assert below(places) == [str(here), str(kept)]

    async def look(address: str) -> None:
        async with connection() as first:
            assert first.unique_name
            others = [connection()]
            while (await others[-1].__aenter__()).unique_name != name:
                others.append(connection())
            # Somebody else has the client's name now.
            await asyncio.to_thread(serve, address)
            for other in others:
                other.disconnect()

    def serve(address: str) -> None:
        with serving(address, state):
            eventually(lambda: mounted_on(here) is None)
            assert [row[0] for row in listed()] == [str(kept)]

    with private_bus() as address:
        monkeypatch.setenv("DBUS_SYSTEM_BUS_ADDRESS", address)
        asyncio.run(look(address))
    assert below(places) == [str(kept)]


def has_open(service: Service, expected: Sequence[str]) -> bool:
    # Something may be closed while it is looked at.
    with suppress(FileNotFoundError):
        return service.descriptors() == expected
    return False


async def open_trees_and_close_them(bus: connection) -> None:
    for _ in range(200):
        calls = [
            bus.request_fd(BUS_NAME, OBJECT_PATH, MANAGER, "OpenTree", OPEN_TREE, [key, {}])
            for key in ["work", "look"] * 25
        ]
        for fd in await asyncio.gather(*calls):
            os.close(fd)


async def want_no_reply(bus: connection) -> None:
    for _ in range(50):
        for _ in range(200):
            await bus.send(open_tree(MessageFlag.NO_REPLY_EXPECTED))
        # One that is answered when most of the others are done, so that there are never too many.
        await bus.ask(member="ListMounts", signature="s", body=[""])


async def leave_before_the_reply(__: connection) -> None:
    for _ in range(200):
        async with connection() as bus:
            calls = [asyncio.ensure_future(bus.call(open_tree())) for _ in range(50)]
            await asyncio.wait(calls, return_when=asyncio.FIRST_COMPLETED)
        await asyncio.gather(*calls, return_exceptions=True)


async def read_nothing(__: connection) -> None:
    for _ in range(100):
        async with connection() as bus:
            asyncio.get_running_loop().remove_reader(bus._fd)
            await asyncio.gather(*(bus.send(open_tree()) for _ in range(100)))


def open_tree(flags: MessageFlag = MessageFlag.NONE) -> Message:
    return Message(
        destination=BUS_NAME,
        path=OBJECT_PATH,
        interface=MANAGER,
        member="OpenTree",
        signature=OPEN_TREE,
        body=["work", {}],
        flags=flags,
    )


@pytest.mark.parametrize(
    "scenario",
    [open_trees_and_close_them, want_no_reply, leave_before_the_reply, read_nothing],
)
def test_ten_thousand_trees_leave_nothing_open(
    stocked: Service, scenario: Callable[[connection], Coroutine[Any, Any, None]]
) -> None:
    async def asking() -> None:
        async with asyncio.timeout(PATIENCE), connection() as bus:
            await bus.ask(member="ListMounts", signature="s", body=[""])
            before = stocked.descriptors()
            await scenario(bus)
            await asyncio.to_thread(eventually, lambda: has_open(stocked, before))
            # It is answered as ever.
            await bus.ask(member="ListMounts", signature="s", body=[""])

    asyncio.run(asking())


@pytest.mark.parametrize("who", [connection, stranger])
def test_descriptors_that_come_with_a_call_are_not_kept(
    stocked: Service, places: Path, who: Callable[[], AbstractAsyncContextManager[connection]]
) -> None:
    here = str(place(places))
    before = stocked.descriptors()

    async def scenario() -> set[str]:
        names = set()
        option = {"read-only": Variant("h", 0)}
        async with who() as bus:
            with open("/dev/null", "rb") as file:
                for _ in range(250):
                    for member, signature, body in (
                        ("Mount", MOUNT, ["work", here, option]),
                        ("Unmount", UNMOUNT, [here, {"lazy": Variant("h", 3)}]),
                        ("OpenTree", OPEN_TREE, ["work", option]),
                        ("ListMounts", "h", [2]),
                    ):
                        fds = [file.fileno()] * 4
                        reply = await bus.ask(
                            member=member, signature=signature, body=body, unix_fds=fds
                        )
                        names.add(reply.error_name.rpartition(".")[2])
            eventually(lambda: has_open(stocked, before))
        return names

    assert asyncio.run(scenario()) == {"AccessDenied" if who is stranger else "InvalidArgument"}
    assert below(places) == []
