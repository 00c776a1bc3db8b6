"""The state of an earlier version, which a later one serves without any step in between.

Each archive in ``states`` is the state directory of a release, after its service was stopped. It
contains `base` with a digest and two standby clones, `work` and `look` of `base`, `second` with the
parent `base`, and `empty`. `look` is mounted persistently on `TARGET`.
"""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from snapd_native.client import BlockingClient
from snapd_native.model import Kind, Trouble
from tests.support.file_systems import long_on_xfs
from tests.support.service import run_daemon
from tests.support.waiting import wait_until_equal

STATES = sorted((Path(__file__).parent / "states").iterdir())
TARGET = Path("/tmp/snapd-native-0.1.0/target")

# The archive names the target, so there is only one.
pytestmark = [long_on_xfs, pytest.mark.alone]


@pytest.fixture
def target() -> Iterator[Path]:
    TARGET.mkdir(parents=True)
    yield TARGET
    # A test that fails leaves it mounted.
    if TARGET.is_mount():
        subprocess.run(["umount", TARGET], check=True)
    os.removedirs(TARGET)


@pytest.mark.parametrize("archive", STATES, ids=lambda path: path.name)
def test_the_state_of_an_earlier_version_is_served_completely(
    archive: Path, on_bus: str, scratch: Path, target: Path
) -> None:
    subprocess.run(["tar", "--xattrs", "-xpf", archive, "-C", scratch], check=True)
    with run_daemon(on_bus, scratch / "state"), BlockingClient() as client:
        assert [(i.name, i.kind, i.parent) for i in client.walk()] == [
            ("base", Kind.COMMITTED, ""),
            ("empty", Kind.ACTIVE, ""),
            ("look", Kind.VIEW, "base"),
            ("second", Kind.COMMITTED, "base"),
            ("work", Kind.ACTIVE, "base"),
        ]
        base = client.stat("base")
        assert base.labels["app"] == "web"
        assert client.stat("work").labels == {"tier": "front"}
        # The archive was made in another boot, so the service makes the mount again.
        assert [mounted.target for mounted in client.list_mounts()] == [str(target)]
        assert (target / "directory" / "hard").read_text() == "base\n"
        assert os.getxattr(target / "file", "user.origin") == b"0.1.0"
        assert (Path(client.mounts("work").source) / "new").read_text() == "work\n"
        assert client.verify("base") == base.labels["snapd-native.digest"]
        wait_until_equal(lambda: client.standby("base").ready, 2)
        # That version did not make trees immutable.
        found = client.check()
        assert {(finding.kind, finding.key) for finding in found} == {
            (Trouble.MODE, "base"),
            (Trouble.MODE, "second"),
        }
        assert client.repair() == found
        assert client.check() == []

        client.prepare("child", "second")
        client.commit("third", "child")
        client.unmount(str(target))
        for key in ("look", "work", "empty", "third", "second", "base"):
            client.remove(key)
        client.cleanup()
        assert client.check() == []
