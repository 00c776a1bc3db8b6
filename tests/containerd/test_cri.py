"""A pod through containerd's Container Runtime Interface, as a kubelet runs it."""

from __future__ import annotations

import importlib.util
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import grpc
import pytest

from snapd_native.client import BlockingClient
from tests.support.commands import run_command
from tests.support.containerd_plugin import plugin
from tests.support.file_systems import long_on_xfs
from tests.support.images import (
    IMAGE,
    PAUSE,
    Containerd,
    containerd,
    layer,
    programs,
    write_image,
)
from tests.support.service import HANG_TIMEOUT, Service
from tests.support.waiting import wait_until

pytestmark = long_on_xfs

NODE = 2
"""The host's namespace."""


def compile_messages(proto: Path) -> Any:  # noqa: ANN401 - untyped
    """Compile messages with protoc, and return the module with their classes."""
    with tempfile.TemporaryDirectory() as directory:
        run_command("protoc", f"-I{proto.parent}", f"--python_out={directory}", proto)
        compiled = Path(directory) / f"{proto.stem}_pb2.py"
        spec = importlib.util.spec_from_file_location(compiled.stem, compiled)
        assert spec
        assert spec.loader
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
    return module


messages = compile_messages(Path(__file__).with_name("cri.proto"))


class Kubelet:
    """Calls the Container Runtime Interface of a containerd."""

    def __init__(self, channel: grpc.Channel) -> None:
        self._channel = channel

    def call(self, method: str, request: Any, reply: Any, service: str = "Runtime") -> Any:  # noqa: ANN401 - untyped
        function: Any = self._channel.unary_unary(
            f"/runtime.v1.{service}Service/{method}",
            request_serializer=lambda request: request.SerializeToString(),
            response_deserializer=reply.FromString,
        )
        return function(request, timeout=HANG_TIMEOUT)

    @contextmanager
    def pod(self, config: Any) -> Iterator[str]:  # noqa: ANN401 - untyped
        """Run a pod for the block, and yield the id of its sandbox."""
        request = messages.RunPodSandboxRequest(config=config)
        sandbox = self.call("RunPodSandbox", request, messages.SandboxId)
        try:
            yield sandbox.pod_sandbox_id
        finally:
            self.call("StopPodSandbox", sandbox, messages.Empty)
            self.call("RemovePodSandbox", sandbox, messages.Empty)

    def execute(self, container: str, script: str) -> str:
        """Run a shell in a container, and return its output."""
        request = messages.ExecSyncRequest(
            container_id=container, cmd=["/bin/sh", "-ec", script], timeout=60
        )
        done = self.call("ExecSync", request, messages.ExecSyncResponse)
        assert (done.exit_code, done.stderr) == (0, b"")
        return done.stdout.decode()  # type: ignore[no-any-return]

    def writable_layer(self, container: str) -> tuple[int, int]:
        """Return the bytes and inodes of a container's file system."""
        request = messages.ContainerId(container_id=container)
        stats = self.call("ContainerStats", request, messages.ContainerStatsResponse).stats
        usage = stats.writable_layer
        return usage.used_bytes.value, usage.inodes_used.value

    def image_usage(self) -> Any:  # noqa: ANN401 - untyped
        """Return the usage of the file system of the images."""
        (usage,) = self.call(
            "ImageFsInfo", messages.Empty(), messages.ImageFsInfoResponse, "Image"
        ).image_filesystems
        return usage


@pytest.fixture
def node(shared_service: Service, tmp_path: Path) -> Iterator[Containerd]:
    """Run a containerd with the images of a pod in the namespace that Kubernetes uses."""
    pause, image = tmp_path / "pause.tar", tmp_path / "image.tar"
    sleep = ("/bin/busybox", "sleep", "1000000")
    write_image(pause, [programs()], PAUSE, sleep)
    write_image(image, [programs(), layer(("file", b"text"))], command=sleep)
    with (
        plugin(shared_service.address, tmp_path, "containerd", "--usage-age", "0") as running,
        containerd(running.socket, cri=True) as daemon,
    ):
        for path in (pause, image):
            daemon.ctr(
                "images", "import", "--snapshotter", "snapd-native", str(path), space="k8s.io"
            )
        yield daemon


def test_a_pod_runs_and_is_removed(
    node: Containerd, shared_client: BlockingClient, tmp_path: Path
) -> None:
    images = [*shared_client.walk()]
    network = messages.NamespaceOption(network=NODE)
    config = messages.SandboxConfig(
        metadata=messages.Metadata(name="pod", uid="1", namespace="default"),
        log_directory=str(tmp_path / "logs"),
        linux=messages.LinuxSandbox(
            security_context=messages.SandboxSecurityContext(namespace_options=network)
        ),
    )
    container = messages.ContainerConfig(
        metadata=messages.ContainerMetadata(name="work"),
        image=messages.ImageSpec(image=IMAGE),
        command=["/bin/sh", "-c", "echo started; busybox sleep 1000000"],
        log_path="work.log",
    )
    with grpc.insecure_channel(f"unix:{node.address}") as channel:
        kubelet = Kubelet(channel)
        with kubelet.pod(config) as sandbox:
            request = messages.CreateContainerRequest(
                pod_sandbox_id=sandbox, config=container, sandbox_config=config
            )
            created = kubelet.call("CreateContainer", request, messages.ContainerId)
            kubelet.call("StartContainer", created, messages.Empty)
            assert len([*shared_client.walk()]) == len(images) + 2

            work = created.container_id
            assert kubelet.execute(work, "cat /file") == "text"
            log = tmp_path / "logs" / "work.log"
            wait_until(lambda: "stdout F started" in log.read_text())

            kubelet.execute(work, "busybox dd if=/dev/zero of=/new bs=1M count=8 2>/dev/null; sync")
            wait_until(lambda: kubelet.writable_layer(work)[0] > 8 << 20)
            (key,) = [info.name for info in shared_client.walk() if work in info.name]
            tree = Path(shared_client.mounts(key).source)
            inodes = {path.lstat().st_ino for path in (tree, *tree.rglob("*"))}
            assert kubelet.writable_layer(work)[1] == len(inodes)
            wait_until(lambda: kubelet.image_usage().used_bytes.value > 8 << 20)
    node.collect(space="k8s.io")
    assert [*shared_client.walk()] == images
