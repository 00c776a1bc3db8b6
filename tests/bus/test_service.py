"""The daemon on the bus: introspection, properties, signals and standard errors."""

from __future__ import annotations

import asyncio
import json
import os
import select
import subprocess
from itertools import islice
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
from dbus_next.constants import MessageType
from dbus_next.message import Message
from dbus_next.signature import Variant

from snapd_native import __version__
from snapd_native.bus import introspection
from snapd_native.bus.jobs import Jobs
from snapd_native.bus.manager import Manager, signal
from snapd_native.client import BlockingClient
from snapd_native.model import Added, Committed, Kind, Removed, Updated
from snapd_native.snapshotter import Snapshotter
from snapd_native.wire.names import (
    BUS_NAME,
    INTROSPECTABLE,
    MANAGER,
    OBJECT_PATH,
    PEER,
    PROPERTIES,
)
from tests.support import PROJECT
from tests.support.file_systems import FileSystem
from tests.support.service import (
    HANG_TIMEOUT,
    NOBODY,
    Service,
    call_method,
    check_sentence,
    connection,
)

STANDARD = "org.freedesktop.DBus.Error."


def parsed(xml: str) -> ElementTree.Element:
    return ElementTree.fromstring(xml)  # noqa: S314 - it is the project's own


def manager_of(xml: str) -> str:
    """Return the Manager's part of an introspection document, in canonical form."""
    (found,) = (node for node in parsed(xml).iter("interface") if node.get("name") == MANAGER)
    return ElementTree.canonicalize(ElementTree.tostring(found), strip_text=True)


def test_introspect_returns_the_shipped_xml(shared_service: Service) -> None:
    committed_xml = (PROJECT / "dbus/org.snapdnative1.xml").read_text()
    assert introspection.contract() == committed_xml
    (served,) = call_method("Introspect", "", interface=INTROSPECTABLE)
    assert manager_of(served) == manager_of(committed_xml)
    names = {node.get("name") for node in parsed(served).iter("interface")}
    assert names == {MANAGER, PEER, INTROSPECTABLE, PROPERTIES}


def test_the_manager_has_the_members_and_signals_of_the_xml(scratch: Path) -> None:
    shape = introspection.interfaces(introspection.contract())[MANAGER]
    snapshotter = Snapshotter(scratch / "state", lambda *_: None)
    try:
        manager = Manager(snapshotter, Jobs(lambda *_: None))
        assert manager.methods.keys() == shape.methods.keys()
        assert {
            name: value.signature for name, value in manager.properties.items()
        } == shape.properties
    finally:
        snapshotter.close()
    changes = (Added("k", Kind.VIEW, "p"), Committed("n", "k"), Updated("n"), Removed("k"))
    of_jobs = {"JobNew", "JobRemoved"}
    assert {signal(change)[0] for change in changes} == shape.signals.keys() - of_jobs
    for change in changes:
        name, body = signal(change)
        Message.new_signal(OBJECT_PATH, MANAGER, name, shape.signals[name], body)._marshall()


def test_the_xml_names_every_argument_and_marks_constant_properties() -> None:
    node = parsed(introspection.contract())
    members = [*node.iter("method"), *node.iter("signal")]
    for member in members:
        names = [arg.get("name") for arg in member.iter("arg")]
        assert all(names)
        assert len(set(names)) == len(names)
    changing = set()
    for shown in node.iter("property"):
        assert shown.get("access") == "read"
        if annotations := list(shown.iter("annotation")):
            (annotation,) = annotations
            assert annotation.get("name") == "org.freedesktop.DBus.Property.EmitsChangedSignal"
            assert annotation.get("value") == "const"
        else:
            changing.add(shown.get("name"))
    assert changing == {"EntriesDone", "EntriesTotal", "BytesDone", "BytesTotal"}


@pytest.mark.parametrize("user", [0, NOBODY])
def test_every_user_may_introspect_the_manager(shared_service: Service, user: int) -> None:
    lines = shared_service.busctl("introspect", BUS_NAME, OBJECT_PATH, "--no-legend", user=user)
    if user:
        # busctl also reads properties, which other users may not.
        assert "Access denied" in lines.stderr
        xml = shared_service.busctl(
            "introspect", "--xml-interface", BUS_NAME, OBJECT_PATH, user=user
        )
        assert manager_of(xml.stdout) == manager_of(introspection.contract())
        return
    found = {tuple(line.split()[:3]) for line in lines.stdout.splitlines()}
    assert (".Prepare", "method", "ssa{sv}") in found
    assert (".Version", "property", "s") in found
    assert (".SnapshotAdded", "signal", "sss") in found


def test_busctl_tree_lists_the_object(shared_service: Service) -> None:
    assert shared_service.busctl("tree", "--list", BUS_NAME).stdout.split()[-1] == OBJECT_PATH


def test_busctl_can_make_every_snapshot_call(shared_service: Service) -> None:
    def typed(member: str, *arguments: str) -> str:
        done = shared_service.call(member, *arguments)
        assert (done.returncode, done.stderr) == (0, "")
        return done.stdout.strip()

    root = f"{shared_service.state}/snapshots"
    mounts = typed("Prepare", "ssa{sv}", "my key", "", "1", "labels", "a{ss}", "1", "app", "web")
    source = mounts.split('"')[3]
    assert mounts == f'a(ssas) 1 "bind" "{source}" 2 "rbind" "rw"'
    assert source.startswith(root)
    assert typed("Mounts", "s", "my key") == mounts
    (Path(source) / "file").write_text("text")
    answer = typed("Stat", "s", "my key").split()
    assert answer[:5] == ["(ssstta{ss})", '"my', 'key"', '"active"', '""']
    assert answer[7:] == ["1", '"app"', '"web"']
    usage = typed("Usage", "s", "my key")
    assert usage.split()[0::2] == ["tt", "2"]
    assert typed("Commit", "ssa{sv}", "base", "my key", "0") == ""
    assert typed("View", "ssa{sv}", "seen", "base", "0") == (
        f'a(ssas) 1 "bind" "{source}" 2 "rbind" "ro"'
    )
    labelled = typed("Update", "sa{ss}as", "seen", "2", "a", "1", "b", "2", "1", "labels.a")
    assert labelled.endswith('1 "a" "1"')
    listed = typed("List", "asa{sv}", "1", "kind==view", "2", "limit", "u", "5", "after", "s", "a")
    assert listed.startswith('a(ssstta{ss}) 1 "seen" "view" "base" ')
    assert typed("Remove", "sa{sv}", "seen", "0") == ""
    assert typed("Remove", "sa{sv}", "base", "0") == ""
    assert typed("Cleanup", "a{sv}", "0") == ""
    assert typed("List", "asa{sv}", "0", "0") == "a(ssstta{ss}) 0"


def test_busctl_and_dbus_send_show_the_error_message(shared_service: Service) -> None:
    failed = shared_service.call("Stat", "s", "none")
    assert failed.returncode == 1
    assert failed.stderr == (
        'Call failed: there is no snapshot "none": list them to see which there are\n'
    )
    name, text = shared_service.dbus_send("Stat", "string:none")
    assert name == "org.snapdnative1.Error.NotFound"
    check_sentence(text, '"none"')


def test_properties_have_the_contract_types_and_the_expected_values(
    shared_service: Service, filesystem: FileSystem
) -> None:
    expected = {
        "Version": f's "{__version__}"',
        "StateDirectory": f's "{shared_service.state}"',
        "FilesystemType": f's "{filesystem.name}"',
        "Reflink": f"b {str(filesystem.reflink).lower()}",
    }
    got = shared_service.busctl("get-property", BUS_NAME, OBJECT_PATH, MANAGER, *expected)
    assert got.stdout.splitlines() == list(expected.values())
    (values,) = call_method("GetAll", "s", MANAGER, interface=PROPERTIES)
    assert {name: value.signature for name, value in values.items()} == {
        name: text[0] for name, text in expected.items()
    }
    for other in (PEER, PROPERTIES, INTROSPECTABLE):
        assert call_method("GetAll", "s", other, interface=PROPERTIES) == [{}]


def test_busctl_monitor_shows_the_snapshot_signals(shared_service: Service) -> None:
    # With a pipe, busctl would write the messages only when its buffer is full.
    terminal, output = os.openpty()
    with open(output, "wb") as stdout:
        monitor = subprocess.Popen(
            [
                *("busctl", f"--address={shared_service.address}", "monitor", "--json=short"),
                f"--match=type='signal',interface='{MANAGER}'",
            ],
            env={**os.environ, "SYSTEMD_COLORS": "0"},
            stdout=stdout,
            stderr=subprocess.DEVNULL,
        )
    lines = open(terminal)  # noqa: SIM115 - closed when the monitor has ended
    try:
        # With --json, busctl of systemd 257 does not say when it begins.
        while not select.select([terminal], [], [], 0.1)[0]:
            shared_service.call("Prepare", "ssa{sv}", "probe", "", "0")
            shared_service.call("Remove", "sa{sv}", "probe", "0")
        shared_service.call("Prepare", "ssa{sv}", "key", "", "0")
        shared_service.call("Update", "sa{ss}as", "key", "0", "0")
        shared_service.call("Commit", "ssa{sv}", "name", "key", "0")
        shared_service.call("Remove", "sa{sv}", "name", "0")
        # A call that takes long also sends the signals of a job.
        messages = map(json.loads, lines)
        changes = (
            message
            for message in messages
            if message["member"].startswith("Snapshot") and message["payload"]["data"][0] != "probe"
        )
        seen = list(islice(changes, 4))
    finally:
        monitor.terminate()
        monitor.wait()
        lines.close()
    assert {message["path"] for message in seen} == {OBJECT_PATH}
    assert [(message["member"], message["payload"]["data"]) for message in seen] == [
        ("SnapshotAdded", ["key", "active", ""]),
        ("SnapshotUpdated", ["key"]),
        ("SnapshotCommitted", ["name", "key"]),
        ("SnapshotRemoved", ["name"]),
    ]


def ask_manager(**fields: Any) -> Message:  # noqa: ANN401 - whatever Message takes
    async def asking() -> Message:
        async with asyncio.timeout(HANG_TIMEOUT), connection() as bus:
            return await bus.ask(**fields)

    return asyncio.run(asking())


GET = {"interface": PROPERTIES, "member": "Get", "signature": "ss"}
SET = {"interface": PROPERTIES, "member": "Set", "signature": "ssv"}
VALUE = Variant("s", "new")


@pytest.mark.parametrize(
    ("fields", "error"),
    [
        ({"path": "/none", "member": "Stat"}, "UnknownObject"),
        ({"path": "/org/snapdnative1/none", "member": "Stat"}, "UnknownObject"),
        ({"path": "/none", "interface": INTROSPECTABLE, "member": "Introspect"}, "UnknownObject"),
        ({"path": "/org", "member": "Stat"}, "UnknownInterface"),
        ({"path": "/org", **GET, "body": [MANAGER, "Version"]}, "UnknownInterface"),
        ({"interface": "org.none", "member": "Stat"}, "UnknownInterface"),
        ({"interface": MANAGER + "2", "member": "Stat"}, "UnknownInterface"),
        ({"member": "None"}, "UnknownMethod"),
        ({"member": "stat"}, "UnknownMethod"),
        ({"interface": None, "member": "None"}, "UnknownMethod"),
        ({"interface": PEER, "member": "None"}, "UnknownMethod"),
        ({"interface": INTROSPECTABLE, "member": "None"}, "UnknownMethod"),
        ({"interface": PROPERTIES, "member": "None"}, "UnknownMethod"),
        ({**GET, "body": [MANAGER, "None"]}, "UnknownProperty"),
        ({**GET, "body": [PEER, "Version"]}, "UnknownProperty"),
        ({**GET, "body": ["org.none", "Version"]}, "UnknownInterface"),
        ({**GET, "member": "GetAll", "signature": "s", "body": ["org.none"]}, "UnknownInterface"),
        ({**SET, "body": [MANAGER, "Version", VALUE]}, "PropertyReadOnly"),
        ({**SET, "body": [MANAGER, "None", VALUE]}, "UnknownProperty"),
    ],
    ids=lambda value: value if isinstance(value, str) else value["member"],
)
def test_unknown_objects_and_members_get_the_standard_errors(
    shared_service: Service, fields: dict[str, Any], error: str
) -> None:
    reply = ask_manager(**fields)
    assert reply.message_type is MessageType.ERROR
    assert reply.error_name == STANDARD + error
    check_sentence(reply.body[0])


def test_a_call_needs_no_interface_name(
    shared_service: Service, shared_client: BlockingClient
) -> None:
    shared_client.prepare("key")
    stat = ask_manager(interface=None, member="Stat", signature="s", body=["key"])
    assert stat.body[0][:2] == ["key", "active"]
    xml = ask_manager(interface=None, member="Introspect")
    assert MANAGER in xml.body[0]
    version = ask_manager(interface=None, member="Get", signature="ss", body=["", "Version"])
    assert version.body[0].value == __version__
    assert ask_manager(interface=None, member="Ping").signature == ""


@pytest.mark.parametrize("user", [0, NOBODY])
def test_every_user_may_call_ping_and_get_machine_id(shared_service: Service, user: int) -> None:
    pong = shared_service.call("Ping", interface=PEER, user=user)
    assert (pong.returncode, pong.stdout) == (0, "")
    machine = shared_service.call("GetMachineId", interface=PEER, user=user)
    assert machine.stdout == f's "{Path("/etc/machine-id").read_text().strip()}"\n'


def test_a_user_other_than_root_is_denied_property_calls(shared_service: Service) -> None:
    calls = [
        ("Get", "ss", MANAGER, "Version"),
        ("Get", "ss", MANAGER, "None"),
        ("Get", "ss", "org.none", "None"),
        ("Get", "u", "7"),
        ("GetAll", "s", MANAGER),
        ("GetAll", "s", "org.none"),
        ("Set", "ssv", MANAGER, "Version", "s", "new"),
    ]
    for call in calls:
        denied = shared_service.call(*call, interface=PROPERTIES, user=NOBODY)
        assert (denied.returncode, denied.stdout) == (1, "")
        assert "Access denied" in denied.stderr
