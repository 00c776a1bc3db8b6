"""The box: the image of a Debian machine with everything that the package depends on."""

from __future__ import annotations

import hashlib
import os
import shutil
import tempfile
from pathlib import Path

from tools.vm import package
from tools.vm.release import suite
from tools.vm.steps import ROOT, StepError, Steps, run

BUILD_BOX = ROOT / "tools/vm/build-box"


class Box:
    """The box for one package."""

    def __init__(self, steps: Steps, deb: Path) -> None:
        self._steps = steps
        self._vagrant_home = steps.cache / "vagrant"
        self._needed = package.dependencies(deb)
        self._suite = suite()
        made_from = BUILD_BOX.read_bytes() + " ".join(self._needed).encode()
        digest = hashlib.sha256(made_from).hexdigest()[:12]
        self.name = f"snapd-native/{self._suite}-{digest}"

    @property
    def image(self) -> Path | None:
        """The image, if the box has been built."""
        directory = self._vagrant_home / "boxes" / self.name.replace("/", "-VAGRANTSLASH-")
        return next(directory.glob("*/libvirt/box.img"), None)

    def build(self) -> Path:
        """Build the box and return its image; delete the last box of the same release."""
        old_boxes = f"snapd-native-VAGRANTSLASH-{self._suite}-*"
        for old in (self._vagrant_home / "boxes").glob(old_boxes):
            shutil.rmtree(old)
        self._steps.cache.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=self._steps.cache) as new:
            self._steps.step(
                "box",
                900,
                [BUILD_BOX, self._suite, self.name, "1.0.0", f"{new}/new.box", *self._needed],
                ["vagrant", "box", "add", "--no-tty", f"{new}/new.json"],
            )
        if self.image is None:
            raise StepError(f"Vagrant has added the box {self.name} without an image")
        return self.image


def known_driver() -> str | None:
    """Return the driver in VM_DRIVER, or ``qemu`` without /dev/kvm; None if KVM must be tried."""
    return os.environ.get("VM_DRIVER") or (None if Path("/dev/kvm").exists() else "qemu")


def fastest_driver(steps: Steps, image: Path) -> str:
    """Return the fastest driver that works. KVM may not work although /dev/kvm exists."""
    with steps.timed("kvm"):
        works = _ends_by_itself(steps) and _logs_in(steps, image)
        return "kvm" if works else "qemu"


def _ends_by_itself(steps: Steps) -> bool:
    sector = steps.logs / "sector"
    # mov al, 16; out 0xf4, al; hlt: QEMU's exit status is 2 * 16 + 1.
    sector.write_bytes(b"\xb0\x10\xe6\xf4\xf4".ljust(510, b"\0") + b"\x55\xaa" + bytes(65024))
    device = "isa-debug-exit,iobase=0xf4,iosize=1"
    disk = f"file={sector},format=raw,if=ide"
    command = [*_qemu(), "-m", "32", "-device", device, "-drive", disk]
    return run(command, steps.environment, steps.logs / "kvm.log", 20) == 33


def _logs_in(steps: Steps, image: Path) -> bool:
    console = steps.logs / "console"
    watch = f"timeout 60 tail -n +1 -F {console} | grep -aqm 1 login:"
    disk = f"file={image},format=qcow2,if=virtio"
    command = [*_qemu(), "-m", "512", "-snapshot", "-drive", disk]
    qemu = " ".join([*command, "-serial", f"file:{console}"])
    script = f"{qemu} & {watch}"
    return run(["bash", "-c", script], steps.environment, steps.logs / "kvm.log", 70) == 0


def _qemu() -> list[str]:
    machine = ["qemu-system-x86_64", "-accel", "kvm", "-cpu", "host"]
    return [*machine, "-nodefaults", "-display", "none"]
