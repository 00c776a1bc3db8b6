"""The typed clients: their methods and exceptions, also when the daemon or the bus ends."""

from __future__ import annotations

import asyncio
import inspect
import os
import signal
import socket
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from snapd_native import __version__, errors
from snapd_native.client import BlockingClient, Client, Service, asynchronous
from snapd_native.errors import InvalidArgument, SnapdError, Unavailable
from snapd_native.model import Added, Committed, Info, Kind, Mount, Removed, Updated
from snapd_native.snapshotter import Snapshotter
from snapd_native.snapshotter.mounter import Mounter
from snapd_native.snapshotter.upkeep import Upkeep
from snapd_native.wire.names import error_from, error_name
from tests.support import service as running
from tests.support.descriptors import THIS_PROCESS, nothing_left_open
from tests.support.file_systems import FileSystem, scratch_on
from tests.support.holding import hold_workers
from tests.support.service import (
    HANG_TIMEOUT,
    NOBODY,
    commit_snapshot,
    expect_error,
    run_daemon,
    run_daemon_until_bus_ends,
    run_with_client,
    wait_until_reserved,
)


def test_the_asynchronous_client_can_make_every_snapshot_call(
    shared_service: running.Service, filesystem: FileSystem
) -> None:
    async def scenario(client: Client) -> None:
        assert await client.service() == Service(
            __version__, str(shared_service.state), filesystem.name, filesystem.reflink
        )
        mount = await client.prepare("key", labels={"a": "1"})
        assert mount == Mount("bind", mount.source, ("rbind", "rw"))
        assert await client.mounts("key") == mount
        (Path(mount.source) / "file").write_text("text")
        assert (await client.usage("key")).inodes == 2
        await client.commit("base", "key", {"b": "2"})
        info = await client.stat("base")
        assert info == Info("base", Kind.COMMITTED, "", info.created, info.updated, {"b": "2"})
        assert (await client.update("base", {"c": "3"}, ["labels.c"])).labels == {
            "b": "2",
            "c": "3",
        }
        view = await client.view("view", "base", {"d": "4"})
        assert view == Mount("bind", mount.source, ("rbind", "ro"))
        await client.prepare("orphan")
        await client.commit("child", "orphan", parent="base")
        listed = [info.name for info in await client.list(["parent==base"], after="a", limit=1)]
        assert listed == ["child"]
        assert [info.name async for info in client.walk()] == ["base", "child", "view"]
        for key in ("view", "child", "base"):
            await client.remove(key)
        await client.cleanup()
        assert await client.list() == []

    run_with_client(scenario)


def test_the_blocking_client_can_make_every_snapshot_call(
    shared_service: running.Service, filesystem: FileSystem
) -> None:
    with BlockingClient() as client:
        assert client.service() == Service(
            __version__, str(shared_service.state), filesystem.name, filesystem.reflink
        )
        mount = client.prepare("key", labels={"a": "1"})
        assert client.mounts("key") == mount
        assert client.usage("key").inodes == 1
        client.commit("base", "key", {"b": "2"})
        assert client.stat("base").labels == {"b": "2"}
        assert client.update("base", {"c": "3"}).labels == {"c": "3"}
        assert client.view("view", "base").options == ("rbind", "ro")
        client.prepare("orphan")
        client.commit("child", "orphan", parent="base")
        assert [info.name for info in client.list(["parent==base"], "a", 1)] == ["child"]
        assert [info.name for info in client.walk(["kind!=view"])] == ["base", "child"]
        for key in ("view", "child", "base"):
            client.remove(key)
        client.cleanup()
        assert list(client.walk()) == []


def test_both_clients_and_snapshotter_have_the_same_methods() -> None:
    def methods(kind: type) -> dict[str, list[str]]:
        return {
            name: list(inspect.signature(method).parameters)
            for name, method in inspect.getmembers(kind, inspect.isfunction)
            if not name.startswith("_")
        }

    asynchronous, blocking = methods(Client), methods(BlockingClient)
    del asynchronous["changes"]
    assert asynchronous == blocking
    engine = {**methods(Snapshotter), **methods(Mounter), **methods(Upkeep)}
    for name in blocking.keys() & engine.keys():
        # The service adds these parameters. A client has ``progress`` instead of ``job``, and
        # ``lifetime`` instead of ``owner``; it calls BackgroundUsage for ``idle``.
        inner = {"job", "uid", "owner", "is_wanted", "idle"}
        common = [parameter for parameter in engine[name] if parameter not in inner]
        own = {"progress", "lifetime"}
        assert [parameter for parameter in blocking[name] if parameter not in own] == common
    alone = {"service", "walk", "jobs", "progress", "cancel", "background_usage"}
    assert blocking.keys() - engine.keys() == alone


ERROR_CLASSES = [
    kind for kind in vars(errors).values() if inspect.isclass(kind) and kind is not SnapdError
]


@pytest.mark.parametrize("kind", ERROR_CLASSES)
def test_every_exception_converts_to_an_error_name_and_back(kind: type[SnapdError]) -> None:
    sent = kind("a sentence")
    received = error_from(error_name(sent), sent.message)
    assert type(received) is kind
    assert received.message == "a sentence"


INVALID_CALLS: list[Callable[[BlockingClient | Snapshotter], object]] = [
    lambda c: c.prepare(""),
    lambda c: c.prepare("new", "none"),
    lambda c: c.prepare("new", "key"),
    lambda c: c.prepare("key"),
    lambda c: c.prepare("k" * 5000),
    lambda c: c.prepare("new", labels={"": "v"}),
    lambda c: c.view("\x1b[31m", "none\n"),
    lambda c: c.commit("base", "key"),
    lambda c: c.commit("new", "base"),
    lambda c: c.commit("new", "none"),
    lambda c: c.mounts("base"),
    lambda c: c.stat("none"),
    lambda c: c.update("key", {}, ["bad"]),
    lambda c: c.usage("none"),
    lambda c: c.list(["bad="]),
    lambda c: c.list(limit=0),
    lambda c: c.remove("none"),
]


def test_the_client_raises_the_same_errors_as_snapshotter(
    shared_client: BlockingClient, scratch: Path
) -> None:
    """The exception and its message are the same with and without a bus."""
    commit_snapshot(shared_client, "base")
    shared_client.prepare("key")
    engine = Snapshotter(scratch / "engine", lambda *_: None)
    try:
        engine.prepare("making")
        engine.commit("base", "making")
        engine.prepare("key")
        for mistake in INVALID_CALLS:
            found = []
            for side in (engine, shared_client):
                with pytest.raises(SnapdError) as caught:
                    mistake(side)
                found.append((type(caught.value), caught.value.message))
            assert found[0] == found[1]
    finally:
        engine.close()


def test_changes_yields_only_changes_after_its_start(shared_service: running.Service) -> None:
    async def scenario(client: Client) -> None:
        await client.prepare("before")
        async with Client() as other, other.changes() as changes:
            await client.prepare("key")
            await client.commit("name", "key")
            await client.update("name", {"a": "1"})
            await client.view("view", "name")
            await client.remove("view")
            expected = [
                Added("key", Kind.ACTIVE, ""),
                Committed("name", "key"),
                Updated("name"),
                Added("view", Kind.VIEW, "name"),
                Removed("view"),
            ]
            assert [await anext(changes) for _ in expected] == expected

    run_with_client(scenario)


def test_changes_can_be_watched_twice_at_once_and_again_later(
    shared_service: running.Service,
) -> None:
    async def scenario(client: Client) -> None:
        async with client.changes() as first, client.changes() as second:
            await client.view("a")
            assert await anext(first) == await anext(second) == Added("a", Kind.VIEW, "")
        await client.view("b")
        async with client.changes() as third:
            await client.view("c")
            assert await anext(third) == Added("c", Kind.VIEW, "")

    run_with_client(scenario)


def test_walk_yields_the_snapshots_of_all_pages(
    on_bus: str, ext4: FileSystem, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(asynchronous, "PAGE", 20)
    names = [f"{number:04}" for number in range(41)]

    async def scenario(client: Client) -> None:
        await client.prepare("making")
        await client.commit("base", "making")
        await asyncio.gather(*(client.view(name, "base") for name in names))
        assert [info.name async for info in client.walk()] == [*names, "base"]
        assert [info.name async for info in client.walk(["kind==view"])] == names

    with (
        scratch_on(ext4) as scratch,
        run_daemon(on_bus, scratch / "state"),
        BlockingClient() as client,
    ):
        run_with_client(scenario)
        walk = client.walk()
        assert next(walk).name == "0000"
        client.remove("0010")
        client.remove("0019")
        client.view("0019½", "base")
        rest = [info.name for info in walk]
        assert rest[:18] == names[1:19]
        assert rest[-2:] == ["0040", "base"]


BAD_TEXT = ["\ud800", "a\udcffb", "\0", "a\0b"]


@pytest.mark.parametrize("text", BAD_TEXT, ids=ascii)
def test_text_that_dbus_cannot_carry_raises_invalid_argument(
    shared_client: BlockingClient, text: str
) -> None:
    calls: list[Callable[[], object]] = [
        lambda: shared_client.prepare(text),
        lambda: shared_client.prepare("new", text),
        lambda: shared_client.prepare("new", "", {text: "v"}),
        lambda: shared_client.view("new", "", {"k": text}),
        lambda: shared_client.commit(text, "key"),
        lambda: shared_client.commit("new", "key", parent=text),
        lambda: shared_client.mounts(text),
        lambda: shared_client.stat(text),
        lambda: shared_client.update("key", {text: ""}),
        lambda: shared_client.update("key", {}, [f"labels.{text}"]),
        lambda: shared_client.usage(text),
        lambda: shared_client.list([text]),
        lambda: shared_client.list(after=text),
        lambda: shared_client.remove(text),
    ]
    shared_client.prepare("key")
    for call in calls:
        with expect_error(InvalidArgument):
            call()
    assert [info.name for info in shared_client.list()] == ["key"]


def test_a_limit_that_dbus_cannot_carry_raises_invalid_argument(
    shared_client: BlockingClient,
) -> None:
    for limit in (-1, 1 << 32):
        with expect_error(InvalidArgument):
            shared_client.list(limit=limit)
    assert shared_client.list() == []


@pytest.mark.parametrize("address", ["unix:path=/nonexistent/socket", "nonsense", "", "tcp:"])
def test_a_client_without_a_bus_raises_unavailable(
    address: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DBUS_SYSTEM_BUS_ADDRESS", address)
    if not address and Path("/run/dbus/system_bus_socket").exists():
        pytest.skip("an empty address means the machine's own bus")
    with expect_error(Unavailable, "system bus"), BlockingClient():
        pass
    with expect_error(Unavailable, "system bus"):
        run_with_client(lambda client: client.list())


def test_a_client_raises_unavailable_when_the_bus_closes_the_connection(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DBUS_SYSTEM_BUS_ADDRESS", f"unix:path={tmp_path / 'socket'}")
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind(str(tmp_path / "socket"))
        listening.listen()
        thread = threading.Thread(target=lambda: listening.accept()[0].close())
        thread.start()
        with expect_error(Unavailable, f"at unix:path={tmp_path}/socket does not answer"):
            BlockingClient().__enter__()
        thread.join()


def test_the_error_for_a_silent_bus_names_the_time_limit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DBUS_SYSTEM_BUS_ADDRESS", f"unix:path={tmp_path / 'socket'}")
    monkeypatch.setattr("snapd_native.wire.connection.CONNECT_SECONDS", 0.1)
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind(str(tmp_path / "socket"))
        listening.listen()
        with expect_error(Unavailable, "does not answer (no reply within 0.1 s)", "restart dbus"):
            BlockingClient().__enter__()


def test_a_client_raises_unavailable_when_the_bus_rejects_its_uid(on_bus: str) -> None:
    """The bus sees the effective uid of the client, but the client sends its real uid."""
    os.seteuid(NOBODY)
    try:
        with expect_error(Unavailable, "does not answer"), BlockingClient():
            pass
    finally:
        os.seteuid(0)


def test_a_client_outside_its_with_block_raises_unavailable(on_bus: str) -> None:
    with expect_error(Unavailable, "with statement"):
        asyncio.run(Client().list())


def test_a_client_reaches_a_daemon_that_starts_later(on_bus: str, scratch: Path) -> None:
    with BlockingClient() as client:
        for _ in range(2):
            with expect_error(Unavailable, "the service is not running", "systemctl start"):
                client.list()
            with run_daemon(on_bus, scratch / "state"):
                assert client.list() == []


def test_a_call_raises_unavailable_when_the_daemon_is_killed(on_bus: str, scratch: Path) -> None:
    with run_daemon(on_bus, scratch / "state", status=-signal.SIGKILL) as service:

        async def scenario(client: Client) -> None:
            with hold_workers(service):
                preparing = asyncio.ensure_future(client.prepare("key", "base"))
                async with Client() as other:
                    await wait_until_reserved(other, "key")
                    service.daemon.process.kill()
                    with expect_error(Unavailable, "ended before it answered"):
                        await preparing
                    with expect_error(Unavailable, "not running"):
                        await other.list()

        with BlockingClient() as client:
            commit_snapshot(client, "base")
        run_with_client(scenario)


def test_a_call_raises_unavailable_when_the_bus_ends(
    scratch: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with run_daemon_until_bus_ends(scratch / "state") as (service, end_bus):

        async def scenario(client: Client) -> None:
            with hold_workers(service):
                preparing = asyncio.ensure_future(client.prepare("key", "base"))
                async with Client() as other:
                    await wait_until_reserved(other, "key")
                await asyncio.to_thread(end_bus)
                with expect_error(Unavailable, "the system bus is gone"):
                    await preparing
            with expect_error(Unavailable, "the system bus is gone"):
                await client.list()

        with BlockingClient() as client:
            commit_snapshot(client, "base")
        run_with_client(scenario)
    assert caplog.text == ""


def test_changes_raises_unavailable_when_the_bus_ends(scratch: Path) -> None:
    with run_daemon_until_bus_ends(scratch / "state") as (_, end_bus):

        async def scenario(client: Client) -> None:
            async with client.changes() as changes:
                await client.view("key")
                await asyncio.to_thread(end_bus)
                assert await anext(changes) == Added("key", Kind.VIEW, "")
                with expect_error(Unavailable, "the system bus is gone"):
                    async with asyncio.timeout(HANG_TIMEOUT):
                        await anext(changes)

        run_with_client(scenario)


def test_a_closed_client_leaves_no_open_descriptors(shared_service: running.Service) -> None:
    with nothing_left_open(THIS_PROCESS):
        for _ in range(20):
            with BlockingClient() as client:
                client.list()
