"""Job objects on the bus: Cancel, its authorization, and the standard interfaces."""

from __future__ import annotations

import asyncio
import os
import signal
import threading
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
from dbus_next.constants import MessageType
from dbus_next.signature import Variant

from snapd_native.bus.introspection import contract, shapes
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
from tests.bus.test_jobs import COMMIT, LONG, PREPARE, Call
from tests.bus.test_service import STANDARD, asked
from tests.support.descriptors import nothing_left_open
from tests.support.dispatching import dispatching
from tests.support.file_systems import on_ext4
from tests.support.holding import held
from tests.support.job_watch import Watch, held_up, watch, watching
from tests.support.service import NOBODY, Service, check_sentence, everything, refused
from tests.support.waiting import WAIT

pytestmark = on_ext4

ERROR = "org.snapdnative1.Error."


@pytest.mark.parametrize("call", [PREPARE, COMMIT], ids=["prepare", "commit"])
def test_a_cancelled_job_leaves_no_snapshot_and_no_directory(
    filled: Service, shared_client: BlockingClient, call: Call
) -> None:
    before = everything(shared_client, filled)

    async def scenario(watched: Watch) -> None:
        with held_up(filled):
            (path,) = await watched.call(*call)
            number, _ = await watched.signal("JobNew")
            assert await watched.call("Cancel", path=path) == []
        assert watched.order() == ["JobNew", "reply", "JobRemoved", "reply"]
        *about, key, result, name, text = await watched.signal("JobRemoved", path)
        assert about == [number, path]
        assert key == ("key" if call is PREPARE else "work")
        assert (result, name) == ("cancelled", f"{ERROR}Cancelled")
        check_sentence(text, f'"{key}"', "was cancelled")

    watch(scenario)
    assert everything(shared_client, filled) == before
    assert shared_client.stat("work").kind is Kind.ACTIVE
    # The key and the snapshots are free at once.
    shared_client.prepare("key")
    shared_client.remove("work")
    shared_client.remove("base")


@pytest.mark.parametrize("member", LONG)
def test_a_caller_gets_cancelled_when_another_client_cancels_its_call(
    filled: Service, shared_client: BlockingClient, member: str
) -> None:
    signature, body, operation, key, _ = LONG[member]
    before = everything(shared_client, filled)

    async def scenario(watched: Watch) -> None:
        with held_up(filled):
            calling = asyncio.ensure_future(watched.call(member, signature, *body))
            number, path = await watched.signal("JobNew")
            async with Client() as other:
                await other.cancel(number)
                with refused(NotFound, f"no job {number}"):
                    await other.cancel(number)
        with refused(Cancelled, operation, f'"{key}"', "was cancelled"):
            await calling
        assert watched.order() == ["JobNew", "JobRemoved", "reply"]
        (removed,) = watched.signals("JobRemoved")
        assert removed.body[:5] == [number, path, key, "cancelled", f"{ERROR}Cancelled"]

    watch(scenario)
    assert everything(shared_client, filled) == before


def test_concurrent_cancels_of_one_job_all_succeed(filled: Service) -> None:
    async def scenario(watched: Watch) -> None:
        with held_up(filled):
            (path,) = await watched.call(*PREPARE)
            watched.forget()
            os.kill(filled.pid, signal.SIGSTOP)
            try:
                calls = [watched.call("Cancel", path=path) for _ in range(8)]
                cancelling = asyncio.gather(*calls)
                # When the bus answers this call, it has received all calls above.
                await asyncio.sleep(0)
                await watched.bus.ask_driver("GetId", "", [])
            finally:
                os.kill(filled.pid, signal.SIGCONT)
            assert await cancelling == [[]] * 8
        assert watched.order() == ["reply", "JobRemoved", *["reply"] * 8]
        with refused(NotFound, path.rpartition("/")[2]):
            await watched.call("Cancel", path=path)

    watch(scenario)


def test_cancel_of_a_job_that_is_taking_effect_raises_failed_precondition(
    on_bus: str, scratch: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    concluded, go_on = threading.Event(), threading.Event()
    publish = Metastore.publish

    def wait(*arguments: Any) -> None:  # noqa: ANN401 - whatever publish takes
        concluded.set()
        assert go_on.wait(WAIT)
        publish(*arguments)

    async def scenario() -> None:
        async with dispatching(scratch / "state"), watching() as watched:
            (path,) = await watched.call("PrepareJob", "ssa{sv}", "key", "", {})
            await asyncio.to_thread(concluded.wait, WAIT)
            with refused(FailedPrecondition, path.rpartition("/")[2], "cannot be cancelled"):
                await watched.call("Cancel", path=path)
            go_on.set()
            assert (await watched.signal("JobRemoved", path))[3] == "done"
            await watched.call("Mounts", "s", "key")

    monkeypatch.setattr(Metastore, "publish", wait)
    asyncio.run(scenario())


def test_many_cancelled_jobs_leave_no_open_files(
    filled: Service, shared_client: BlockingClient
) -> None:
    base = Path(shared_client.view("look", "base").source)
    inside = Path(shared_client.mounts("work").source) / "inside"
    inside.mkdir()

    async def scenario(watched: Watch) -> None:
        for number in range(40):
            call = COMMIT if number % 2 else PREPARE
            (path,) = await watched.call(*call)
            await watched.call("Cancel", path=path)

    with nothing_left_open(filled), held(base / "file", inside):
        watch(scenario)


def test_busctl_can_list_introspect_and_cancel_a_job(job: str, shared: Service) -> None:
    number = job.rpartition("/")[2]
    listed = shared.call("ListJobs").stdout
    assert listed == f'a(ussuo) 1 {number} "prepare" "key" 0 "{job}"\n'
    tree = shared.busctl("tree", "--list", BUS_NAME).stdout.split()
    assert tree[-3:] == [OBJECT_PATH, JOB_PATH, job]
    lines = shared.busctl("introspect", BUS_NAME, job, "--no-legend").stdout.splitlines()
    rows = {row[0]: row[1:] for row in (line.split() for line in lines)}
    assert rows[".Cancel"] == ["method", "-", "-", "-"]
    assert rows[".Key"] == ["property", "s", '"key"', "const"]
    assert rows[".EntriesDone"] == ["property", "t", "0", "emits-change"]
    assert shared.busctl("call", BUS_NAME, job, JOB, "Cancel").returncode == 0
    gone = shared.busctl("call", BUS_NAME, job, JOB, "Cancel")
    assert gone.stderr == f"Call failed: there is no job {number}: it has ended, or never was\n"
    assert shared.busctl("tree", "--list", BUS_NAME).stdout.split()[-1] == OBJECT_PATH


def introspected(path: str) -> ElementTree.Element:
    xml = asked(path=path, interface=INTROSPECTABLE, member="Introspect").body[0]
    return ElementTree.fromstring(xml)  # noqa: S314 - it is the project's own


def children(path: str) -> list[str | None]:
    return [node.get("name") for node in introspected(path).findall("node")]


def test_introspection_shows_a_job_until_it_ends(job: str) -> None:
    number = job.rpartition("/")[2]
    assert (children(OBJECT_PATH), children(JOB_PATH), children(job)) == (["job"], [number], [])
    assert introspected(JOB_PATH).findall("interface") == []
    node = introspected(job)
    names = {interface.get("name") for interface in node.findall("interface")}
    assert names == {JOB, PEER, INTROSPECTABLE, PROPERTIES}
    served = shapes(ElementTree.tostring(node, encoding="unicode"))
    assert served[JOB] == shapes(contract())[JOB]
    asked(path=job, interface=JOB, member="Cancel")
    assert children(OBJECT_PATH) == []
    reply = asked(path=JOB_PATH, interface=INTROSPECTABLE, member="Introspect")
    assert reply.error_name == f"{STANDARD}UnknownObject"


GET = {"interface": PROPERTIES, "member": "Get", "signature": "ss"}
GET_ALL = {"interface": PROPERTIES, "member": "GetAll", "signature": "s"}
SET = {"interface": PROPERTIES, "member": "Set", "signature": "ssv"}
CANCEL = {"interface": JOB, "member": "Cancel"}

MISTAKES: list[tuple[str, dict[str, Any]]] = [
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


def test_wrong_calls_on_a_job_object_are_refused(job: str) -> None:
    for error, fields in [*MISTAKES, (f"{STANDARD}UnknownObject", {**CANCEL, "path": f"{job}/1"})]:
        reply = asked(**{"path": job, **fields})
        assert reply.message_type is MessageType.ERROR, fields
        assert reply.error_name == error, fields
        check_sentence(reply.body[0])
    assert asked(path=job, **GET, body=[JOB, "EntriesDone"]).body == [Variant("t", 0)]


def test_a_call_on_a_job_object_needs_no_interface_name(job: str) -> None:
    assert asked(path=job, interface=None, member="Ping").body == []
    found = asked(path=job, interface=None, member="Get", signature="ss", body=["", "Key"])
    assert found.body == [Variant("s", "key")]
    assert (
        asked(path=job, interface=None, member="Cancel").message_type is MessageType.METHOD_RETURN
    )


def test_calls_on_an_ended_job_raise_not_found(job: str) -> None:
    asked(path=job, **CANCEL)
    for path in (job, f"{JOB_PATH}/0", f"{JOB_PATH}/4294967295", f"{JOB_PATH}/x"):
        for fields in (
            CANCEL,
            {"interface": None, "member": "Cancel"},
            {**GET, "body": [JOB, "Key"]},
            {**GET_ALL, "body": [JOB]},
            {**SET, "body": [JOB, "Key", Variant("s", "new")]},
        ):
            reply = asked(path=path, **fields)
            assert reply.error_name == f"{ERROR}NotFound"
            check_sentence(reply.body[0], path.rpartition("/")[2])


def denied(service: Service, path: str, interface: str, *call: str) -> None:
    done = service.busctl("call", BUS_NAME, path, interface, *call, user=NOBODY)
    assert (done.returncode, done.stdout) == (1, "")
    assert "Access denied" in done.stderr


def test_a_user_other_than_root_is_denied_every_job_call(job: str, shared: Service) -> None:
    denied(shared, OBJECT_PATH, MANAGER, "PrepareJob", "ssa{sv}", "new", "base", "0")
    denied(shared, OBJECT_PATH, MANAGER, "PrepareJob", "s", "new")
    denied(shared, OBJECT_PATH, MANAGER, "CommitJob", "ssa{sv}", "name", "work", "0")
    denied(shared, OBJECT_PATH, MANAGER, "CommitJob", "ssa{sv}", "name", "none", "0")
    denied(shared, OBJECT_PATH, MANAGER, "VerifyJob", "sa{sv}", "base", "0")
    denied(shared, OBJECT_PATH, MANAGER, "ListJobs")
    denied(shared, job, JOB, "Cancel")
    denied(shared, job, JOB, "Cancel", "s", "now")
    denied(shared, job, PROPERTIES, "Get", "ss", JOB, "Key")
    denied(shared, job, PROPERTIES, "Get", "ss", JOB, "None")
    denied(shared, job, PROPERTIES, "GetAll", "s", JOB)
    denied(shared, job, PROPERTIES, "Set", "ssv", JOB, "Key", "s", "new")
    assert asked(path=job, **GET, body=[JOB, "Key"]).body == [Variant("s", "key")]


def test_a_denied_user_does_not_learn_which_jobs_exist(job: str, shared: Service) -> None:
    """The daemon checks the authorisation before it looks up the job."""
    gone = f"{JOB_PATH}/4294967295"
    denied(shared, gone, JOB, "Cancel")
    denied(shared, gone, PROPERTIES, "Get", "ss", JOB, "Key")
    denied(shared, gone, PROPERTIES, "GetAll", "s", JOB)
