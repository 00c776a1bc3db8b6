"""The package of containerd's plugin, and Debian's containerd as the documents configure it."""

from __future__ import annotations

import base64
import hashlib
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.images import IMAGE, layer, programs, write_image
from tests.vm.guest import Guest
from tests.vm.plugin import UNIT

IMPORT = "ctr images import --snapshotter snapd-native /var/tmp/image.tar"
RUN = f"ctr run --rm --net-host --snapshotter snapd-native --log-uri file:///var/tmp/out {IMAGE} c1"
"""The output goes to a file: a ctr on a busy machine ends before it has opened a pipe."""


pytestmark = pytest.mark.usefixtures("containerd")


@pytest.fixture
def imported(guest: Guest, tmp_path: Path) -> Iterator[Guest]:
    """Yield a machine whose containerd has an image of two layers with a shell."""
    path = tmp_path / "image.tar"
    write_image(path, [programs(), layer(("text", b"from the image\n"))])
    guest.run(
        f"""
        base64 -d >/var/tmp/image.tar
        {IMPORT}
        rm /var/tmp/image.tar""",
        stdin=base64.b64encode(path.read_bytes()).decode(),
    )
    yield guest
    guest.run(f"ctr images rm --sync {IMAGE}")
    assert guest.run("snapd-native ls | tail -n +2") == ""


def run_container(guest: Guest, script: str) -> str:
    """Run a shell in a container of the image, and return its output."""
    return guest.run(f"{RUN} /bin/sh -ec '{script}'; cat /var/tmp/out; rm /var/tmp/out")


def test_the_package_starts_and_enables_the_plugin(guest: Guest) -> None:
    out = guest.run(f"""
        systemctl is-active {UNIT}
        systemctl is-enabled {UNIT}
        stat -c %a /run/{UNIT} /run/{UNIT}/containerd.sock
        grep CapEff "/proc/$(systemctl show -P MainPID {UNIT})/status" | tr -d '\\t'""")
    assert out.splitlines() == ["active", "enabled", "700", "600", "CapEff:0000000000000000"]


def test_containerd_runs_an_image_from_snapshots_of_the_service(imported: Guest) -> None:
    out = run_container(imported, "cat /text; echo new >/new; cat /new")
    assert out == "from the image\nnew\n"
    kinds = imported.run("snapd-native ls | tail -n +2 | grep -o '^containerd/.* committed '")
    assert len(kinds.splitlines()) == 2


def test_the_plugin_serves_again_after_a_restart_of_the_service(imported: Guest) -> None:
    imported.run("systemctl restart snapd-native")
    assert run_container(imported, "cat /text") == "from the image\n"


def test_an_image_is_whole_after_a_power_cut_while_it_is_unpacked(
    guest: Guest, tmp_path: Path
) -> None:
    parts = [os.urandom(2 << 20) for _ in range(8)]
    path = tmp_path / "image.tar"
    layers = [layer((f"part{number}", data)) for number, data in enumerate(parts)]
    write_image(path, [programs(), *layers])
    guest.run(
        "base64 -d >/var/tmp/image.tar; sync",
        stdin=base64.b64encode(path.read_bytes()).decode(),
    )
    importing = guest.start(IMPORT)
    guest.until("(( $(snapd-native ls kind==committed | wc -l) > 4 ))")
    guest.power_cut()
    importing.communicate()
    guest.power_on()
    guest.run(f"systemctl start containerd; snapd-native check; {IMPORT}; rm /var/tmp/image.tar")
    out = guest.run(f"{RUN} /bin/sh -c 'cat /part*'; sha256sum </var/tmp/out; rm /var/tmp/out")
    assert out.split()[0] == hashlib.sha256(b"".join(parts)).hexdigest()
    # A lease of the import that was cut keeps its snapshots.
    guest.run(f"""
        ctr leases ls -q | xargs --no-run-if-empty ctr leases rm
        ctr images rm --sync {IMAGE}""")
    assert guest.run("snapd-native ls | tail -n +2") == ""


def test_an_end_of_the_plugin_leaves_no_socket(guest: Guest) -> None:
    out = guest.run(f"""
        systemctl stop {UNIT}
        systemctl show -P Result {UNIT}
        ls -d /run/{UNIT} 2>/dev/null || true
        systemctl start {UNIT}""")
    assert out == "success\n"
