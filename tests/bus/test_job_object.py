"""Job objects on the bus: Cancel, its authorization, and the standard interfaces."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
from dbus_next.constants import MessageType
from dbus_next.signature import Variant

from snapd_native.bus.introspection import contract, interfaces
from snapd_native.client import BlockingClient, Client
from snapd_native.errors import Cancelled, FailedPrecondition, NotFound
from snapd_native.metastore import Metastore
from snapd_native.model import Kind
from snapd_native.wire.names import (
    BUS_NAME,
    INTROSPECTABLE,
    JOB,
    JOB_PATH,
    MANAGER,
    OBJECT_PATH,
    PEER,
    PROPERTIES,
)
from tests.bus.test_jobs import COMMIT, LONG_CALLS, PREPARE, Call
from tests.bus.test_service import STANDARD, ask_manager
from tests.support.descriptors import nothing_left_open
from tests.support.file_systems import on_ext4
from tests.support.holding import (
    HeldCalls,
    hold_at_files,
    hold_function,
    hold_workers,
    stop_processes,
)
from tests.support.job_watch import Watcher, run_with_watcher, watching
from tests.support.service import (
    NOBODY,
    Service,
    check_sentence,
    expect_error,
    snapshots_and_directories,
)
from tests.support.service_in_process import serve_in_process

pytestmark = on_ext4

ERROR = "org.snapdnative1.Error."


@pytest.mark.parametrize("call", [PREPARE, COMMIT], ids=["prepare", "commit"])
def test_a_cancelled_job_leaves_no_snapshot_and_no_directory(
    service_with_base: Service, shared_client: BlockingClient, call: Call
) -> None:
    before = snapshots_and_directories(shared_client, service_with_base)

    async def scenario(watcher: Watcher) -> None:
        with hold_workers(service_with_base):
            (path,) = await watcher.call(*call)
            number, _ = await watcher.wait_for_signal("JobNew")
            assert await watcher.call("Cancel", path=path) == []
        assert watcher.message_order() == ["JobNew", "reply", "JobRemoved", "reply"]
        *about, key, result, name, text = await watcher.wait_for_signal("JobRemoved", path)
        assert about == [number, path]
        assert key == ("key" if call is PREPARE else "work")
        assert (result, name) == ("cancelled", f"{ERROR}Cancelled")
        check_sentence(text, f'"{key}"', "was cancelled")

    run_with_watcher(scenario)
    assert snapshots_and_directories(shared_client, service_with_base) == before
    assert shared_client.stat("work").kind is Kind.ACTIVE
    # The cancelled call has released the key and the snapshots.
    shared_client.prepare("key")
    shared_client.remove("work")
    shared_client.remove("base")


@pytest.mark.parametrize("member", LONG_CALLS)
def test_a_caller_gets_cancelled_when_another_client_cancels_its_call(
    service_with_base: Service, shared_client: BlockingClient, member: str
) -> None:
    signature, body, operation, key, _ = LONG_CALLS[member]
    before = snapshots_and_directories(shared_client, service_with_base)

    async def scenario(watcher: Watcher) -> None:
        with hold_workers(service_with_base):
            calling = asyncio.ensure_future(watcher.call(member, signature, *body))
            number, path = await watcher.wait_for_signal("JobNew")
            async with Client() as other:
                await other.cancel(number)
                with expect_error(NotFound, f"no job {number}"):
                    await other.cancel(number)
        with expect_error(Cancelled, operation, f'"{key}"', "was cancelled"):
            await calling
        assert watcher.message_order() == ["JobNew", "JobRemoved", "reply"]
        (removed,) = watcher.signals("JobRemoved")
        assert removed.body[:5] == [number, path, key, "cancelled", f"{ERROR}Cancelled"]

    run_with_watcher(scenario)
    assert snapshots_and_directories(shared_client, service_with_base) == before


def test_concurrent_cancels_of_one_job_all_succeed(service_with_base: Service) -> None:
    async def scenario(watcher: Watcher) -> None:
        with hold_workers(service_with_base):
            (path,) = await watcher.call(*PREPARE)
            watcher.forget()
            with stop_processes(service_with_base.pid):
                calls = [watcher.call("Cancel", path=path) for _ in range(8)]
                cancelling = asyncio.gather(*calls)
                # When the bus answers this call, it has received all calls above.
                await asyncio.sleep(0)
                await watcher.bus.ask_driver("GetId", "", [])
            assert await cancelling == [[]] * 8
        assert watcher.message_order() == ["reply", "JobRemoved", *["reply"] * 8]
        with expect_error(NotFound, path.rpartition("/")[2]):
            await watcher.call("Cancel", path=path)

    run_with_watcher(scenario)


def test_cancel_of_a_job_that_is_taking_effect_raises_failed_precondition(
    on_bus: str, scratch: Path
) -> None:
    async def scenario(publishing: HeldCalls) -> None:
        async with serve_in_process(scratch / "state"), watching() as watcher:
            (path,) = await watcher.call("PrepareJob", "ssa{sv}", "key", "", {})
            await asyncio.to_thread(publishing.wait_until_reached)
            with expect_error(FailedPrecondition, path.rpartition("/")[2], "cannot be cancelled"):
                await watcher.call("Cancel", path=path)
            publishing.release()
            assert (await watcher.wait_for_signal("JobRemoved", path))[3] == "done"
            await watcher.call("Mounts", "s", "key")

    with hold_function(Metastore, "publish") as publishing:
        asyncio.run(scenario(publishing))


def test_many_cancelled_jobs_leave_no_open_files(
    service_with_base: Service, shared_client: BlockingClient
) -> None:
    base = Path(shared_client.view("look", "base").source)
    work = Path(shared_client.mounts("work").source) / "file"
    work.touch()

    async def scenario(watcher: Watcher) -> None:
        for number in range(10):
            call = COMMIT if number % 2 else PREPARE
            (path,) = await watcher.call(*call)
            await watcher.call("Cancel", path=path)

    with nothing_left_open(service_with_base), hold_at_files(base / "file", work):
        run_with_watcher(scenario)


def test_busctl_can_list_introspect_and_cancel_a_job(
    waiting_job: str, shared_service: Service
) -> None:
    number = waiting_job.rpartition("/")[2]
    listed = shared_service.call("ListJobs").stdout
    assert listed == f'a(ussuo) 1 {number} "prepare" "key" 0 "{waiting_job}"\n'
    tree = shared_service.busctl("tree", "--list", BUS_NAME).stdout.split()
    assert tree[-3:] == [OBJECT_PATH, JOB_PATH, waiting_job]
    lines = shared_service.busctl(
        "introspect", BUS_NAME, waiting_job, "--no-legend"
    ).stdout.splitlines()
    rows = {row[0]: row[1:] for row in (line.split() for line in lines)}
    assert rows[".Cancel"] == ["method", "-", "-", "-"]
    assert rows[".Key"] == ["property", "s", '"key"', "const"]
    assert rows[".EntriesDone"] == ["property", "t", "0", "emits-change"]
    assert shared_service.busctl("call", BUS_NAME, waiting_job, JOB, "Cancel").returncode == 0
    gone = shared_service.busctl("call", BUS_NAME, waiting_job, JOB, "Cancel")
    assert gone.stderr == f"Call failed: there is no job {number}: it has ended, or never was\n"
    assert shared_service.busctl("tree", "--list", BUS_NAME).stdout.split()[-1] == OBJECT_PATH


def introspect(path: str) -> ElementTree.Element:
    xml = ask_manager(path=path, interface=INTROSPECTABLE, member="Introspect").body[0]
    return ElementTree.fromstring(xml)  # noqa: S314 - it is the project's own


def child_names(path: str) -> list[str | None]:
    return [node.get("name") for node in introspect(path).findall("node")]


def test_introspection_shows_a_job_until_it_ends(waiting_job: str) -> None:
    number = waiting_job.rpartition("/")[2]
    assert (child_names(OBJECT_PATH), child_names(JOB_PATH), child_names(waiting_job)) == (
        ["job"],
        [number],
        [],
    )
    assert introspect(JOB_PATH).findall("interface") == []
    node = introspect(waiting_job)
    names = {interface.get("name") for interface in node.findall("interface")}
    assert names == {JOB, PEER, INTROSPECTABLE, PROPERTIES}
    served = interfaces(ElementTree.tostring(node, encoding="unicode"))
    assert served[JOB] == interfaces(contract())[JOB]
    ask_manager(path=waiting_job, interface=JOB, member="Cancel")
    assert child_names(OBJECT_PATH) == []
    reply = ask_manager(path=JOB_PATH, interface=INTROSPECTABLE, member="Introspect")
    assert reply.error_name == f"{STANDARD}UnknownObject"


GET = {"interface": PROPERTIES, "member": "Get", "signature": "ss"}
GET_ALL = {"interface": PROPERTIES, "member": "GetAll", "signature": "s"}
SET = {"interface": PROPERTIES, "member": "Set", "signature": "ssv"}
CANCEL = {"interface": JOB, "member": "Cancel"}

INVALID_CALLS: list[tuple[str, dict[str, Any]]] = [
    (f"{STANDARD}UnknownInterface", {"interface": MANAGER, "member": "ListJobs"}),
    (f"{STANDARD}UnknownInterface", {"interface": "org.none", "member": "Cancel"}),
    (f"{STANDARD}UnknownMethod", {"interface": JOB, "member": "cancel"}),
    (f"{STANDARD}UnknownMethod", {"interface": None, "member": "None"}),
    (f"{STANDARD}UnknownMethod", {"interface": None, "member": "Stat"}),
    (f"{ERROR}InvalidArgument", {**CANCEL, "signature": "u", "body": [1]}),
    (f"{STANDARD}UnknownProperty", {**GET, "body": [JOB, "Version"]}),
    (f"{STANDARD}UnknownProperty", {**GET, "body": [PEER, "Id"]}),
    (f"{STANDARD}UnknownInterface", {**GET, "body": [MANAGER, "Version"]}),
    (f"{STANDARD}UnknownInterface", {**GET_ALL, "body": [MANAGER]}),
    (f"{STANDARD}PropertyReadOnly", {**SET, "body": [JOB, "Key", Variant("s", "new")]}),
    (f"{STANDARD}PropertyReadOnly", {**SET, "body": ["", "EntriesDone", Variant("t", 7)]}),
    (f"{STANDARD}UnknownProperty", {**SET, "body": [JOB, "None", Variant("t", 7)]}),
    (f"{STANDARD}UnknownInterface", {**CANCEL, "path": OBJECT_PATH}),
    (f"{STANDARD}UnknownInterface", {**GET, "path": OBJECT_PATH, "body": [JOB, "Id"]}),
    (f"{STANDARD}UnknownInterface", {**CANCEL, "path": JOB_PATH}),
    (f"{STANDARD}UnknownInterface", {**GET_ALL, "path": JOB_PATH, "body": [JOB]}),
    (f"{STANDARD}UnknownObject", {**CANCEL, "path": "/job"}),
]


def test_wrong_calls_on_a_job_object_are_refused(waiting_job: str) -> None:
    for error, fields in [
        *INVALID_CALLS,
        (f"{STANDARD}UnknownObject", {**CANCEL, "path": f"{waiting_job}/1"}),
    ]:
        reply = ask_manager(**{"path": waiting_job, **fields})
        assert reply.message_type is MessageType.ERROR, fields
        assert reply.error_name == error, fields
        check_sentence(reply.body[0])
    assert ask_manager(path=waiting_job, **GET, body=[JOB, "EntriesDone"]).body == [Variant("t", 0)]


def test_a_call_on_a_job_object_needs_no_interface_name(waiting_job: str) -> None:
    assert ask_manager(path=waiting_job, interface=None, member="Ping").body == []
    found = ask_manager(
        path=waiting_job, interface=None, member="Get", signature="ss", body=["", "Key"]
    )
    assert found.body == [Variant("s", "key")]
    assert (
        ask_manager(path=waiting_job, interface=None, member="Cancel").message_type
        is MessageType.METHOD_RETURN
    )


def test_calls_on_an_ended_job_raise_not_found(waiting_job: str) -> None:
    ask_manager(path=waiting_job, **CANCEL)
    for path in (waiting_job, f"{JOB_PATH}/0", f"{JOB_PATH}/4294967295", f"{JOB_PATH}/x"):
        for fields in (
            CANCEL,
            {"interface": None, "member": "Cancel"},
            {**GET, "body": [JOB, "Key"]},
            {**GET_ALL, "body": [JOB]},
            {**SET, "body": [JOB, "Key", Variant("s", "new")]},
        ):
            reply = ask_manager(path=path, **fields)
            assert reply.error_name == f"{ERROR}NotFound"
            check_sentence(reply.body[0], path.rpartition("/")[2])


def check_denied(service: Service, path: str, interface: str, *call: str) -> None:
    done = service.busctl("call", BUS_NAME, path, interface, *call, user=NOBODY)
    assert (done.returncode, done.stdout) == (1, "")
    assert "Access denied" in done.stderr


def test_a_user_other_than_root_is_denied_every_job_call(
    waiting_job: str, shared_service: Service
) -> None:
    check_denied(shared_service, OBJECT_PATH, MANAGER, "PrepareJob", "ssa{sv}", "new", "base", "0")
    check_denied(shared_service, OBJECT_PATH, MANAGER, "PrepareJob", "s", "new")
    check_denied(shared_service, OBJECT_PATH, MANAGER, "CommitJob", "ssa{sv}", "name", "work", "0")
    check_denied(shared_service, OBJECT_PATH, MANAGER, "CommitJob", "ssa{sv}", "name", "none", "0")
    check_denied(shared_service, OBJECT_PATH, MANAGER, "VerifyJob", "sa{sv}", "base", "0")
    check_denied(shared_service, OBJECT_PATH, MANAGER, "ListJobs")
    check_denied(shared_service, waiting_job, JOB, "Cancel")
    check_denied(shared_service, waiting_job, JOB, "Cancel", "s", "now")
    check_denied(shared_service, waiting_job, PROPERTIES, "Get", "ss", JOB, "Key")
    check_denied(shared_service, waiting_job, PROPERTIES, "Get", "ss", JOB, "None")
    check_denied(shared_service, waiting_job, PROPERTIES, "GetAll", "s", JOB)
    check_denied(shared_service, waiting_job, PROPERTIES, "Set", "ssv", JOB, "Key", "s", "new")
    assert ask_manager(path=waiting_job, **GET, body=[JOB, "Key"]).body == [Variant("s", "key")]


def test_a_denied_user_does_not_learn_which_jobs_exist(
    waiting_job: str, shared_service: Service
) -> None:
    """The daemon checks the authorisation before it looks up the job."""
    gone = f"{JOB_PATH}/4294967295"
    check_denied(shared_service, gone, JOB, "Cancel")
    check_denied(shared_service, gone, PROPERTIES, "Get", "ss", JOB, "Key")
    check_denied(shared_service, gone, PROPERTIES, "GetAll", "s", JOB)
