"""A private bus and daemon for demonstrations and tests: real processes without systemd."""

from __future__ import annotations

import os
import select
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

from snapd_native import trees
from snapd_native.errors import Unavailable

READY_SECONDS = 60.0
"""Seconds for a daemon to become ready."""

# As the system bus, with the policy of the service for org.snapdnative1.
_CONFIGURATION = """
<!DOCTYPE busconfig PUBLIC "-//freedesktop//DTD D-BUS Bus Configuration 1.0//EN"
 "http://www.freedesktop.org/standards/dbus/1.0/busconfig.dtd">
<busconfig>
  <type>system</type>
  <listen>unix:path={socket}</listen>
  <auth>EXTERNAL</auth>
  <policy context="default">
    <allow user="*"/>
    <deny own="*"/>
    <deny send_type="method_call"/>
    <allow send_type="signal"/>
    <allow send_requested_reply="true" send_type="method_return"/>
    <allow send_requested_reply="true" send_type="error"/>
    <allow receive_type="method_call"/>
    <allow receive_type="method_return"/>
    <allow receive_type="error"/>
    <allow receive_type="signal"/>
    <allow send_destination="org.freedesktop.DBus"/>
    <allow send_destination_prefix="org.snapdnative1"/>
  </policy>
  <policy user="root">
    <allow own_prefix="org.snapdnative1"/>
  </policy>
  {more}
</busconfig>
"""


@contextmanager
def private_bus(policies: Sequence[Path] = ()) -> Iterator[str]:
    """Run a dbus-daemon that every user can connect to; yield its address.

    ``policies`` are files with the policies of other services.

    Raises:
        Unavailable: dbus-daemon is not installed.
    """
    with ExitStack() as stack:
        directory = Path(
            stack.enter_context(tempfile.TemporaryDirectory(prefix="snapd-native-bus-"))
        )
        directory.chmod(0o755)
        path = directory / "socket"
        configuration = directory / "bus.conf"
        more = "".join(f"<include>{policy}</include>" for policy in policies)
        configuration.write_text(_CONFIGURATION.format(socket=path, more=more).strip())
        reader, writer = os.pipe()
        log = directory / "log"
        try:
            bus = subprocess.Popen(
                [
                    "dbus-daemon",
                    f"--config-file={configuration}",
                    "--nofork",
                    "--nopidfile",
                    f"--print-address={writer}",
                ],
                pass_fds=[writer],
                stderr=stack.enter_context(log.open("wb")),
            )
        except FileNotFoundError:
            os.close(reader)
            raise Unavailable("there is no dbus-daemon: install the package dbus") from None
        finally:
            os.close(writer)
        try:
            with open(reader, "rb") as address:
                if not address.readline():
                    raise Unavailable(
                        f"the private dbus-daemon did not start: {log.read_text().strip()}"
                    )
            yield f"unix:path={path}"
        finally:
            bus.terminate()
            bus.wait()


@contextmanager
def temporary_state(directory: Path) -> Iterator[Path]:
    """Yield the path of a state directory below ``directory``, and delete it afterwards.

    Committed snapshots in it are immutable, so that tempfile could not delete them.
    """
    place = Path(tempfile.mkdtemp(prefix="snapd-native-demo-", dir=directory))
    try:
        yield place / "state"
    finally:
        parent = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            trees.delete(parent, place.name)
        finally:
            os.close(parent)


@dataclass(frozen=True, slots=True)
class Daemon:
    """A running daemon."""

    process: subprocess.Popen[bytes]
    state: Path

    def stop(self) -> int:
        """Stop the daemon, and return its exit status."""
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
        return self.process.wait()


@contextmanager
def private_daemon(
    address: str,
    state: Path,
    environment: Mapping[str, str] | None = None,
    instance: str = "",
) -> Iterator[Daemon]:
    """Run a daemon on the bus at ``address``, and yield it when it is ready.

    Raises:
        Unavailable: it has ended or takes too long; its own message is on standard error.
    """
    with ExitStack() as stack:
        directory = stack.enter_context(tempfile.TemporaryDirectory(prefix="snapd-native-run-"))
        notify = stack.enter_context(socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM))
        notify.bind(f"{directory}/notify")
        process = subprocess.Popen(
            [
                *(sys.executable, "-P", "-m", "snapd_native", "--instance", instance),
                *("daemon", "--quiet"),
                *("--state-directory", str(state)),
                *("--runtime-directory", f"{directory}/run"),
            ],
            env={
                **os.environ,
                **(environment or {}),
                "DBUS_SYSTEM_BUS_ADDRESS": address,
                "NOTIFY_SOCKET": f"{directory}/notify",
            },
        )
        daemon = Daemon(process, state)
        stack.callback(daemon.stop)
        await_ready(process, notify)
        yield daemon


def await_ready(process: subprocess.Popen[bytes], notify: socket.socket) -> None:
    """Wait until a process says on the socket ``notify`` that it is ready; see sd_notify(3).

    Raises:
        Unavailable: it has ended or takes too long.
    """
    # A pidfd becomes readable when the process ends.
    ended = os.pidfd_open(process.pid)
    try:
        while True:
            readable, _, _ = select.select([notify.fileno(), ended], [], [], READY_SECONDS)
            if notify.fileno() in readable:
                if b"READY=1" in notify.recv(4096).splitlines():
                    return
                continue
            raise Unavailable(
                "the daemon ended before it was ready" if readable else "the daemon is not ready"
            )
    finally:
        os.close(ended)
