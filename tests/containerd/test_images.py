"""Images and containers of a real containerd on the plugin, beside its own native snapshotter."""

from __future__ import annotations

import subprocess
import tarfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from snapd_native.client import BlockingClient
from tests.support.containerd_plugin import Plugin, plugin
from tests.support.file_systems import long_on_xfs
from tests.support.images import (
    IMAGE,
    Containerd,
    containerd,
    layer,
    programs,
    special,
    write_image,
)
from tests.support.service import Service, commit_snapshot

pytestmark = long_on_xfs

CAPABILITY = "\x01\x00\x00\x02\x00\x04\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00"
"""The value of security.capability for cap_net_bind_service; see capabilities(7)."""


@pytest.fixture(scope="module")
def image(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Write an image with everything that the layers of an image can contain."""
    path = tmp_path_factory.mktemp("image") / "image.tar"
    first = layer(
        special("etc", tarfile.DIRTYPE),
        ("etc/kept", b"first"),
        ("etc/changed", b"first"),
        ("etc/deleted", b"first"),
        special("opaque", tarfile.DIRTYPE),
        ("opaque/hidden", b"first"),
        special("gone", tarfile.DIRTYPE),
        ("gone/file", b"first"),
        special("dev", tarfile.DIRTYPE),
        special("dev/full", tarfile.CHRTYPE, 0o666),
        special("dev/fifo", tarfile.FIFOTYPE, 0o600),
        special("etc/link", tarfile.SYMTYPE, to="../../../etc/kept"),
        special("etc/hard", tarfile.LNKTYPE, to="etc/kept"),
        special("bin/setuid", mode=0o4755),
        special("bin/capable", attributes={"security.capability": CAPABILITY, "user.a": "b"}),
        special("sticky", tarfile.DIRTYPE, 0o1777),
    )
    second = layer(
        ("etc/changed", b"second"),
        ("etc/.wh.deleted", b""),
        ("opaque/.wh..wh..opq", b""),
        ("opaque/new", b"second"),
        (".wh.gone", b""),
    )
    write_image(path, [programs(), first, second])
    return path


@pytest.fixture
def running(shared_service: Service, lasting_plugin: Plugin) -> Iterator[Containerd]:
    with containerd(lasting_plugin.socket) as daemon:
        yield daemon


def test_an_image_is_unpacked_and_run_as_by_the_native_snapshotter(
    running: Containerd, shared_client: BlockingClient, image: Path, tmp_path: Path
) -> None:
    outputs, trees = [], []
    for snapshotter in ("snapd-native", "native"):
        running.ctr("images", "import", "--snapshotter", snapshotter, str(image))
        script = (
            "echo new >/etc/new; cat /etc/changed /etc/new; busybox ls -lR /etc /opaque /dev/full"
        )
        outputs.append(running.run(snapshotter, script))
        tree = tmp_path / snapshotter
        tree.mkdir()
        running.ctr("images", "mount", "--snapshotter", snapshotter, "--rw", IMAGE, str(tree))
        trees.append(tree)
    try:
        assert outputs[0] == outputs[1]
        assert (trees[0] / "etc" / "kept").read_text() == "first"
        assert not (trees[0] / "gone").exists()
        compare = ["rsync", "-aHAXUn", "--delete", "--itemize-changes", "--no-t", "--no-U"]
        done = subprocess.run(
            [*compare, f"{trees[0]}/", f"{trees[1]}/"], check=True, capture_output=True, text=True
        )
        assert done.stdout == ""
    finally:
        for tree in trees:
            running.ctr("images", "unmount", "--rm", str(tree))
    running.ctr("images", "rm", "--sync", IMAGE)
    assert running.snapshots("snapd-native") == running.snapshots("native") == []
    assert [*shared_client.walk()] == []


@pytest.mark.parametrize("count", [100, pytest.param(1000, marks=pytest.mark.long)])
def test_the_garbage_collection_keeps_the_snapshots_of_others(
    running: Containerd, shared_client: BlockingClient, image: Path, count: int
) -> None:
    base = commit_snapshot(shared_client, "base", files={"file": "text"})
    for number in range(count):
        shared_client.view(f"theirs {number}", "base")
    before = [*shared_client.walk()]
    running.ctr("images", "import", "--snapshotter", "snapd-native", str(image))
    assert len([*shared_client.walk()]) == len(before) + 3
    running.collect()
    running.ctr("images", "rm", "--sync", IMAGE)
    assert [*shared_client.walk()] == before
    assert (base / "file").read_text() == "text"


def test_two_containerds_unpack_the_same_image_into_one_store(
    shared_service: Service,
    running: Containerd,
    shared_client: BlockingClient,
    image: Path,
    tmp_path: Path,
) -> None:
    with (
        plugin(shared_service.address, tmp_path, "second") as other,
        containerd(other.socket) as second,
    ):
        for each in (running, second):
            each.ctr("images", "import", "--snapshotter", "snapd-native", str(image))
        assert len([*shared_client.walk()]) == 6
        second.ctr("images", "rm", "--sync", IMAGE)
        assert len([*shared_client.walk()]) == 3
        assert running.run("snapd-native", "cat /etc/changed") == "second"


def test_containerd_forgets_a_layer_whose_snapshot_has_gone(
    running: Containerd, shared_client: BlockingClient, image: Path
) -> None:
    """The state of the service was lost, and containerd's database was kept."""
    running.ctr("images", "import", "--snapshotter", "snapd-native", str(image))
    infos = sorted(shared_client.walk(), key=lambda info: info.created, reverse=True)
    for info in infos:
        shared_client.remove(info.name)
    error = running.ctr(
        "run", "--rm", "--snapshotter", "snapd-native", IMAGE, "c1", "/bin/sh", fails=True
    )
    # containerd 1 shows the name of the status, and containerd 2 the text of the plugin.
    assert "not found" in error or "there is no snapshot" in error
    running.ctr("images", "rm", "--sync", IMAGE)
    running.ctr("images", "import", "--snapshotter", "snapd-native", str(image))
    assert running.run("snapd-native", "cat /etc/changed") == "second"
