"""The client's calls about mounts, and what can be done with the trees that it gets."""

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
from snapd_native.snapshotter.mounting import Mounter
from tests.bus_mounting import has_open, is_gone, listed, stocked_with_snapshots
from tests.engines import opened
from tests.filesystems import on_ext4
from tests.mounting import below, mounted_on, place, tmpfs
from tests.service import Service, run
from tests.waiting import eventually

pytestmark = on_ext4


@pytest.fixture
def stocked(shared: Service) -> Iterator[Service]:
    with stocked_with_snapshots(shared) as service:
        yield service


def test_the_calls(stocked: Service, places: Path) -> None:
    here, there = (str(place(places, name)) for name in ("here", "there"))

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

    run(scenario)
    eventually(lambda: is_gone(Path(there)))
    assert below(places) == []


def test_the_calls_without_an_event_loop(stocked: Service, places: Path) -> None:
    here = str(place(places))
    with BlockingClient() as client:
        assert client.mount("work", target=here, read_only=True) == here
        row = Mounted(here, "work", True, Lifetime.PERSISTENT, 0)
        assert client.list_mounts("work") == client.list_mounts() == [row]
        client.unmount(here)
        assert client.mount("look", here, None, Lifetime.CLIENT) == here
        fd = client.open_tree("look", read_only=True)
        assert not os.get_inheritable(fd)
    eventually(lambda: is_gone(Path(here)))
    # It is not the client's.
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


def test_errors_are_those_of_the_engine(
    stocked: Service, shared_client: BlockingClient, scratch: Path, places: Path
) -> None:
    here = str(place(places))
    shutil.rmtree(shared_client.prepare("lost").source)
    with opened(scratch / "state") as engine:
        engine.prepare("making")
        engine.commit("base", "making")
        engine.prepare("work", "base")
        engine.view("look", "base")
        shutil.rmtree(engine.prepare("lost").source)
        for call in FAILURES:
            assert error_of(call, shared_client, here) == error_of(call, engine.mounter, here)
    assert below(places) == []


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
def test_what_cannot_be_sent_is_refused(
    stocked: Service, shared_client: BlockingClient, call: Callable[[BlockingClient], object]
) -> None:
    with pytest.raises(InvalidArgument):
        call(shared_client)
    assert shared_client.list_mounts() == []


INSIDE = """
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
def attached(tree: int, target: Path) -> Iterator[Sequence[str]]:
    """Attach a tree in a mount name space of its own; yield what is read and written there."""
    unshare = ["unshare", "--mount", "--propagation", "private"]
    with subprocess.Popen(
        [*unshare, sys.executable, "-c", INSIDE, str(tree), str(target)],
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
def test_a_tree_is_attached_in_another_mount_name_space(
    stocked: Service,
    shared_client: BlockingClient,
    places: Path,
    key: str,
    read_only: bool | None,
    outcome: str,
) -> None:
    here = place(places)
    source = Path(shared_client.mounts(key).source)
    (source / "inside").mkdir()
    with tmpfs(source / "inside"):
        before = below(places.parent)
        tree = shared_client.open_tree(key, read_only)
        try:
            with attached(tree, here) as seen:
                # What is mounted in a snapshot comes along.
                assert seen == ["text", outcome, outcome]
                assert below(places.parent) == before
                assert list(here.iterdir()) == []
        finally:
            os.close(tree)
        assert listed() == []
        for path in (source / "new", source / "inside" / "new"):
            assert path.exists() is (outcome == "written")
    (source / "inside").rmdir()


def test_a_tree_may_be_attached_here(
    stocked: Service, shared_client: BlockingClient, places: Path
) -> None:
    here = place(places)
    tree = shared_client.open_tree("work")
    with subprocess.Popen(
        [sys.executable, "-c", INSIDE, str(tree), str(here)],
        pass_fds=[tree],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    ) as process:
        os.close(tree)
        process.communicate(b"\n")
    # The service knows nothing of it, but that it is mounted.
    assert mounted_on(here)
    assert shared_client.list_mounts() == []
    with pytest.raises(SnapdError, match=str(here)):
        shared_client.remove("work")
    subprocess.run(["umount", str(here)], check=True)
    shared_client.remove("work")


@pytest.fixture
def uncollected() -> Iterator[None]:
    """Have nothing go just because the garbage collector comes by."""
    gc.collect()
    gc.disable()
    yield
    gc.enable()
    gc.collect()


def count_own() -> int:
    return len(os.listdir("/proc/self/fd"))


@pytest.mark.usefixtures("uncollected")
def test_a_tree_that_nobody_takes_is_closed(stocked: Service) -> None:
    """Of calls that are cancelled before their answers come, nothing stays open anywhere."""

    async def scenario(client: Client) -> None:
        await client.list_mounts()
        before, own = stocked.descriptors(), count_own()
        for _ in range(20):
            calls = [asyncio.ensure_future(client.open_tree("work")) for _ in range(50)]
            await asyncio.sleep(0)
            for call in calls:
                call.cancel()
            outcomes = await asyncio.gather(*calls, return_exceptions=True)
            assert all(isinstance(outcome, asyncio.CancelledError) for outcome in outcomes)
            await client.list_mounts()
        # Some answers may have been overtaken by the last one.
        for _ in range(50):
            await client.list_mounts()
        assert count_own() == own
        eventually(lambda: has_open(stocked, before))

    run(scenario)


@pytest.mark.usefixtures("uncollected")
def test_a_client_that_leaves_closes_what_had_come(stocked: Service) -> None:
    async def scenario(client: Client) -> None:
        calls = [asyncio.ensure_future(client.open_tree("work")) for _ in range(50)]
        await asyncio.wait(calls, return_when=asyncio.FIRST_COMPLETED)
        await client.__aexit__(None, None, None)
        for outcome in await asyncio.gather(*calls, return_exceptions=True):
            if isinstance(outcome, int):
                os.close(outcome)
            else:
                assert isinstance(outcome, Unavailable)

    own = count_own()
    for _ in range(20):
        run(scenario)
    assert count_own() == own


@pytest.mark.usefixtures("uncollected")
def test_ten_thousand_trees_are_the_callers(stocked: Service) -> None:
    async def scenario(client: Client) -> None:
        own = count_own()
        for _ in range(200):
            trees = await asyncio.gather(*(client.open_tree("work") for _ in range(50)))
            assert len(set(trees)) == count_own() - own == 50
            for tree in trees:
                assert not os.get_inheritable(tree)
                os.close(tree)
        assert count_own() == own

    run(scenario)
