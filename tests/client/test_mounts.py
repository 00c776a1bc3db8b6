"""The mount calls of the client, and detached mounts that a caller attaches."""

from __future__ import annotations

import asyncio
import errno
import gc
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest

from snapd_native.client import BlockingClient, Client
from snapd_native.errors import InvalidArgument, SnapdError, Unavailable
from snapd_native.model import Lifetime, Mounted
from snapd_native.snapshotter.mounter import Mounter
from tests.support.bus_mounts import is_unmounted, list_mounts
from tests.support.descriptors import (
    THIS_PROCESS,
    descriptors,
    nothing_left_open,
    wait_until_closed,
)
from tests.support.engine import open_engine
from tests.support.file_systems import on_ext4
from tests.support.kernel_mounts import make_target, mount_tmpfs, mounted_on, mounts_below
from tests.support.sealing import unsealed
from tests.support.service import Service, run_with_client
from tests.support.waiting import wait_until

pytestmark = on_ext4


def test_the_asynchronous_client_can_make_every_mount_call(
    populated_service: Service, places: Path
) -> None:
    here, there = (str(make_target(places, name)) for name in ("here", "there"))

    async def scenario(client: Client) -> None:
        assert await client.list_mounts() == []
        assert await client.mount("work", here) == here
        assert await client.mount("look", there, lifetime=Lifetime.CLIENT) == there
        own = await client.mount("work", read_only=True)
        assert type(own) is str
        rows = [
            Mounted(here, "work", False, Lifetime.PERSISTENT, 0),
            Mounted(there, "look", True, Lifetime.CLIENT, 0),
            Mounted(own, "work", True, Lifetime.PERSISTENT, 0),
        ]
        assert await client.list_mounts() == rows
        assert await client.list_mounts("look") == rows[1:2]
        (row,) = await client.list_mounts("look")
        assert [type(value) for value in (row.read_only, row.lifetime, row.uid)] == [
            bool,
            Lifetime,
            int,
        ]
        await client.unmount(own)
        await client.unmount(here, lazy=True)
        fd = await client.open_tree("work")
        assert not os.get_inheritable(fd)
        os.close(fd)

    run_with_client(scenario)
    wait_until(lambda: is_unmounted(Path(there)))
    assert mounts_below(places) == []


def test_the_blocking_client_can_make_every_mount_call(
    populated_service: Service, places: Path
) -> None:
    here = str(make_target(places))
    with BlockingClient() as client:
        assert client.mount("work", target=here, read_only=True) == here
        row = Mounted(here, "work", True, Lifetime.PERSISTENT, 0)
        assert client.list_mounts("work") == client.list_mounts() == [row]
        client.unmount(here)
        assert client.mount("look", here, None, Lifetime.CLIENT) == here
        fd = client.open_tree("look", read_only=True)
        assert not os.get_inheritable(fd)
    wait_until(lambda: is_unmounted(Path(here)))
    # The descriptor stays open after the client is closed.
    assert Path(f"/proc/self/fd/{fd}/file").read_text() == "text"
    os.close(fd)


Calling = Callable[["Mounter | BlockingClient", str], object]

FAILURES: list[Calling] = [
    lambda s, _: s.mount("", ""),
    lambda s, _: s.mount("none", ""),
    lambda s, _: s.mount("base", ""),
    lambda s, _: s.mount("work", "relative"),
    lambda s, here: s.mount("work", f"{here}/none"),
    lambda s, here: s.mount("look", here, read_only=False),
    lambda s, here: [s.mount("work", here), s.mount("look", here)],
    lambda s, here: s.unmount(f"{here}/none"),
    lambda s, _: s.unmount("relative"),
    lambda s, here: s.unmount(here, lazy=True),
    lambda s, _: s.list_mounts("none"),
    lambda s, _: s.list_mounts("k" * 5000),
    lambda s, _: s.open_tree(""),
    lambda s, _: s.open_tree("none"),
    lambda s, _: s.open_tree("base"),
    lambda s, _: s.open_tree("look", read_only=False),
    lambda s, _: s.open_tree("lost"),
    lambda s, _: s.mount("lost", ""),
]


def error_of(call: Calling, on: Mounter | BlockingClient, here: str) -> tuple[type, str]:
    with pytest.raises(SnapdError) as caught:
        call(on, here)
    with suppress(SnapdError):
        on.unmount(here)
    return type(caught.value), caught.value.message


def test_the_client_raises_the_same_errors_as_mounter(
    populated_service: Service, shared_client: BlockingClient, scratch: Path, places: Path
) -> None:
    here = str(make_target(places))
    shutil.rmtree(shared_client.prepare("lost").source)
    with open_engine(scratch / "state") as engine:
        engine.prepare("making")
        engine.commit("base", "making")
        engine.prepare("work", "base")
        engine.view("look", "base")
        shutil.rmtree(engine.prepare("lost").source)
        for call in FAILURES:
            assert error_of(call, shared_client, here) == error_of(call, engine.mounter, here)
    assert mounts_below(places) == []


@pytest.mark.parametrize(
    "call",
    [
        lambda c: c.mount(1, ""),
        lambda c: c.mount("work", 1),
        lambda c: c.mount("work\0", ""),
        lambda c: c.mount("work", "/\udcff"),
        lambda c: c.list_mounts(None),
        lambda c: c.open_tree(None),
        lambda c: c.open_tree("\0"),
    ],
)
def test_arguments_that_dbus_cannot_carry_raise_invalid_argument(
    populated_service: Service,
    shared_client: BlockingClient,
    call: Callable[[BlockingClient], object],
) -> None:
    with pytest.raises(InvalidArgument):
        call(shared_client)
    assert shared_client.list_mounts() == []


ATTACHING_PROGRAM = """
import os, sys
from snapd_native import linux
tree, here = int(sys.argv[1]), sys.argv[2]
linux.move_mount(tree, os.open(here, os.O_PATH))
print(open(here + "/file").read())
for name in ("new", "inside/new"):
    try:
        open(f"{here}/{name}", "w").write("more")
        print("written")
    except OSError as error:
        print(error.errno)
print(flush=True)
input()
"""


@contextmanager
def attach_in_namespace(tree: int, target: Path) -> Iterator[Sequence[str]]:
    """Attach a tree in a new mount namespace; yield the output of `ATTACHING_PROGRAM`, by lines."""
    unshare = ["unshare", "--mount", "--propagation", "private"]
    with subprocess.Popen(
        [*unshare, sys.executable, "-c", ATTACHING_PROGRAM, str(tree), str(target)],
        pass_fds=[tree],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stdout
        yield [line.rstrip() for line in iter(process.stdout.readline, "\n")]
        process.communicate("\n")
        assert process.returncode == 0


@pytest.mark.parametrize(
    ("key", "read_only", "outcome"),
    [
        ("work", None, "written"),
        ("work", False, "written"),
        ("work", True, str(errno.EROFS)),
        ("look", None, str(errno.EROFS)),
        ("look", True, str(errno.EROFS)),
    ],
)
def test_a_caller_can_attach_a_tree_in_its_own_mount_namespace(
    populated_service: Service,
    shared_client: BlockingClient,
    places: Path,
    key: str,
    read_only: bool | None,
    outcome: str,
) -> None:
    here = make_target(places)
    source = Path(shared_client.mounts(key).source)
    if key == "look":
        unsealed(source)
    (source / "inside").mkdir()
    with mount_tmpfs(source / "inside"):
        before = mounts_below(places.parent)
        tree = shared_client.open_tree(key, read_only)
        try:
            with attach_in_namespace(tree, here) as seen:
                # Mounts inside a snapshot are part of the tree.
                assert seen == ["text", outcome, outcome]
                assert mounts_below(places.parent) == before
                assert list(here.iterdir()) == []
        finally:
            os.close(tree)
        assert list_mounts() == []
        for path in (source / "new", source / "inside" / "new"):
            assert path.exists() is (outcome == "written")
    (source / "inside").rmdir()


def test_a_tree_attached_on_the_host_blocks_remove_until_unmounted(
    populated_service: Service, shared_client: BlockingClient, places: Path
) -> None:
    here = make_target(places)
    tree = shared_client.open_tree("work")
    with subprocess.Popen(
        [sys.executable, "-c", ATTACHING_PROGRAM, str(tree), str(here)],
        pass_fds=[tree],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    ) as process:
        os.close(tree)
        process.communicate(b"\n")
    # The service has no record of the mount, but Remove finds it.
    assert mounted_on(here)
    assert shared_client.list_mounts() == []
    with pytest.raises(SnapdError, match=str(here)):
        shared_client.remove("work")
    subprocess.run(["umount", str(here)], check=True)
    shared_client.remove("work")


@pytest.fixture
def no_garbage_collection() -> Iterator[None]:
    """Disable the garbage collector, so that it closes no descriptors."""
    gc.collect()
    gc.disable()
    yield
    gc.enable()
    gc.collect()


@pytest.mark.usefixtures("no_garbage_collection")
def test_a_cancelled_open_tree_leaves_no_open_descriptor(populated_service: Service) -> None:
    """Neither the client nor the service keeps the descriptor of a cancelled call open."""

    async def scenario(client: Client) -> None:
        await client.list_mounts()
        before = {process: descriptors(process) for process in (THIS_PROCESS, populated_service)}
        for _ in range(20):
            calls = [asyncio.ensure_future(client.open_tree("work")) for _ in range(50)]
            await asyncio.sleep(0)
            for call in calls:
                call.cancel()
            outcomes = await asyncio.gather(*calls, return_exceptions=True)
            assert all(isinstance(outcome, asyncio.CancelledError) for outcome in outcomes)
            await client.list_mounts()
        # Some replies can arrive after the last one.
        for process, there in before.items():
            await asyncio.to_thread(wait_until_closed, process, there)

    run_with_client(scenario)


@pytest.mark.usefixtures("no_garbage_collection")
def test_a_client_that_leaves_closes_the_trees_that_it_has_not_returned(
    populated_service: Service,
) -> None:
    async def scenario(client: Client) -> None:
        calls = [asyncio.ensure_future(client.open_tree("work")) for _ in range(50)]
        await asyncio.wait(calls, return_when=asyncio.FIRST_COMPLETED)
        await client.__aexit__(None, None, None)
        for outcome in await asyncio.gather(*calls, return_exceptions=True):
            if isinstance(outcome, int):
                os.close(outcome)
            else:
                assert isinstance(outcome, Unavailable)

    with nothing_left_open(THIS_PROCESS):
        for _ in range(5):
            run_with_client(scenario)


@pytest.mark.usefixtures("no_garbage_collection")
@pytest.mark.parametrize("rounds", [5, pytest.param(200, marks=pytest.mark.long)])
def test_open_tree_returns_a_descriptor_that_the_caller_owns(
    populated_service: Service, rounds: int
) -> None:
    async def scenario(client: Client) -> None:
        with nothing_left_open(THIS_PROCESS):
            for _ in range(rounds):
                before = descriptors(THIS_PROCESS)
                trees = await asyncio.gather(*(client.open_tree("work") for _ in range(50)))
                assert len(set(trees)) == (descriptors(THIS_PROCESS) - before).total() == 50
                for tree in trees:
                    assert not os.get_inheritable(tree)
                    os.close(tree)

    run_with_client(scenario)
