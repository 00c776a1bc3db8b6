"""Containers, images and garbage collections at the same time, for two minutes."""

from __future__ import annotations

import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from snapd_native.client import BlockingClient
from tests.support.containerd_plugin import Plugin
from tests.support.file_systems import on_ext4
from tests.support.images import IMAGE, containerd, layer, programs, write_image
from tests.support.service import Service, commit_snapshot

pytestmark = [on_ext4, pytest.mark.long]

SECONDS = 120

OTHER = "example.com/other:1"


def test_containers_run_while_images_come_and_go(
    shared_service: Service,
    shared_client: BlockingClient,
    lasting_plugin: Plugin,
    tmp_path: Path,
) -> None:
    image, other = tmp_path / "image.tar", tmp_path / "other.tar"
    write_image(image, [programs(), *(layer((f"file {n}", b"x" * n)) for n in range(5))])
    # Of the same first layer.
    write_image(other, [programs(), layer(("other", b"text"))], OTHER)
    commit_snapshot(shared_client, "theirs", files={"file": "text"})
    end = time.monotonic() + SECONDS

    def repeat(step: Callable[[], object]) -> int:
        count = 0
        while time.monotonic() < end:
            step()
            count += 1
        return count

    with containerd(lasting_plugin.socket) as daemon, ThreadPoolExecutor() as pool:

        def run() -> None:
            script = "cat '/file 4'; echo new >/file; busybox rm -r /bin/sh"
            assert daemon.run("snapd-native", script) == "xxxx"

        def unpack() -> None:
            daemon.ctr("images", "import", "--snapshotter", "snapd-native", str(other))
            daemon.ctr("images", "rm", "--sync", OTHER)

        daemon.ctr("images", "import", "--snapshotter", "snapd-native", str(image))
        running = [pool.submit(repeat, run) for _ in range(4)]
        unpacking = pool.submit(repeat, unpack)
        containers, unpacked = sum(each.result() for each in running), unpacking.result()
        print(f"{containers} containers, {unpacked} images in {SECONDS} s")
        assert len(daemon.snapshots("snapd-native")) == 6
        daemon.ctr("images", "rm", "--sync", IMAGE)
        assert daemon.snapshots("snapd-native") == []
    assert [info.name for info in shared_client.walk()] == ["theirs"]
    assert "ERROR" not in lasting_plugin.log.read_text()
