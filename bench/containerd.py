"""Debian's containerd and its snapshotters, called over its socket."""

from __future__ import annotations

import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import grpc

from bench.memory import Peak
from bench.peers import LABELS, PATIENCE
from snapd_native.containerd import snapshots_pb2 as wire
from snapd_native.containerd.service import SERVICE
from snapd_native.errors import Unavailable

# Compiled when it is imported, by grpcio-tools.
_leases = grpc.protos("bench/containerd.proto")

_NAMESPACE = (("containerd-namespace", "bench"),)
_LEASES = "containerd.services.leases.v1.Leases"

# The disabled plugins would create directories in /opt and /etc, or serve Kubernetes.
_CONFIGURATION = """
version = 2
root = "{root}"
state = "{private}/state"
disabled_plugins = ["io.containerd.grpc.v1.cri", "io.containerd.internal.v1.opt"]
[grpc]
address = "{socket}"
{more}
"""


class Containerd:
    """A snapshotter, by one connected client."""

    name = "containerd"

    def __init__(
        self,
        channel: Any,  # noqa: ANN401 - untyped
        address: str,
        memory: Peak,
        snapshotter: str = "native",
    ) -> None:
        self._channel = channel
        self.address = address
        self.memory = memory
        self._snapshotter = snapshotter
        self._prepare = _method(channel, SERVICE, "Prepare", wire.MountsResponse)
        self._view = _method(channel, SERVICE, "View", wire.MountsResponse)
        self._commit = _method(channel, SERVICE, "Commit", wire.Empty)
        self._stat = _method(channel, SERVICE, "Stat", wire.InfoResponse)
        self._remove = _method(channel, SERVICE, "Remove", wire.Empty)
        self._list = _method(channel, SERVICE, "List", wire.ListResponse, stream=True)
        self._create_lease = _method(channel, _LEASES, "Create", wire.Empty)
        self._delete_lease = _method(channel, _LEASES, "Delete", wire.Empty)

    def prepare(self, key: str, parent: str) -> Path:
        """Call Prepare."""
        return Path(self._prepare(self._creation(key, parent)).mounts[0].source)

    def view(self, key: str, parent: str) -> None:
        """Call View."""
        self._view(self._creation(key, parent))

    def commit(self, name: str, key: str) -> None:
        """Call Commit."""
        request = wire.CommitRequest(
            snapshotter=self._snapshotter, name=name, key=key, labels=LABELS
        )
        self._commit(request)

    def stat(self, key: str) -> None:
        """Call Stat."""
        self._stat(wire.KeyRequest(snapshotter=self._snapshotter, key=key))

    def list(self) -> int:
        """Call List."""
        return len(self.parents())

    def parents(self) -> dict[str, str]:
        """Call List, and return the names of all snapshots with those of their parents."""
        pages = self._list(wire.ListRequest(snapshotter=self._snapshotter))
        return {info.name: info.parent for page in pages for info in page.info}

    def remove(self, key: str) -> None:
        """Call Remove; the garbage collector deletes the tree later."""
        self._remove(wire.KeyRequest(snapshotter=self._snapshotter, key=key))

    def settle(self) -> None:
        """Run the garbage collector, by the synchronous deletion of a lease."""
        self._create_lease(_leases.CreateLeaseRequest(id="settle"))
        self._delete_lease(_leases.DeleteLeaseRequest(id="settle", sync=True))

    @contextmanager
    def another(self) -> Iterator[Containerd]:
        """Open another connection."""
        with connected(self.address) as channel:
            yield Containerd(channel, self.address, self.memory, self._snapshotter)

    def on(self, snapshotter: str) -> Containerd:
        """Use another snapshotter by the same connection."""
        return Containerd(self._channel, self.address, self.memory, snapshotter)

    def _creation(self, key: str, parent: str) -> object:
        return wire.CreateRequest(
            snapshotter=self._snapshotter, key=key, parent=parent, labels=LABELS
        )


@contextmanager
def containerd(root: Path, more: str = "") -> Iterator[Containerd]:
    """Run a containerd that keeps everything below ``root``, and connect to it.

    ``more`` is added to its configuration.

    Raises:
        Unavailable: it is not installed, or does not start.
    """
    with ExitStack() as stack:
        private = Path(
            stack.enter_context(tempfile.TemporaryDirectory(prefix="snapd-native-bench-"))
        )
        socket = private / "socket"
        configuration = private / "config.toml"
        configuration.write_text(
            _CONFIGURATION.format(root=root, private=private, socket=socket, more=more)
        )
        log = private / "log"
        try:
            # In a process group of its own: Ctrl-C would end it before the clean-up.
            process = subprocess.Popen(
                ["containerd", "--config", configuration],
                stderr=stack.enter_context(log.open("wb")),
                process_group=0,
            )
        except FileNotFoundError:
            raise Unavailable(
                "there is no containerd: install the package containerd, or leave it out"
                " with --peers cp"
            ) from None
        stack.callback(process.wait)
        stack.callback(process.terminate)
        channel = stack.enter_context(connected(f"unix:{socket}"))
        try:
            await_answer(channel)
        except grpc.FutureTimeoutError:
            raise Unavailable(f"containerd did not start: {log.read_text()[-1000:]}") from None
        yield Containerd(channel, f"unix:{socket}", Peak(process.pid))


def await_answer(channel: Any) -> None:  # noqa: ANN401 - untyped
    """Wait until a server accepts connections."""
    grpc.channel_ready_future(channel).result(PATIENCE)


@contextmanager
def connected(address: str) -> Iterator[Any]:
    """Connect to a server of gRPC."""
    # By default, channels to the same address share a connection.
    with grpc.insecure_channel(address, [("grpc.use_local_subchannel_pool", 1)]) as channel:
        yield channel


def _method(channel: Any, service: str, name: str, answer: Any, *, stream: bool = False) -> Any:  # noqa: ANN401 - untyped
    kind = channel.unary_stream if stream else channel.unary_unary
    call = kind(
        f"/{service}/{name}",
        request_serializer=lambda request: request.SerializeToString(),
        response_deserializer=answer.FromString,
    )
    return lambda request: call(request, metadata=_NAMESPACE)
