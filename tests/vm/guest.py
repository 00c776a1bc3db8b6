"""The machine: commands by ssh, and its power by libvirt."""

from __future__ import annotations

import os
import signal
import subprocess
import time
import xml.etree.ElementTree as ET
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from tests.vm.volatile_disk import Disk, Loss

VM_TESTS = Path(__file__).parent
STEP_TIMEOUT = 900
"""Seconds after which a step that hangs fails.

A slow host that also runs other tests can need minutes for a step of one second.
"""


class Guest:
    """The machine. Commands run on it as root, over one SSH connection."""

    def __init__(self, ssh_config: str, domain: str) -> None:
        self.domain = domain
        self._ssh = ["ssh", "-F", ssh_config, "-o", "BatchMode=yes", "default"]

    def attempt(
        self, script: str, stdin: str | None = None, limit: float = STEP_TIMEOUT
    ) -> subprocess.CompletedProcess[str]:
        """Run a bash script, which stops at its first error."""
        return subprocess.run(
            [*self._ssh, f"bash --norc -euo pipefail -c {_quoted(script)}"],
            input=stdin,
            stdin=subprocess.DEVNULL if stdin is None else None,
            capture_output=True,
            text=True,
            check=False,
            timeout=limit,
        )

    def run(self, script: str, stdin: str | None = None) -> str:
        """Run a script that must succeed, and return what it printed."""
        outcome = self.attempt(script, stdin)
        assert outcome.returncode == 0, f"{script}\n{outcome.stdout}\n{outcome.stderr}"
        return outcome.stdout

    def start(self, command: str) -> subprocess.Popen[str]:
        """Start a command and leave it running; its stdin and stdout are pipes."""
        return subprocess.Popen(
            [*self._ssh, command],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def until(self, condition: str) -> None:
        """Wait in the guest until a condition of bash holds."""
        within = STEP_TIMEOUT - 60
        loop = f"until {condition}; do ((SECONDS < {within})) || exit 1; sleep 0.2; done"
        outcome = self.attempt(loop)
        assert outcome.returncode == 0, f"{within} s have passed without {condition}"

    def boot_id(self) -> str:
        return self.run("cat /proc/sys/kernel/random/boot_id").strip()

    def disconnect(self) -> None:
        """Close the connection that commands share."""
        subprocess.run([*self._ssh[:-1], "-O", "exit", "default"], capture_output=True, check=False)

    def connect(self, all_units: bool = True) -> None:
        """Wait until the machine has started; with ``all_units``, fail if a unit has failed."""
        end = time.monotonic() + STEP_TIMEOUT
        while True:
            self.disconnect()
            wait = "systemctl is-system-running --wait || true"
            try:
                state = self.attempt(wait, limit=STEP_TIMEOUT / 4).stdout.strip()
            except subprocess.TimeoutExpired:
                state = ""
            if state:
                break
            assert time.monotonic() < end, "the machine does not answer"
            time.sleep(0.5)
        failed = self.run("systemctl list-units --failed --no-legend --plain")
        assert state == "running" or not all_units, failed

    def reboot(self) -> None:
        before = self.boot_id()
        self.attempt("systemctl reboot")
        end = time.monotonic() + STEP_TIMEOUT
        while True:
            self.disconnect()
            if self.attempt("cat /proc/sys/kernel/random/boot_id").stdout.strip() not in (
                "",
                before,
            ):
                break
            assert time.monotonic() < end, "the machine does not come back"
            time.sleep(0.5)
        self.connect()

    # Power.

    def power_off(self) -> None:
        """Shut the machine down."""
        self.attempt("systemctl poweroff")
        self.disconnect()
        _eventually(lambda: self._state() == "shut off", "the machine does not stop")

    def power_on(self, all_units: bool = True) -> None:
        _virsh("start", self.domain)
        self.connect(all_units)

    def power_cut(self) -> None:
        """End QEMU by SIGKILL: at SIGTERM, which `virsh destroy` sends, it flushes its disks."""
        pid = Path(f"/run/libvirt/qemu/{self.domain}.pid").read_text()
        os.kill(int(pid), signal.SIGKILL)
        _eventually(lambda: self._state() == "shut off", "libvirt does not see the machine's end")
        self.disconnect()

    def _state(self) -> str:
        return _virsh("domstate", self.domain).strip()

    @contextmanager
    def volatile_disks(self) -> Iterator[VolatileDisks]:
        """Give the data disks a cache that a power cut loses; this restarts the machine."""
        self.power_off()
        before = _virsh("dumpxml", "--inactive", self.domain)
        disks, changed = _with_volatile_disks(before)
        try:
            _virsh("define", "/dev/stdin", stdin=changed)
            self.power_on()
            yield VolatileDisks(disks)
            self.power_off()
        finally:
            if self._state() != "shut off":
                self.power_cut()
            for disk in disks:
                disk.close()
            _virsh("define", "/dev/stdin", stdin=before)
        self.power_on()


class VolatileDisks:
    """All data disks of a machine."""

    def __init__(self, disks: list[Disk]) -> None:
        self._disks = disks
        self._cuts = 0

    def losses(self) -> list[Loss]:
        """Return the loss of each disk in the last power cut."""
        self._cuts += 1
        return [disk.await_loss(self._cuts) for disk in self._disks]


INSTANCES = ("", "ext4", "xfs")


def remove_all(guest: Guest, *instances: str) -> None:
    """Remove all mounts and snapshots of some instances, by default of all."""
    names = " ".join(_quoted(instance) for instance in instances or INSTANCES)
    guest.run(f"python3 - {names}", stdin=(VM_TESTS / "remove_all.py").read_text())


def _with_volatile_disks(description: str) -> tuple[list[Disk], str]:
    domain = ET.fromstring(description)  # noqa: S314
    disks = []
    for element in domain.iterfind("devices/disk"):
        source = element.find("source")
        if element.findtext("serial", "").startswith("data-") and source is not None:
            disk = Disk(Path(source.attrib["file"]))
            disks.append(disk)
            element.set("type", "network")
            source.attrib.clear()
            source.set("protocol", "nbd")
            ET.SubElement(source, "host", name="127.0.0.1", port=str(disk.port))
    return disks, ET.tostring(domain, encoding="unicode")


def _eventually(condition: Callable[[], bool], otherwise: str) -> None:
    end = time.monotonic() + STEP_TIMEOUT
    while not condition():
        assert time.monotonic() < end, otherwise
        time.sleep(0.1)


def _virsh(*arguments: str, stdin: str | None = None) -> str:
    outcome = subprocess.run(
        ["virsh", "-q", "-c", "qemu:///system", *arguments],
        input=stdin,
        capture_output=True,
        text=True,
        check=False,
    )
    assert outcome.returncode == 0, outcome.stderr
    return outcome.stdout


def _quoted(script: str) -> str:
    return "'" + script.replace("'", "'\\''") + "'"
