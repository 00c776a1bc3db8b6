"""Docker with its containerd image store on snapshots of the service."""

from __future__ import annotations

import base64
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.images import IMAGE, layer, programs, write_image
from tests.support.readme import code_blocks
from tests.vm.guest import Guest

RUN = "docker run --rm --network none"

pytestmark = pytest.mark.usefixtures("containerd")


@pytest.fixture(scope="module")
def docker(machine: Guest, containerd: None) -> Iterator[None]:
    """Run Docker with the documented configuration."""
    (configuration,) = code_blocks("json")
    machine.run(
        "mkdir -p /etc/docker; cat >/etc/docker/daemon.json; systemctl start docker",
        stdin=configuration,
    )
    try:
        yield
    finally:
        machine.run("systemctl stop docker docker.socket; rm /etc/docker/daemon.json")


@pytest.fixture
def loaded(guest: Guest, docker: None, tmp_path: Path) -> Iterator[Guest]:
    """Yield a machine whose Docker has an image of two layers with a shell."""
    path = tmp_path / "image.tar"
    write_image(path, [programs(), layer(("text", b"from the image\n"))])
    guest.run(
        "base64 -d >/var/tmp/image.tar; docker load --input /var/tmp/image.tar",
        stdin=base64.b64encode(path.read_bytes()).decode(),
    )
    yield guest
    guest.run("rm /var/tmp/image.tar; docker system prune --all --force --volumes")
    guest.until('[[ -z "$(snapd-native ls | tail -n +2)" ]]')


def test_docker_uses_the_plugin(loaded: Guest) -> None:
    assert loaded.run("docker info --format '{{.Driver}}'") == "snapd-native\n"
    assert "committed" in loaded.run("snapd-native ls | grep '^containerd/'")


def test_docker_runs_a_loaded_image(loaded: Guest) -> None:
    out = loaded.run(f"{RUN} {IMAGE} /bin/sh -ec 'cat /text; echo new >/new; cat /new'")
    assert out == "from the image\nnew\n"


def test_docker_commits_a_container_as_an_image(loaded: Guest) -> None:
    out = loaded.run(
        f"""
        docker run --name c1 --network none {IMAGE} /bin/sh -c 'echo new >/new'
        docker commit c1 example.test/changed:1 >/dev/null
        docker rm c1 >/dev/null
        {RUN} example.test/changed:1 /bin/cat /text /new"""
    )
    assert out == "from the image\nnew\n"


def test_a_restart_of_docker_keeps_images_and_containers(loaded: Guest) -> None:
    out = loaded.run(
        f"""
        docker create --name c2 --network none {IMAGE} /bin/cat /text >/dev/null
        systemctl restart docker
        docker start --attach c2
        docker rm c2 >/dev/null"""
    )
    assert out == "from the image\n"
