"""The plugin, the service, the bus and containerd end in the middle, and start again."""

from __future__ import annotations

import os
import shutil
import socket
import stat
import subprocess
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from pathlib import Path

import grpc
import pytest
from grpc import StatusCode

from snapd_native.cli.exits import STATUSES
from snapd_native.client import BlockingClient
from snapd_native.containerd import snapshots_pb2 as wire
from snapd_native.errors import (
    AccessDenied,
    FailedPrecondition,
    InvalidArgument,
    SnapdError,
    Unavailable,
)
from snapd_native.private import private_bus
from tests.support.containerd_plugin import (
    PROGRAM,
    WITHOUT_GRACE,
    Plugin,
    Stub,
    command,
    connected,
    plugin,
    refused,
)
from tests.support.descriptors import wait_until_idle
from tests.support.file_systems import long_on_xfs
from tests.support.holding import HeldProcesses, hold_at_files
from tests.support.images import (
    IMAGE,
    Containerd,
    containerd,
    layer,
    programs,
    write_image,
)
from tests.support.sealing import unsealed
from tests.support.service import (
    HANG_TIMEOUT,
    NOBODY,
    Service,
    as_user,
    check_sentence,
    commit_snapshot,
    run_daemon,
)
from tests.support.waiting import wait_until

pytestmark = long_on_xfs

CALLS: list[Callable[[Stub], object]] = [
    lambda stub: stub.prepare("new"),
    lambda stub: stub.view("new"),
    lambda stub: stub.mounts("work"),
    lambda stub: stub.commit("new", "work"),
    lambda stub: stub.stat("work"),
    lambda stub: stub.update("work", {"a": "b"}),
    lambda stub: stub.list(),
    lambda stub: stub.usage("work"),
    lambda stub: stub.remove("work"),
    lambda stub: stub.cleanup(),
]
"""A call of each method."""


def expect_unavailable(stub: Stub) -> None:
    for call in CALLS:
        with refused(StatusCode.UNAVAILABLE):
            call(stub)


def test_calls_are_unavailable_until_the_service_starts_again(
    on_bus: str, scratch: Path, tmp_path: Path
) -> None:
    with plugin(on_bus, tmp_path) as running, connected(running.socket) as stub:
        expect_unavailable(stub)
        with run_daemon(on_bus, scratch / "state"):
            stub.prepare("work", labels={"a": "b"})
            before = stub.list()
        expect_unavailable(stub)
        with run_daemon(on_bus, scratch / "state"):
            assert stub.list() == before
            stub.commit("base", "work")


def test_the_plugin_connects_to_a_bus_that_replaces_the_one_it_has_lost(
    scratch: Path, tmp_path: Path
) -> None:
    link = tmp_path / "bus"
    address = f"unix:path={link}"

    @contextmanager
    def bus() -> Iterator[None]:
        with private_bus() as real:
            link.symlink_to(real.removeprefix("unix:path="))
            yield
            link.unlink()

    with plugin(address, tmp_path) as running, connected(running.socket) as stub:
        expect_unavailable(stub)
        with ExitStack() as first:
            first.enter_context(bus())
            with run_daemon(address, scratch / "state", status=1) as service:
                stub.prepare("work", labels={"a": "b"})
                before = stub.list()
                first.close()
                service.daemon.process.wait(HANG_TIMEOUT)
        expect_unavailable(stub)
        with bus(), run_daemon(address, scratch / "state"):
            assert stub.list() == before
            stub.commit("base", "work")


@pytest.fixture(scope="module")
def base_image(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Write an image with one layer."""
    path = tmp_path_factory.mktemp("base") / "image.tar"
    write_image(path, [programs()], "example.com/base:1")
    return path


@pytest.fixture(scope="module")
def image(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Write an image with two layers on that of `base_image`."""
    path = tmp_path_factory.mktemp("image") / "image.tar"
    write_image(path, [programs(), layer(("second", b"2")), layer(("third", b"3"))])
    return path


@contextmanager
def unpacking(
    daemon: Containerd, client: BlockingClient, base_image: Path, image: Path
) -> Iterator[tuple[HeldProcesses, Future[str]]]:
    """Import an image, which must fail; hold the copy of its first layer for the second."""
    daemon.ctr("images", "import", "--snapshotter", "snapd-native", str(base_image))
    (below,) = [info.name for info in client.walk() if info.name.startswith("containerd/")]
    tree = Path(client.view("look", below).source)
    client.remove("look")
    importing = ["images", "import", "--snapshotter", "snapd-native", str(image)]
    with ThreadPoolExecutor() as pool, hold_at_files(tree / "bin" / "busybox") as held:
        failing = pool.submit(daemon.ctr, *importing, fails=True)
        held.wait_until_reached()
        yield held, failing
        failing.result(HANG_TIMEOUT)


def expect_recovery(daemon: Containerd, service: Service, image: Path) -> None:
    """Check that the image can be imported and run, and that only foreign snapshots stay."""
    daemon.ctr("images", "import", "--snapshotter", "snapd-native", str(image))
    assert daemon.run("snapd-native", "cat /second /third") == "23"
    # A killed containerd leaves the lease of the import, which lasts for a day.
    for lease in daemon.ctr("leases", "ls", "--quiet").split():
        daemon.ctr("leases", "rm", lease)
    daemon.ctr("images", "rm", "--sync", IMAGE, "example.com/base:1")
    assert daemon.snapshots("snapd-native") == []
    wait_until_idle(service)
    with BlockingClient() as client:
        client.cleanup()
        names = [info.name for info in client.walk()]
    assert names == ["theirs"]
    assert len([path for path in service.directories() if "/" not in path]) == 1


@pytest.fixture
def theirs(shared_client: BlockingClient) -> None:
    """Commit a snapshot that is not of a containerd."""
    commit_snapshot(shared_client, "theirs", files={"file": "text"})


@pytest.mark.usefixtures("theirs")
def test_an_import_succeeds_after_the_plugin_was_killed_in_an_unpack(
    shared_service: Service,
    shared_client: BlockingClient,
    base_image: Path,
    image: Path,
    tmp_path: Path,
) -> None:
    with ExitStack() as first:
        running = first.enter_context(plugin(shared_service.address, tmp_path))
        with containerd(running.socket) as daemon:
            with unpacking(daemon, shared_client, base_image, image):
                running.process.kill()
                running.process.wait()
            first.close()
            with plugin(shared_service.address, tmp_path):
                daemon.wait_until_connected()
                expect_recovery(daemon, shared_service, image)


@pytest.mark.usefixtures("theirs")
def test_an_import_succeeds_after_containerd_was_killed_in_an_unpack(
    shared_service: Service,
    shared_client: BlockingClient,
    lasting_plugin: Plugin,
    base_image: Path,
    image: Path,
) -> None:
    with containerd(lasting_plugin.socket) as daemon:
        with unpacking(daemon, shared_client, base_image, image):
            daemon.kill()
            wait_until(lambda: shared_client.jobs() == [])
        daemon.start()
        expect_recovery(daemon, shared_service, image)


@pytest.mark.parametrize("restarted", ["containerd", "everything"])
def test_a_snapshot_without_its_directory_does_not_prevent_a_start(
    on_bus: str, scratch: Path, base_image: Path, image: Path, tmp_path: Path, restarted: str
) -> None:
    with ExitStack() as first:
        service = first.enter_context(run_daemon(on_bus, scratch / "state"))
        running = first.enter_context(plugin(on_bus, tmp_path))
        with containerd(running.socket) as daemon, BlockingClient() as client:
            for path in (base_image, image):
                daemon.ctr("images", "import", "--snapshotter", "snapd-native", str(path))
            before = daemon.snapshots("snapd-native")
            newest = max(client.walk(), key=lambda info: info.created)
            damaged = Path(client.view("look", newest.name).source)
            client.remove("look")
            daemon.kill()
            shutil.rmtree(unsealed(damaged))
            if restarted == "everything":
                first.close()
                service = first.enter_context(run_daemon(on_bus, scratch / "state"))
                first.enter_context(plugin(on_bus, tmp_path))
            daemon.start()
            assert daemon.snapshots("snapd-native") == before
            lines = ["run", "--rm", "--snapshotter", "snapd-native", IMAGE, "c1", "/bin/sh"]
            assert "directory is gone" in daemon.ctr(*lines, fails=True)
            daemon.ctr("images", "rm", "--sync", IMAGE)
            daemon.ctr("images", "import", "--snapshotter", "snapd-native", str(image))
            assert daemon.run("snapd-native", "cat /second /third") == "23"
            daemon.ctr("images", "rm", "--sync", IMAGE, "example.com/base:1")
            with BlockingClient() as client:
                client.cleanup()
                assert [*client.walk()] == []
            assert service.directories() == []


def test_the_socket_is_for_root_only_and_is_removed_at_the_end(on_bus: str, tmp_path: Path) -> None:
    path = tmp_path / "new" / "containerd.sock"
    path.parent.mkdir(0o755)
    path.parent.rmdir()
    with plugin(on_bus, tmp_path, "containerd", "--socket", str(path)):
        socket_mode, directory_mode = (os.stat(at).st_mode for at in (path, path.parent))
        assert stat.S_ISSOCK(socket_mode)
        assert stat.S_IMODE(socket_mode) == 0o600
        assert stat.S_IMODE(directory_mode) == 0o700
        with connected(path) as stub:
            expect_unavailable(stub)
    assert not path.exists()


def test_a_plugin_replaces_the_socket_of_one_that_was_killed(on_bus: str, tmp_path: Path) -> None:
    with plugin(on_bus, tmp_path) as running:
        running.process.kill()
        running.process.wait()
    assert running.socket.is_socket()
    with plugin(on_bus, tmp_path), connected(running.socket) as stub:
        expect_unavailable(stub)


def expect_start_failure(
    kind: type[SnapdError],
    path: Path,
    *says: str,
    name: str = "containerd",
    user: int = 0,
    program: Sequence[str] = PROGRAM,
) -> None:
    """Start a plugin, which must fail with one sentence and the exit status of an error."""
    done = subprocess.run(
        [*as_user(user), *command(path, name, program=program)],
        check=False,
        capture_output=True,
        text=True,
        timeout=HANG_TIMEOUT,
    )
    assert (done.returncode, done.stdout) == (STATUSES[kind], "")
    (line,) = done.stderr.splitlines()
    assert line.startswith("snapd-native: ")
    check_sentence(line.removeprefix("snapd-native: "), *says)


def test_a_second_plugin_on_a_socket_fails_and_leaves_the_first(
    on_bus: str, tmp_path: Path
) -> None:
    with plugin(on_bus, tmp_path) as running, connected(running.socket) as stub:
        expect_start_failure(FailedPrecondition, running.socket, str(running.socket), "serves")
        expect_unavailable(stub)
        assert running.socket.is_socket()


def test_a_socket_of_a_process_that_listens_without_accepting_is_refused(
    on_bus: str, tmp_path: Path
) -> None:
    path = tmp_path / "socket"
    with socket.socket(socket.AF_UNIX) as busy, socket.socket(socket.AF_UNIX) as waiting:
        busy.bind(str(path))
        busy.listen(0)
        waiting.connect(str(path))
        expect_start_failure(FailedPrecondition, path, str(path), "serves")
    assert path.is_socket()


@pytest.mark.parametrize("kind", ["file", "directory", "symlink"])
def test_a_path_that_is_not_a_socket_is_refused_and_left(
    on_bus: str, tmp_path: Path, kind: str
) -> None:
    path = tmp_path / "taken"
    if kind == "file":
        path.write_text("text")
    elif kind == "directory":
        path.mkdir()
    else:
        path.symlink_to("elsewhere")
    before = path.lstat()
    expect_start_failure(FailedPrecondition, path, str(path), "not a socket")
    after = path.lstat()
    assert (after.st_ino, after.st_mtime) == (before.st_ino, before.st_mtime)


def test_the_path_of_the_socket_is_taken_literally(on_bus: str, tmp_path: Path) -> None:
    """An address of gRPC is a URI, in which % has a meaning."""
    place = tmp_path / "a%41 ü"
    place.mkdir()
    with plugin(on_bus, place) as running, connected(running.socket) as stub:
        assert running.socket.is_socket()
        expect_unavailable(stub)
    assert {path.name for path in tmp_path.iterdir()} == {place.name}


def test_a_path_longer_than_that_of_a_socket_is_refused(on_bus: str, tmp_path: Path) -> None:
    length = 108 - len(f"{tmp_path}/")
    expect_start_failure(InvalidArgument, tmp_path / ("s" * length), "107 bytes")


def test_a_directory_that_cannot_be_made_is_named(on_bus: str, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("text")
    path = tmp_path / "file" / "containerd.sock"
    expect_start_failure(Unavailable, path, str(path), "cannot be made")


def test_a_directory_in_which_no_socket_can_be_made_is_named(on_bus: str) -> None:
    path = Path("/proc/containerd.sock")
    expect_start_failure(Unavailable, path, str(path), "cannot be made", "No such file")


@pytest.mark.parametrize("name", ["", "a/b", "-a", "ä", "n" * 65, "a\nb"])
def test_an_invalid_name_is_refused(on_bus: str, tmp_path: Path, name: str) -> None:
    expect_start_failure(InvalidArgument, tmp_path / "socket", "name", name=name)
    assert not (tmp_path / "socket").exists()


def test_only_root_can_run_the_plugin(on_bus: str, tmp_path: Path) -> None:
    expect_start_failure(AccessDenied, tmp_path / "socket", "root", user=NOBODY)


@pytest.mark.parametrize("missing", ["grpc", "google.protobuf"])
def test_a_missing_python_package_is_named(on_bus: str, tmp_path: Path, missing: str) -> None:
    program = ("-P", "-c", _WITHOUT.format(missing))
    expect_start_failure(
        Unavailable, tmp_path / "socket", missing, "snapd-native-containerd", program=program
    )


_WITHOUT = "import sys; sys.modules[{!r}] = None; from snapd_native.cli import main; main()"
"""A program that cannot import a module."""


def test_a_plugin_that_ends_undoes_a_prepare(
    shared_service: Service, shared_client: BlockingClient, tmp_path: Path
) -> None:
    with (
        plugin(shared_service.address, tmp_path, program=WITHOUT_GRACE) as running,
        connected(running.socket) as stub,
    ):
        tree = Path(stub.prepare("making").source)
        (tree / "file").write_text("text")
        stub.commit("base", "making")
        before = [*shared_client.walk()], shared_service.directories()
        with hold_at_files(tree / "file") as held:
            request = wire.CreateRequest(key="work", parent="base")
            preparing = stub.begin("Prepare", request, wire.MountsResponse)
            held.wait_until_reached()
            assert running.stop() == 0
            with pytest.raises(grpc.RpcError):
                preparing.result()
        wait_until_idle(shared_service)
        shared_client.cleanup()
        assert ([*shared_client.walk()], shared_service.directories()) == before
