"""Mount, Unmount, ListMounts and OpenTree over the bus: types, errors and authorization."""

from __future__ import annotations

import asyncio
import shutil
import sqlite3
import subprocess
from collections.abc import Sequence
from contextlib import closing, suppress
from pathlib import Path

import pytest
from dbus_next.constants import MessageType
from dbus_next.message import Message
from dbus_next.signature import Variant

from snapd_native.bus.incoming import Call
from snapd_native.client import BlockingClient
from snapd_native.errors import FailedPrecondition, Unavailable
from snapd_native.metastore import Ledger
from snapd_native.model import Trouble
from snapd_native.wire.names import BUS_NAME, MANAGER, OBJECT_PATH
from snapd_native.wire.values import Body
from tests.bus.test_jobs import stop_daemon_during_job
from tests.support.bus_mounts import (
    MOUNT,
    OPEN_TREE,
    UNMOUNT,
    connect_as_nobody,
    is_unmounted,
    list_mounts,
    populate_service,
)
from tests.support.descriptors import descriptors, wait_until_closed
from tests.support.engine import open_engine, populate
from tests.support.file_systems import on_ext4
from tests.support.holding import HeldCalls, hold_function, hold_workers
from tests.support.job_watch import Watcher, run_with_watcher
from tests.support.kernel_mounts import (
    make_target,
    mount_tmpfs,
    mounted_on,
    mounts_below,
    run_process_in,
)
from tests.support.service import (
    HANG_TIMEOUT,
    NOBODY,
    Service,
    call_method,
    check_sentence,
    connection,
    expect_error,
    run_daemon,
)
from tests.support.service_in_process import serve_in_process
from tests.support.waiting import wait_until

pytestmark = on_ext4


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
def test_mount_list_mounts_and_unmount_reply_with_the_contract_types(
    populated_service: Service,
    places: Path,
    key: str,
    read_only: bool | None,
    lifetime: str | None,
    shown: bool,
    lazy: bool | None,
) -> None:
    here = str(make_target(places))
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


def test_busctl_can_mount_list_open_and_unmount(populated_service: Service, places: Path) -> None:
    here = str(make_target(places))
    options = ("2", "read-only", "b", "true", "lifetime", "s", "persistent")
    assert populated_service.call("Mount", MOUNT, "work", here, *options).stdout == f's "{here}"\n'
    row = f'a(ssbsu) 1 "{here}" "work" true "persistent" 0\n'
    assert populated_service.call("ListMounts", "s", "work").stdout == row
    assert populated_service.call("OpenTree", OPEN_TREE, "work", "0").stdout.startswith("h ")
    assert (
        populated_service.call("Unmount", UNMOUNT, here, "1", "lazy", "b", "true").returncode == 0
    )
    made = populated_service.call("Mount", MOUNT, "look", "", "0").stdout.split('"')[1]
    assert (Path(made) / "file").read_text() == "text"
    assert populated_service.call("Unmount", UNMOUNT, made, "0").returncode == 0
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


def with_places(places: Path, body: Sequence[object]) -> list[object]:
    """Replace each argument that begins with @ by a path in ``places``."""
    return [
        str(places / each[1:]) if isinstance(each, str) and each.startswith("@") else each
        for each in body
    ]


def test_refused_mount_calls_change_no_mount_and_leak_no_descriptor(
    populated_service: Service, places: Path
) -> None:
    here, there, covered = (make_target(places, name) for name in ("here", "there", "covered"))
    (places / "link").symlink_to(here)
    (places / "file").touch()

    async def scenario() -> None:
        async with connection() as bus:
            for target in (there, covered):
                await bus.ask(member="Mount", signature=MOUNT, body=["work", str(target), {}])
            with mount_tmpfs(covered):
                before, opened = mounts_below(places), descriptors(populated_service)
                for name, member, signature, body in REFUSALS:
                    given = with_places(places, body)
                    reply = await bus.ask(member=member, signature=signature, body=given)
                    error = f"org.snapdnative1.Error.{name}"
                    assert (reply.error_name, member, body) == (error, member, body)
                    check_sentence(reply.body[0])
                    assert mounts_below(places) == before
                wait_until_closed(populated_service, opened)
            reply = await bus.ask(member="ListMounts", signature="s", body=["work"])
            assert [row[0] for row in reply.body[0]] == [str(there), str(covered)]

    asyncio.run(scenario())


def test_mount_and_open_tree_of_a_lost_tree_raise_data_loss(
    populated_service: Service, shared_client: BlockingClient, places: Path
) -> None:
    shutil.rmtree(shared_client.mounts("work").source)
    here = str(make_target(places))
    for name, text in (
        error_of("Mount", MOUNT, "work", here, {}),
        error_of("OpenTree", OPEN_TREE, "work", {}),
    ):
        assert name == "org.snapdnative1.Error.DataLoss"
        check_sentence(text, '"work"', "backup")
    assert mounts_below(places) == []


def error_of(member: str, signature: str, *body: object) -> tuple[str, str]:
    """Return the name and the message of the error that a call fails with."""

    async def scenario() -> tuple[str, str]:
        async with connection() as bus:
            reply = await bus.ask(member=member, signature=signature, body=[*body])
            return reply.error_name, reply.body[0]

    return asyncio.run(scenario())


def test_mount_and_open_tree_during_commit_raise_failed_precondition(
    populated_service: Service, places: Path
) -> None:
    async def scenario(watcher: Watcher) -> None:
        with hold_workers(populated_service):
            (path,) = await watcher.call("CommitJob", "ssa{sv}", "name", "work", {})
            with expect_error(FailedPrecondition, '"work"', "being committed"):
                await watcher.call("Mount", MOUNT, "work", str(make_target(places)), {})
            with expect_error(FailedPrecondition, '"work"', "being committed"):
                await watcher.call("OpenTree", OPEN_TREE, "work", {})
        await watcher.wait_for_signal("JobRemoved", path)

    run_with_watcher(scenario)
    assert mounts_below(places) == []


def test_more_than_256_mount_calls_at_once_raise_resource_exhausted(
    on_bus: str, scratch: Path, places: Path
) -> None:
    here, more = str(make_target(places)), 44
    with open_engine(scratch / "state") as engine:
        populate(engine)

    async def scenario(recording: HeldCalls) -> None:
        async with (
            serve_in_process(scratch / "state"),
            # The bus limits the open calls of one connection, so three are needed.
            connection() as one,
            connection() as two,
            connection() as three,
        ):
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
            recording.release()
            outcomes = await asyncio.gather(*calls)
            assert sum(reply.body == [here] for reply in outcomes) == 1

    with hold_function(Ledger, "add") as recording:
        asyncio.run(scenario(recording))
    assert mounts_below(places) == [here]


def test_mount_calls_to_a_stopping_daemon_raise_unavailable(
    on_bus: str, scratch: Path, places: Path
) -> None:
    here = str(make_target(places))

    async def scenario(watcher: Watcher) -> None:
        async with stop_daemon_during_job(service, watcher):
            for member, signature, body in (
                ("Mount", MOUNT, ["work", here, {}]),
                ("Unmount", UNMOUNT, [here, {}]),
                ("ListMounts", "s", [""]),
                ("OpenTree", OPEN_TREE, ["work", {}]),
            ):
                with expect_error(Unavailable, "is stopping"):
                    await watcher.call(member, signature, *body)
        await watcher.wait_for_signal("JobRemoved")

    with run_daemon(on_bus, scratch / "state") as service:
        with BlockingClient() as client:
            populate_service(client)
        run_with_watcher(scenario)
    assert mounts_below(places) == []


DENIED_CALLS: dict[str, tuple[str, list[list[object]]]] = {
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


@pytest.mark.parametrize("member", DENIED_CALLS)
def test_a_denied_user_gets_the_same_error_for_all_arguments(
    populated_service: Service, shared_client: BlockingClient, places: Path, member: str
) -> None:
    make_target(places)
    there = shared_client.mount("work", str(make_target(places, "there")))
    signature, bodies = DENIED_CALLS[member]

    async def scenario() -> set[tuple[str, ...]]:
        async with connect_as_nobody() as bus:
            asked = [
                await bus.ask(member=member, signature=signature, body=with_places(places, body))
                for body in bodies
            ]
            asked.append(await bus.ask(member=member, signature="u", body=[1]))
            return {(reply.error_name, *reply.body) for reply in asked}

    ((name, text),) = asyncio.run(scenario())
    assert name == "org.freedesktop.DBus.Error.AccessDenied"
    check_sentence(text, member, str(NOBODY), "root")
    assert mounts_below(places) == [there]


def test_a_denied_unmount_of_a_missing_mount_keeps_its_record(
    populated_service: Service, shared_client: BlockingClient, places: Path
) -> None:
    """After a restart of the machine the daemon mounts again what its records contain."""
    here = shared_client.mount("work", str(make_target(places)))
    subprocess.run(["umount", here], check=True)

    async def scenario() -> str:
        async with connect_as_nobody() as bus:
            reply = await bus.ask(member="Unmount", signature=UNMOUNT, body=[here, {}])
            return str(reply.error_name)

    assert asyncio.run(scenario()) == "org.freedesktop.DBus.Error.AccessDenied"
    (finding,) = shared_client.check()
    assert (finding.kind, finding.key) == (Trouble.MOUNT, "work")
    shared_client.unmount(here)
    assert shared_client.check() == []


@pytest.mark.parametrize("member", DENIED_CALLS)
def test_a_call_of_5_mib_by_another_user_raises_access_denied(
    populated_service: Service, member: str
) -> None:
    signature, (body, *_) = DENIED_CALLS[member]

    async def scenario() -> Message:
        async with connect_as_nobody() as bus:
            long = ["k" * (5 << 20), *body[1:]]
            return await bus.ask(member=member, signature=signature, body=long)

    assert asyncio.run(scenario()).error_name == "org.freedesktop.DBus.Error.AccessDenied"


LARGE_ARGUMENTS = ["/here", {str(number): YES for number in range(50_000)}]
"""Arguments that take seconds to parse."""


def test_other_clients_are_answered_during_a_flood_of_large_denied_calls(
    populated_service: Service,
) -> None:
    large = Message(
        destination=BUS_NAME,
        path=OBJECT_PATH,
        interface=MANAGER,
        member="Unmount",
        signature=UNMOUNT,
        body=LARGE_ARGUMENTS,
        serial=1,
    )
    data = bytearray(large._marshall())

    async def scenario() -> None:
        async with asyncio.timeout(HANG_TIMEOUT), connection() as bus, connect_as_nobody() as other:
            denied = asyncio.Event()
            other.add_message_handler(lambda _: denied.set())
            for _ in range(60):
                data[8:12] = other.next_serial().to_bytes(4, "little")
                other._writer.messages.put_nowait((bytes(data), [], None))
            other._writer.schedule_write()
            await denied.wait()
            reply = await bus.ask(member="ListMounts", signature="s", body=[""])
            assert reply.body == [[]]

    asyncio.run(scenario())


def test_the_arguments_of_a_denied_call_are_not_parsed(
    on_bus: str, scratch: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Parsing them would block the event loop, and so delay all other clients."""
    parsed: list[str] = []
    arguments = Call.arguments

    def parse(call: Call) -> Body:
        parsed.append(call.member)
        return arguments(call)

    async def scenario() -> None:
        async with (
            serve_in_process(scratch / "state"),
            connection() as bus,
            connect_as_nobody() as other,
        ):
            reply = await other.ask(member="Unmount", signature=UNMOUNT, body=LARGE_ARGUMENTS)
            assert reply.error_name == "org.freedesktop.DBus.Error.AccessDenied"
            await bus.ask(member="ListMounts", signature="s", body=[""])

    monkeypatch.setattr(Call, "arguments", parse)
    asyncio.run(scenario())
    assert parsed == ["ListMounts"]


def test_a_user_other_than_root_may_unmount_only_its_own_mounts(
    on_bus: str, scratch: Path, places: Path
) -> None:
    state = scratch / "state"
    here, there, again = (str(make_target(places, name)) for name in ("here", "there", "again"))
    with run_daemon(on_bus, state), BlockingClient() as client:
        populate_service(client)
        for target in (here, there, again):
            client.mount("work", target)
    with closing(sqlite3.connect(state / "metadata.db")) as db, db:
        db.execute("UPDATE mounts SET uid = ? WHERE target <> ?", (NOBODY, there))
    with run_daemon(on_bus, state) as service, BlockingClient() as client:
        uids = {mounted.target: mounted.uid for mounted in client.list_mounts()}
        assert uids == {here: NOBODY, there: 0, again: NOBODY}
        for call in (
            ("Unmount", UNMOUNT, there, "0"),
            ("Unmount", "s", here),
            ("Mount", MOUNT, "look", str(places), "0"),
            ("ListMounts", "s", ""),
            ("OpenTree", OPEN_TREE, "work", "0"),
        ):
            assert "Access denied" in service.call(*call, user=NOBODY).stderr
        assert mounts_below(places) == [here, there, again]
        done = service.call("Unmount", UNMOUNT, f"{here}/", "0", user=NOBODY)
        assert (done.returncode, done.stderr) == (0, "")
        with run_process_in(again):
            assert "cat (pid" in service.call("Unmount", UNMOUNT, again, "0", user=NOBODY).stderr
            lazily = ("Unmount", UNMOUNT, again, "1", "lazy", "b", "true")
            assert service.call(*lazily, user=NOBODY).returncode == 0
        assert mounts_below(places) == [there]
        # A mount that is gone has no owner.
        assert "Access denied" in service.call("Unmount", UNMOUNT, here, "0", user=NOBODY).stderr
        client.unmount(there)


def test_remove_of_a_mounted_snapshot_raises_failed_precondition(
    populated_service: Service, shared_client: BlockingClient, places: Path
) -> None:
    here, there = (str(make_target(places, name)) for name in ("here", "there"))
    for target in (here, there):
        shared_client.mount("look", target)
    shared_client.unmount(there)
    with expect_error(FailedPrecondition, 'cannot remove "look"', here, "unmount"):
        call_method("Remove", "sa{sv}", "look", {})
    assert [row[0] for row in list_mounts()] == [here]
    call_method("Unmount", UNMOUNT, here, {})
    call_method("Remove", "sa{sv}", "look", {})


def test_unmount_of_a_busy_mount_raises_failed_precondition(
    populated_service: Service, shared_client: BlockingClient, places: Path
) -> None:
    here = make_target(places)
    shared_client.mount("work", str(here))
    with run_process_in(here) as cat:
        with expect_error(FailedPrecondition, str(here), f"cat (pid {cat.pid})", "lazily"):
            call_method("Unmount", UNMOUNT, str(here), {})
        assert [row[0] for row in list_mounts()] == [str(here)]

    def can_be_unmounted() -> bool:
        # A daemon of another test looks for users of its own mounts. It can still have the
        # process's directory open.
        with suppress(FailedPrecondition):
            call_method("Unmount", UNMOUNT, str(here), {})
        return is_unmounted(here)

    wait_until(can_be_unmounted)
