"""Each error of the contract for each call that can raise it, and the order of checks."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from snapd_native.client import BlockingClient
from snapd_native.errors import (
    AccessDenied,
    AlreadyExists,
    DataLoss,
    FailedPrecondition,
    InvalidArgument,
    NotFound,
    ResourceExhausted,
    SnapdError,
    Unavailable,
)
from snapd_native.wire.names import error_from
from tests.support.file_systems import new_file_system
from tests.support.sealing import unsealed
from tests.support.service import (
    NOBODY,
    Service,
    check_sentence,
    commit_snapshot,
    expect_error,
    run_daemon,
    snapshots_and_directories,
)

Call = Callable[[BlockingClient], object]

LONG = "k" * 5000


@pytest.fixture
def populated_client(shared_client: BlockingClient) -> BlockingClient:
    """Make snapshots of every kind: `base`, its children `active` and `view`, and `alone`."""
    commit_snapshot(shared_client, "base", files={"file": "text"})
    shared_client.prepare("active", "base")
    shared_client.view("view", "base")
    shared_client.prepare("alone")
    return shared_client


@pytest.mark.parametrize(
    ("call", "kind", "says"),
    [
        # The snapshot does not exist.
        (lambda c: c.prepare("new", "none"), NotFound, '"none"'),
        (lambda c: c.view("new", "none"), NotFound, '"none"'),
        (lambda c: c.commit("new", "none"), NotFound, '"none"'),
        (lambda c: c.commit("new", "alone", parent="none"), NotFound, '"none"'),
        (lambda c: c.mounts("none"), NotFound, '"none"'),
        (lambda c: c.stat("none"), NotFound, '"none"'),
        (lambda c: c.update("none", {}), NotFound, '"none"'),
        (lambda c: c.usage("none"), NotFound, '"none"'),
        (lambda c: c.background_usage("none"), NotFound, '"none"'),
        (lambda c: c.remove("none"), NotFound, '"none"'),
        # The name is taken: keys and names share one namespace.
        (lambda c: c.prepare("active"), AlreadyExists, '"active"'),
        (lambda c: c.prepare("view"), AlreadyExists, '"view"'),
        (lambda c: c.prepare("base"), AlreadyExists, '"base"'),
        (lambda c: c.view("active", "base"), AlreadyExists, '"active"'),
        (lambda c: c.view("view", "base"), AlreadyExists, '"view"'),
        (lambda c: c.view("base"), AlreadyExists, '"base"'),
        (lambda c: c.commit("base", "alone"), AlreadyExists, '"base"'),
        (lambda c: c.commit("view", "alone"), AlreadyExists, '"view"'),
        (lambda c: c.commit("active", "alone"), AlreadyExists, '"active"'),
        (lambda c: c.commit("alone", "alone"), AlreadyExists, '"alone"'),
        # Keys that exist, but of the wrong kind.
        (lambda c: c.prepare("new", "active"), InvalidArgument, '"active"'),
        (lambda c: c.prepare("new", "view"), InvalidArgument, '"view"'),
        (lambda c: c.view("new", "active"), InvalidArgument, '"active"'),
        (lambda c: c.view("new", "view"), InvalidArgument, '"view"'),
        (lambda c: c.commit("new", "alone", parent="active"), InvalidArgument, '"active"'),
        (lambda c: c.commit("new", "alone", parent="alone"), InvalidArgument, '"alone"'),
        (lambda c: c.commit("new", "active", parent="view"), InvalidArgument, '"active"'),
        (lambda c: c.commit("new", "view"), FailedPrecondition, '"view"'),
        (lambda c: c.commit("new", "base"), FailedPrecondition, '"base"'),
        (lambda c: c.mounts("base"), FailedPrecondition, '"base"'),
        (lambda c: c.remove("base"), FailedPrecondition, 'cannot remove "base": it has children'),
        # The order: arguments before state.
        (lambda c: c.prepare(LONG, "none"), InvalidArgument, "5000"),
        (lambda c: c.prepare("base", LONG), InvalidArgument, "5000"),
        (lambda c: c.view("base", "none", {"": "v"}), InvalidArgument, "label"),
        (lambda c: c.commit("base", LONG), InvalidArgument, "5000"),
        (lambda c: c.commit("base", "none", {"k": LONG}), InvalidArgument, '"k"'),
        (lambda c: c.update("none", {}, ["bad"]), InvalidArgument, '"bad"'),
        # The order: the parent exists, is committed, the key is free.
        (lambda c: c.prepare("base", "none"), NotFound, '"none"'),
        (lambda c: c.prepare("base", "active"), InvalidArgument, '"active"'),
        (lambda c: c.view("base", "none"), NotFound, '"none"'),
        (lambda c: c.view("base", "view"), InvalidArgument, '"view"'),
        # The order: the name is free, the key exists, is active, the parent.
        (lambda c: c.commit("base", "none"), AlreadyExists, '"base"'),
        (lambda c: c.commit("base", "view", parent="none"), AlreadyExists, '"base"'),
        (lambda c: c.commit("new", "none", parent="none too"), NotFound, '"none"'),
        (lambda c: c.commit("new", "view", parent="none"), FailedPrecondition, '"view"'),
    ],
)
def test_a_failed_call_raises_its_error_and_changes_nothing(
    shared_service: Service,
    populated_client: BlockingClient,
    call: Call,
    kind: type[SnapdError],
    says: str,
) -> None:
    before = snapshots_and_directories(populated_client, shared_service)
    with expect_error(kind, says):
        call(populated_client)
    assert snapshots_and_directories(populated_client, shared_service) == before


def test_remove_of_a_parent_succeeds_only_without_children(
    populated_client: BlockingClient,
) -> None:
    for child in ("active", "view"):
        with expect_error(FailedPrecondition, '"base"', "children"):
            populated_client.remove("base")
        populated_client.remove(child)
    populated_client.remove("base")
    with expect_error(NotFound, '"base"'):
        populated_client.prepare("new", "base")


@pytest.mark.parametrize(
    ("lost", "call"),
    [
        ("base", lambda c: c.prepare("new", "base")),
        ("base", lambda c: c.view("new", "base")),
        ("base", lambda c: c.mounts("view")),
        ("alone", lambda c: c.mounts("alone")),
        ("alone", lambda c: c.usage("alone")),
        ("alone", lambda c: c.commit("new", "alone")),
    ],
)
@pytest.mark.parametrize("instead", ["nothing", "file", "symlink"])
def test_calls_on_a_lost_directory_raise_data_loss(
    shared_service: Service, populated_client: BlockingClient, lost: str, call: Call, instead: str
) -> None:
    where = "view" if lost == "base" else lost
    path = Path(populated_client.mounts(where).source)
    shutil.rmtree(unsealed(path))
    if instead == "file":
        path.touch()
    elif instead == "symlink":
        path.symlink_to("/etc")
    before = snapshots_and_directories(populated_client, shared_service)
    with expect_error(DataLoss, '"'):
        call(populated_client)
    assert snapshots_and_directories(populated_client, shared_service) == before
    populated_client.stat(lost)
    # A snapshot whose directory is lost can still be removed.
    path.unlink(missing_ok=True)
    for key in ("active", "view", "alone", "base"):
        populated_client.remove(key)


def test_calls_on_damaged_database_pages_raise_data_loss(on_bus: str, scratch: Path) -> None:
    state = scratch / "state"
    with run_daemon(on_bus, state), BlockingClient() as client:
        client.view("whole")
        for number in range(3):
            client.view(f"view {number}", labels={f"{n}": "v" * 4000 for n in range(25)})
    assert damage_labels(state / "metadata.db") > 50
    with run_daemon(on_bus, state), BlockingClient() as client:
        calls: list[Call] = [
            lambda c: c.list(),
            lambda c: c.stat("view 1"),
            lambda c: c.mounts("view 1"),
            lambda c: c.usage("view 1"),
            lambda c: c.update("view 1", {"a": "b"}),
            lambda c: c.remove("view 1"),
            lambda c: c.prepare("new", "view 1"),
            lambda c: c.commit("new", "view 1"),
        ]
        for call in calls:
            with expect_error(DataLoss, "metadata.db", "backup"):
                call(client)
        # Undamaged snapshots are still served.
        assert client.stat("whole").name == "whole"
        client.remove("whole")
        client.prepare("new")


def damage_labels(database: Path) -> int:
    """Overwrite the pages that contain only labels; return their number."""
    count = 0
    with database.open("r+b") as file:
        for at in range(0, database.stat().st_size, 4096):
            page = os.pread(file.fileno(), 4096, at)
            if page[0] == 0 and b"v" * 1000 in page:
                os.pwrite(file.fileno(), b"\x7f" * 4096, at)
                count += 1
    return count


@contextmanager
def run_on_full_disk(
    bus: str, kind: str, directory: Path
) -> Iterator[tuple[Service, BlockingClient, Path]]:
    """Run a service on a full file system; also yield the file that fills it."""
    with (
        new_file_system(kind, 320 << 20, directory) as made,
        run_daemon(bus, made.root / "state") as service,
        BlockingClient() as client,
    ):
        root = Path(client.prepare("making").source)
        for number in range(3000):
            (root / f"{number}").write_bytes(b"x" * 5000)
        client.commit("base", "making")
        filler = made.root / "filler"
        with filler.open("wb") as file:
            for size in (1 << 20, 4096):
                try:
                    while True:
                        os.posix_fallocate(file.fileno(), os.fstat(file.fileno()).st_size, size)
                except OSError:
                    continue
        yield service, client, filler


@pytest.mark.parametrize("kind", ["ext4", "xfs"])
def test_prepare_on_a_full_disk_raises_resource_exhausted(
    on_bus: str, kind: str, loop_directory: Path
) -> None:
    with run_on_full_disk(on_bus, kind, loop_directory) as (service, client, filler):
        before = snapshots_and_directories(client, service)
        for _ in range(3):
            with expect_error(ResourceExhausted, '"new"', "free space"):
                client.prepare("new", "base")
            client.cleanup()
            assert snapshots_and_directories(client, service) == before
        assert client.usage("base").inodes == 3001
        filler.unlink()
        client.prepare("new", "base")
        assert len(service.directories()) == 2 * len(before[1])


@pytest.mark.parametrize(
    ("member", "arguments"),
    [
        ("Prepare", ("ssa{sv}", "new", "", "0")),
        ("View", ("ssa{sv}", "new", "", "0")),
        ("Commit", ("ssa{sv}", "new", "key", "0")),
        ("Mounts", ("s", "key")),
        ("Stat", ("s", "key")),
        ("Update", ("sa{ss}as", "key", "0", "0")),
        ("Usage", ("s", "key")),
        ("BackgroundUsage", ("sa{sv}", "key", "0")),
        ("List", ("asa{sv}", "0", "0")),
        ("Remove", ("sa{sv}", "key", "0")),
        ("Cleanup", ("a{sv}", "0")),
    ],
)
def test_other_users_are_denied_before_their_arguments_are_checked(
    shared_service: Service, shared_client: BlockingClient, member: str, arguments: tuple[str, ...]
) -> None:
    shared_client.prepare("key", labels={"a": "1"})
    before = snapshots_and_directories(shared_client, shared_service)
    for given in (arguments, ("s", "key that is not there"), ("u", "7"), ()):
        denied = shared_service.call(member, *given, user=NOBODY)
        assert (denied.returncode, denied.stdout) == (1, "")
        assert "Access denied" in denied.stderr
    assert snapshots_and_directories(shared_client, shared_service) == before


def test_access_denied_names_the_call_the_uid_and_root(
    shared_service: Service, shared_client: BlockingClient
) -> None:
    """The test uses dbus-send, because busctl replaces the message of AccessDenied."""
    shared_client.prepare("key")
    with expect_error(AccessDenied, "Stat", str(NOBODY), "root"):
        raise denied_error(shared_service, "Stat", "string:key")
    with expect_error(AccessDenied, "Remove", str(NOBODY), "root"):
        raise denied_error(shared_service, "Remove")


def denied_error(service: Service, member: str, *arguments: str) -> SnapdError:
    name, text = service.dbus_send(member, *arguments, user=NOBODY)
    return error_from(name, text)


def test_calls_without_a_daemon_raise_unavailable(on_bus: str) -> None:
    with BlockingClient() as client:
        for call in (client.list, client.cleanup, lambda: client.prepare("key")):
            with expect_error(Unavailable, "systemctl start snapd-native"):
                call()


def test_a_page_larger_than_a_message_raises_resource_exhausted(
    shared_client: BlockingClient,
) -> None:
    """A smaller page is returned."""
    labels = {f"{number:04}": "v" * 4092 for number in range(250)}
    for number in range(9):
        shared_client.view(f"{number}", labels=labels)
    with pytest.raises(ResourceExhausted) as caught:
        shared_client.list()
    check_sentence(caught.value.message, "smaller limit")
    assert len(shared_client.list(limit=7)) == 7
    assert len(list(shared_client.walk())) == 9
