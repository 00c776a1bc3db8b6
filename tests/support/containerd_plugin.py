"""The snapshots plugin as a process, and a client of its gRPC service."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import quote

import grpc
import pytest

from snapd_native.containerd import snapshots_pb2 as wire
from snapd_native.containerd.service import SERVICE
from snapd_native.private import await_ready
from tests.support.service import HANG_TIMEOUT, check_sentence


class Stub:
    """Calls the plugin on a socket, as containerd's ``snapshots/proxy`` does."""

    def __init__(self, channel: grpc.Channel) -> None:
        self._channel = channel

    def prepare(
        self, key: str, parent: str = "", labels: Mapping[str, str] | None = None
    ) -> wire.Mount:
        return self._create("Prepare", key, parent, labels)

    def view(
        self, key: str, parent: str = "", labels: Mapping[str, str] | None = None
    ) -> wire.Mount:
        return self._create("View", key, parent, labels)

    def mounts(self, key: str) -> wire.Mount:
        (mount,) = self._call("Mounts", wire.KeyRequest(key=key), wire.MountsResponse).mounts
        return mount  # type: ignore[no-any-return]

    def commit(
        self, name: str, key: str, labels: Mapping[str, str] | None = None, parent: str = ""
    ) -> None:
        request = wire.CommitRequest(name=name, key=key, labels=labels, parent=parent)
        self._call("Commit", request, wire.Empty)

    def remove(self, key: str) -> None:
        self._call("Remove", wire.KeyRequest(key=key), wire.Empty)

    def stat(self, key: str) -> wire.Info:
        return self._call("Stat", wire.KeyRequest(key=key), wire.InfoResponse).info  # type: ignore[no-any-return]

    def update(
        self, name: str, labels: Mapping[str, str] | None = None, paths: Sequence[str] = ()
    ) -> wire.Info:
        request = wire.UpdateRequest(
            info=wire.Info(name=name, labels=labels), update_mask=wire.FieldMask(paths=paths)
        )
        return self._call("Update", request, wire.InfoResponse).info  # type: ignore[no-any-return]

    def blocks(self, *filters: str) -> list[list[wire.Info]]:
        """Return the infos of each message of List."""
        call = self._channel.unary_stream(
            f"/{SERVICE}/List",
            request_serializer=wire.ListRequest.SerializeToString,
            response_deserializer=wire.ListResponse.FromString,
        )
        return [[*block.info] for block in call(wire.ListRequest(filters=filters))]

    def list(self, *filters: str) -> list[wire.Info]:
        return [info for block in self.blocks(*filters) for info in block]

    def usage(self, key: str) -> tuple[int, int]:
        usage = self._call("Usage", wire.KeyRequest(key=key), wire.UsageResponse)
        return usage.size, usage.inodes

    def cleanup(self) -> None:
        self._call("Cleanup", wire.CleanupRequest(), wire.Empty)

    def begin(self, method: str, request: Any, reply: Any, deadline: float = HANG_TIMEOUT) -> Any:  # noqa: ANN401 - untyped
        """Begin a call, and return its future."""
        return self._method(method, reply).future(request, timeout=deadline)

    def _create(
        self, method: str, key: str, parent: str, labels: Mapping[str, str] | None
    ) -> wire.Mount:
        request = wire.CreateRequest(key=key, parent=parent, labels=labels)
        (mount,) = self._call(method, request, wire.MountsResponse).mounts
        return mount  # type: ignore[no-any-return]

    def _call(self, method: str, request: Any, reply: Any) -> Any:  # noqa: ANN401 - untyped
        return self._method(method, reply)(request, timeout=HANG_TIMEOUT)

    def _method(self, method: str, reply: Any) -> Any:  # noqa: ANN401 - untyped
        return self._channel.unary_unary(
            f"/{SERVICE}/{method}",
            request_serializer=lambda request: request.SerializeToString(),
            response_deserializer=reply.FromString,
        )


@dataclass
class Plugin:
    """A running plugin."""

    process: subprocess.Popen[bytes]
    socket: Path
    log: Path

    def stop(self) -> int:
        """End the plugin, and return its exit status."""
        self.process.terminate()
        return self.process.wait(HANG_TIMEOUT)


PROGRAM = ("-P", "-m", "snapd_native")
"""The arguments of Python for the program."""

WITHOUT_GRACE = (
    "-P",
    "-c",
    "from snapd_native.containerd import server; from snapd_native.cli import main;"
    " server.GRACE = 0; main()",
)
"""Arguments for a plugin that gives running calls no time when it ends."""


def command(path: Path, name: str, *options: str, program: Sequence[str] = PROGRAM) -> list[str]:
    """Return the command of a plugin; ``program`` are the arguments of Python for the program."""
    return [sys.executable, *program, "containerd", "--socket", str(path), "--name", name, *options]


@contextmanager
def plugin(
    address: str,
    directory: Path,
    name: str = "containerd",
    *options: str,
    program: Sequence[str] = PROGRAM,
) -> Iterator[Plugin]:
    """Run a plugin for the block, with its socket and its log in ``directory``."""
    path, log = directory / f"{name}.sock", directory / f"{name}.log"
    with (
        socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as notify,
        log.open("wb") as stderr,
    ):
        notify.bind(str(directory / f"{name}.notify"))
        process = subprocess.Popen(
            command(path, name, *options, program=program),
            env={
                **os.environ,
                "DBUS_SYSTEM_BUS_ADDRESS": address,
                "NOTIFY_SOCKET": str(directory / f"{name}.notify"),
            },
            stderr=stderr,
        )
        running = Plugin(process, path, log)
        try:
            await_ready(process, notify)
            yield running
        finally:
            if process.poll() is None:
                assert running.stop() == 0
            os.unlink(directory / f"{name}.notify")


@contextmanager
def connected(path: Path) -> Iterator[Stub]:
    """Connect to a plugin for the block."""
    # By default, channels to the same address share a connection.
    options = [("grpc.use_local_subchannel_pool", 1)]
    with grpc.insecure_channel(f"unix:{quote(str(path))}", options) as channel:
        yield Stub(channel)


@contextmanager
def refused(code: grpc.StatusCode, *says: str) -> Iterator[None]:
    """Expect an error with a status code, whose message contains all of ``says``."""
    with pytest.raises(grpc.RpcError) as caught:
        yield
    assert caught.value.code() is code, caught.value.details()
    check_sentence(caught.value.details() or "", *says)
