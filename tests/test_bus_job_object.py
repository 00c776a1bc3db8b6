"""The object of a job: Cancel, who may, and the standard interfaces."""

from __future__ import annotations

import asyncio
import os
import signal
import sqlite3
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import count
from typing import Any
from xml.etree import ElementTree

import pytest
from dbus_next.constants import MessageType
from dbus_next.signature import Variant

from snapd_native.bus.introspection import contract, shapes
from snapd_native.client import BlockingClient, Client
from snapd_native.errors import Cancelled, FailedPrecondition, NotFound
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
from tests.filesystems import on_ext4
from tests.service import NOBODY, Service, check_sentence, everything, refused
from tests.test_bus import STANDARD, asked
from tests.test_bus_jobs import COMMIT, LONG, PREPARE, Call
from tests.watching import Watch, count_open, held_up, watch

pytestmark = on_ext4

ERROR = "org.snapdnative1.Error."


@pytest.mark.parametrize("call", [PREPARE, COMMIT], ids=["prepare", "commit"])
def test_a_cancelled_job_leaves_nothing(
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
    # All that was held is free at once.
    shared_client.prepare("key")
    shared_client.remove("work")
    shared_client.remove("base")


@pytest.mark.parametrize("member", LONG)
def test_who_waits_for_what_another_cancels_is_told(
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


def test_many_may_cancel_at_once(filled: Service) -> None:
    async def scenario(watched: Watch) -> None:
        with held_up(filled):
            (path,) = await watched.call(*PREPARE)
            watched.forget()
            os.kill(filled.pid, signal.SIGSTOP)
            try:
                calls = [watched.call("Cancel", path=path) for _ in range(8)]
                cancelling = asyncio.gather(*calls)
                # By then the bus has all that was sent before.
                await asyncio.sleep(0)
                await watched.bus.ask_driver("GetId", "", [])
            finally:
                os.kill(filled.pid, signal.SIGCONT)
            assert await cancelling == [[]] * 8
        assert watched.order() == ["reply", "JobRemoved", *["reply"] * 8]
        with refused(NotFound, path.rpartition("/")[2]):
            await watched.call("Cancel", path=path)

    watch(scenario)


@contextmanager
def locked(service: Service) -> Iterator[None]:
    """Have whoever changes the metadata wait."""
    database = sqlite3.connect(service.state / "metadata.db", isolation_level=None)
    try:
        database.execute("BEGIN IMMEDIATE")
        yield
    finally:
        database.close()


def test_what_takes_effect_cannot_be_cancelled(shared: Service) -> None:
    async def scenario(watched: Watch) -> None:
        for delay in count():
            with locked(shared):
                (path,) = await watched.call("PrepareJob", "ssa{sv}", "key", "", {})
                for _ in range(delay):
                    await watched.call("ListJobs")
                try:
                    await watched.call("Cancel", path=path)
                except FailedPrecondition as error:
                    check_sentence(error.message, path.rpartition("/")[2], "cannot be cancelled")
                    break
            assert (await watched.signal("JobRemoved", path))[3] == "cancelled"
        assert (await watched.signal("JobRemoved", path))[3] == "done"
        await watched.call("Mounts", "s", "key")

    watch(scenario)


def test_many_cancelled_jobs_leave_nothing_open(
    filled: Service, shared_client: BlockingClient
) -> None:
    def settled() -> tuple[int, int]:
        shared_client.usage("work")
        shared_client.cleanup()
        return count_open(filled)

    async def scenario(watched: Watch) -> int:
        undone = 0
        for number in range(40):
            call = COMMIT if number % 2 else PREPARE
            (path,) = await watched.call(*call)
            try:
                await watched.call("Cancel", path=path)
            except (NotFound, FailedPrecondition):
                await watched.signal("JobRemoved", path)
                done = "name" if number % 2 else "key"
                await watched.call("Remove", "sa{sv}", done, {})
                if number % 2:
                    await watched.call("Prepare", "ssa{sv}", "work", "base", {})
            else:
                undone += 1
        return undone

    before = settled()
    assert watch(scenario) > 10
    assert settled() == before


def test_a_job_as_busctl_shows_it(job: str, shared: Service) -> None:
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


def test_a_job_can_be_found_by_introspection(job: str) -> None:
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


def test_mistakes_with_a_job(job: str) -> None:
    for error, fields in [*MISTAKES, (f"{STANDARD}UnknownObject", {**CANCEL, "path": f"{job}/1"})]:
        reply = asked(**{"path": job, **fields})
        assert reply.message_type is MessageType.ERROR, fields
        assert reply.error_name == error, fields
        check_sentence(reply.body[0])
    assert asked(path=job, **GET, body=[JOB, "EntriesDone"]).body == [Variant("t", 0)]


def test_calls_of_a_job_need_no_interface(job: str) -> None:
    assert asked(path=job, interface=None, member="Ping").body == []
    found = asked(path=job, interface=None, member="Get", signature="ss", body=["", "Key"])
    assert found.body == [Variant("s", "key")]
    assert (
        asked(path=job, interface=None, member="Cancel").message_type is MessageType.METHOD_RETURN
    )


def test_a_job_that_is_gone_is_not_found(job: str) -> None:
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


def test_others_may_do_nothing_with_jobs(job: str, shared: Service) -> None:
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


def test_others_do_not_learn_which_jobs_there_are(job: str, shared: Service) -> None:
    """Authorisation comes before state."""
    gone = f"{JOB_PATH}/4294967295"
    denied(shared, gone, JOB, "Cancel")
    denied(shared, gone, PROPERTIES, "Get", "ss", JOB, "Key")
    denied(shared, gone, PROPERTIES, "GetAll", "s", JOB)
