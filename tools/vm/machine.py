"""The machine, which Vagrant makes and destroys. It can be kept between commands."""

from __future__ import annotations

import hashlib
import re
import shutil
import subprocess
import sys
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from tools.vm.box import Box
from tools.vm.steps import ROOT, StepError, Steps, end_group

NAME = "snapd-native-test"
"""The name of libvirt's pool and network, and the prefix of the domain's name.

By these names, a command finds the machine that a killed run has left.
"""
DOMAIN = f"{NAME}_default"
IMAGES = Path("/var/lib/libvirt/images") / NAME
NOTES = Path("/run") / NAME
VAGRANT_STATE = NOTES / "vagrant"
SSH_CONFIG = NOTES / "ssh-config"
KEPT = NOTES / "kept"
"""A file that exists while a machine is kept, and says what the machine was made from."""
HOST = ROOT / "tools/vm/host"
PACKAGES = (
    *("vagrant", "vagrant-libvirt", "libvirt-daemon-system", "libvirt-clients"),
    *("qemu-system-x86", "qemu-utils", "dnsmasq-base", "iptables", "rsync", "openssh-client"),
    *("mmdebstrap", "extlinux", "syslinux-common", "fdisk", "e2fsprogs"),
)
ANSWER_LIMIT = 60
"""Seconds that a kept machine may take to answer by ssh; emulation is slow."""
TEARDOWN_LIMIT = 60
"""Seconds that interrupted tests have to undo what they changed in a kept machine."""
RENEW = "run make vm-down, then make vm-up"


def missing_packages() -> list[str]:
    """Return the names of the Debian packages that must be installed."""
    asked = subprocess.run(
        ["dpkg-query", "-W", "-f", "${Package} ${db:Status-Status}\n", *PACKAGES],
        capture_output=True,
        text=True,
        check=False,
    )
    present = {line.split()[0] for line in asked.stdout.splitlines() if "not-" not in line}
    return [package for package in PACKAGES if package not in present]


def is_kept() -> bool:
    """Return whether `vm-up` has made a machine that `vm-down` has not destroyed."""
    return KEPT.exists()


def remains() -> bool:
    """Return whether there is a machine, or leftovers of a killed run."""
    return NOTES.exists() or IMAGES.exists()


class Machine:
    """The machine, which need not exist."""

    def __init__(self, steps: Steps) -> None:
        self._steps = steps
        # These settings do not affect machines that the caller has made with Vagrant.
        steps.environment |= {
            "VAGRANT_DOTFILE_PATH": str(VAGRANT_STATE),
            "VM_NAME": NAME,
            "VM_NET": "none",
        }

    def start_libvirt(self) -> None:
        """Start libvirt's daemons, and remove what a killed run has left."""
        self._steps.step("libvirt", 60, [HOST, "start", NOTES])
        self._remove()

    def make(self, box: Box, driver: str) -> None:
        """Make and start a machine with the package installed, where root can log in."""
        self._steps.environment |= {
            "VM_BOX": box.name,
            "VM_DRIVER": driver,
            "VM_SUBNET": _free_subnet(),
        }
        try:
            self._up()
        except StepError as error:
            print(f"{error}\nonce more, with a fresh machine", flush=True)
            self._remove()
            self._up()
        with self._steps.timed("ssh"):
            self._let_root_log_in()

    def keep(self, box: Box) -> None:
        """Record that the machine stays when the command ends."""
        KEPT.write_text(_made_from(box))

    def answer(self) -> None:
        """Log in to the kept machine.

        Raises:
            StepError: the machine does not answer in time.
        """
        with self._steps.timed("answer"):
            command = ("ssh", "-F", SSH_CONFIG, "default", "true")
            if not self._steps.quietly(*command, limit=ANSWER_LIMIT):
                raise StepError(f"the kept machine does not answer: {RENEW}")

    def update(self, box: Box) -> None:
        """Install the newest package in the kept machine, unless it is installed.

        Raises:
            StepError: the machine was made from another box, or a program failed.
        """
        if KEPT.read_text() != _made_from(box):
            raise StepError(f"the kept machine has another box or Vagrantfile: {RENEW}")
        self._steps.step(
            "update",
            300,
            # The files that tools/provision reads; the tests read no other file in /vagrant.
            [
                "rsync",
                "-a",
                "--delete",
                "-e",
                f"ssh -F {SSH_CONFIG}",
                "dist",
                "tools",
                "default:/vagrant",
            ],
            ["ssh", "-F", SSH_CONFIG, "default", "/vagrant/tools/provision"],
        )

    def test(self, arguments: Sequence[str]) -> int:
        """Run tests with their output on the terminal; return pytest's status."""
        command = [
            # Some tests use the state that the test before them has left, such as package tests.
            *(sys.executable, "-m", "pytest", "-p", "no:randomly", "-v", "-s", "--durations=10"),
            *("--hosts=ssh://default", f"--ssh-config={SSH_CONFIG}", f"--domain={DOMAIN}"),
            *arguments,
        ]
        with subprocess.Popen(
            command,
            cwd=ROOT,
            env=self._steps.environment,
            stdin=subprocess.DEVNULL,
            start_new_session=True,
        ) as process:
            try:
                return process.wait()
            finally:
                if is_kept():
                    process.terminate()
                    with suppress(subprocess.TimeoutExpired):
                        process.wait(TEARDOWN_LIMIT)
                end_group(process)

    def hang_up(self) -> None:
        """Close the connection that ssh commands share."""
        if SSH_CONFIG.exists():
            self._steps.quietly("ssh", "-F", SSH_CONFIG, "-O", "exit", "default")

    def destroy(self) -> None:
        """Remove the machine and everything that belongs to it, as a step.

        Raises:
            StepError: the machine is still there.
        """
        with self._steps.timed("destroy"):
            # If another program has stopped libvirt, libvirt's files still describe the machine.
            self._steps.run("destroy", 60, [HOST, "start", NOTES])
            self._remove()
            if self._steps.quietly("virsh", "-q", "domstate", DOMAIN):
                raise StepError(f"libvirt's domain {DOMAIN} cannot be removed")
            self._stop_libvirt()

    def clean_up(self) -> None:
        """Remove what is left of a machine; do nothing after `destroy`."""
        if remains():
            self._remove()
            self._stop_libvirt()

    def _up(self) -> None:
        virsh = ("virsh", "-q")
        self._steps.step(
            "up",
            900,
            [*virsh, "pool-define-as", NAME, "dir", "--target", str(IMAGES)],
            [*virsh, "pool-build", NAME],
            [*virsh, "pool-start", NAME],
            ["vagrant", "up", "--no-tty", "--provider=libvirt"],
        )

    def _let_root_log_in(self) -> None:
        shown = self._steps.output("vagrant", "ssh-config")
        SSH_CONFIG.write_text(shown)
        allow = "sudo install -D -m 600 .ssh/authorized_keys /root/.ssh/authorized_keys"
        self._steps.run("ssh", 120, ["ssh", "-F", SSH_CONFIG, "default", allow])
        shared = ["ControlMaster auto", "ControlPersist 10m", f"ControlPath {NOTES}/ssh-%C"]
        alive = ["ServerAliveInterval 15", "ServerAliveCountMax 4", "ConnectTimeout 20"]
        lines = shown.replace("User vagrant", "User root").rstrip().splitlines()
        SSH_CONFIG.write_text("\n".join([*lines, *(f"  {line}" for line in shared + alive), ""]))

    def _remove(self) -> None:
        """Remove the machine, the pool and the network; none of them needs to exist."""
        KEPT.unlink(missing_ok=True)
        self.hang_up()
        for command in (
            ("destroy", DOMAIN),
            ("undefine", DOMAIN, "--managed-save", "--snapshots-metadata"),
            ("pool-destroy", NAME),
            ("pool-undefine", NAME),
            ("net-destroy", NAME),
            ("net-undefine", NAME),
        ):
            self._steps.quietly("virsh", "-q", *command)
        SSH_CONFIG.unlink(missing_ok=True)
        for directory in (
            IMAGES,
            VAGRANT_STATE,
            # Vagrant's list of all machines.
            self._steps.cache / "vagrant/data/machine-index",
        ):
            shutil.rmtree(directory, ignore_errors=True)

    def _stop_libvirt(self) -> None:
        """Stop the daemons that were started here, and delete the directory `NOTES`."""
        self._steps.quietly(HOST, "stop", NOTES)


def _made_from(box: Box) -> str:
    vagrantfile = (ROOT / "Vagrantfile").read_bytes()
    return f"{box.name} {hashlib.sha256(vagrantfile).hexdigest()}\n"


def _free_subnet() -> str:
    """Return a subnet that no interface uses.

    Otherwise libvirt would take the existing network with these addresses.
    """
    taken = subprocess.run(
        ["ip", "-4", "-oneline", "address"], capture_output=True, text=True, check=True
    ).stdout
    for number in range(124, 255):
        if not re.search(rf" 192\.168\.{number}\.", taken):
            return f"192.168.{number}.0/24"
    raise StepError("192.168.124.0/24 to 192.168.254.0/24 are all in use")
