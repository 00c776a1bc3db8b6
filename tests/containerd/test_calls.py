"""The calls of the plugin, as containerd makes them."""

from __future__ import annotations

import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import grpc
import pytest
from grpc import StatusCode

from snapd_native.client import BlockingClient
from snapd_native.containerd import snapshots_pb2 as wire
from snapd_native.containerd.service import BLOCK
from snapd_native.containerd.snapshots import OWNER_LABEL
from snapd_native.model import STANDBY_LABEL, Kind
from snapd_native.trees.relay import IDLE
from tests.support.containerd_plugin import Plugin, Stub, connected, plugin, refused
from tests.support.descriptors import wait_until_idle
from tests.support.file_systems import long_on_xfs
from tests.support.holding import hold_at_files, hold_workers
from tests.support.service import Service, commit_snapshot
from tests.support.waiting import wait_until, wait_until_equal

pytestmark = long_on_xfs

REF = "containerd.io/snapshot.ref"


def test_the_life_of_a_layer_is_that_of_containerds_snapshotter(stub: Stub) -> None:
    mount = stub.prepare("extract 1", labels={REF: "layer"})
    assert (mount.type, [*mount.options]) == ("bind", ["rbind", "rw"])
    (Path(mount.source) / "file").write_text("text")
    stub.commit("layer", "extract 1", {REF: "layer"})
    view = stub.view("look", "layer")
    assert [*view.options] == ["rbind", "ro"]
    assert (Path(view.source) / "file").read_text() == "text"
    work = stub.prepare("work", "layer", {"a": "b"})
    assert stub.mounts("work") == work
    info = stub.stat("work")
    assert (info.name, info.parent, info.kind) == ("work", "layer", wire.ACTIVE)
    assert dict(info.labels) == {"a": "b"}
    assert info.created_at == info.updated_at
    assert abs(info.created_at.seconds - os.stat(work.source).st_ctime) < 3600
    kinds = [(info.name, info.kind, info.parent) for info in stub.list()]
    assert kinds == [
        ("layer", wire.COMMITTED, ""),
        ("look", wire.VIEW, "layer"),
        ("work", wire.ACTIVE, "layer"),
    ]
    assert stub.usage("look") == (0, 0)
    assert stub.usage("layer")[1] == 2
    for key in ("work", "look", "layer"):
        stub.remove(key)
    stub.cleanup()
    assert stub.list() == []


def test_commit_sets_the_parent_of_a_snapshot_that_was_prepared_without_one(
    stub: Stub, base: str
) -> None:
    stub.prepare("work")
    stub.commit("second", "work", parent=base)
    assert stub.stat("second").parent == base


def test_a_layer_is_found_by_its_reference_and_parent(stub: Stub, base: str) -> None:
    """Containerd finds a layer in this way after a Prepare that answers AlreadyExists."""
    stub.prepare("work", base, {REF: "sha256:1"})
    stub.commit("layer", "work", {REF: "sha256:1"})
    stub.prepare("other", base, {REF: "sha256:2"})
    (found,) = stub.list(f'labels."{REF}"==sha256:1,parent=="{base}"')
    assert (found.name, found.kind) == ("layer", wire.COMMITTED)
    with refused(StatusCode.ALREADY_EXISTS, "other"):
        stub.prepare("other", base, {REF: "sha256:2"})


@pytest.mark.parametrize(
    ("call", "code", "says"),
    [
        (lambda s: s.prepare("new", "none"), StatusCode.NOT_FOUND, "none"),
        (lambda s: s.prepare("new", "work"), StatusCode.INVALID_ARGUMENT, "work"),
        (lambda s: s.prepare("work"), StatusCode.ALREADY_EXISTS, "work"),
        (lambda s: s.prepare(""), StatusCode.INVALID_ARGUMENT, "empty"),
        (lambda s: s.prepare("k" * 5000), StatusCode.INVALID_ARGUMENT, "bytes"),
        (lambda s: s.prepare("new", labels={"a": "b" * 5000}), StatusCode.INVALID_ARGUMENT, '"a"'),
        (lambda s: s.view("new", "none"), StatusCode.NOT_FOUND, "none"),
        (lambda s: s.view("work", "base"), StatusCode.ALREADY_EXISTS, "work"),
        (lambda s: s.commit("base", "work"), StatusCode.ALREADY_EXISTS, "base"),
        (lambda s: s.commit("new", "none"), StatusCode.NOT_FOUND, "none"),
        (lambda s: s.commit("new", "look"), StatusCode.FAILED_PRECONDITION, "look"),
        (lambda s: s.commit("new", "alone", parent="none"), StatusCode.NOT_FOUND, "none"),
        (lambda s: s.commit("", "work"), StatusCode.INVALID_ARGUMENT, "empty"),
        (lambda s: s.mounts("none"), StatusCode.NOT_FOUND, "none"),
        (lambda s: s.mounts("base"), StatusCode.FAILED_PRECONDITION, "base"),
        (lambda s: s.stat("none"), StatusCode.NOT_FOUND, "none"),
        (lambda s: s.update("none"), StatusCode.NOT_FOUND, "none"),
        (lambda s: s.update("base", {}, ["kind"]), StatusCode.INVALID_ARGUMENT, "kind"),
        (lambda s: s.usage("none"), StatusCode.NOT_FOUND, "none"),
        (lambda s: s.list("name=="), StatusCode.INVALID_ARGUMENT, "name=="),
        (lambda s: s.list("name~=("), StatusCode.INVALID_ARGUMENT, "name~=("),
        (lambda s: s.remove("none"), StatusCode.NOT_FOUND, "none"),
        (lambda s: s.remove("base"), StatusCode.FAILED_PRECONDITION, "children"),
    ],
)
def test_each_error_has_the_code_that_containerd_expects(
    stub: Stub, base: str, call: Callable[[Stub], object], code: StatusCode, says: str
) -> None:
    stub.prepare("work", base)
    stub.view("look", base)
    stub.prepare("alone")
    before = stub.list()
    with refused(code, says):
        call(stub)
    assert stub.list() == before


def test_remove_of_a_mounted_snapshot_is_a_failed_precondition(
    stub: Stub, shared_client: BlockingClient
) -> None:
    """Every other code ends containerd's garbage collection."""
    stub.prepare("work")
    target = shared_client.mount("containerd/work")
    with refused(StatusCode.FAILED_PRECONDITION, "mounted"):
        stub.remove("work")
    shared_client.unmount(target)
    stub.remove("work")


def test_snapshots_of_others_do_not_exist_for_containerd(
    stub: Stub, shared_client: BlockingClient
) -> None:
    commit_snapshot(shared_client, "theirs")
    # Also if their names look like those of the plugin.
    commit_snapshot(shared_client, "containerd/base")
    shared_client.prepare("containerd/work", "containerd/base", {OWNER_LABEL: "another"})
    shared_client.prepare("marked", labels={OWNER_LABEL: "containerd"})
    before = [*shared_client.walk()]
    for key in ("theirs", "base", "work", "marked"):
        for call in (
            stub.stat,
            stub.mounts,
            stub.usage,
            stub.update,
            stub.remove,
            lambda key: stub.prepare("new", key),
            lambda key: stub.view("new", key),
            lambda key: stub.commit("new", key),
        ):
            with refused(StatusCode.NOT_FOUND, key):
                call(key)
    assert stub.list() == []
    assert [*shared_client.walk()] == before


def test_two_containerds_share_one_store_without_seeing_each_other(
    shared_service: Service, stub: Stub, shared_client: BlockingClient, tmp_path: Path
) -> None:
    with (
        plugin(shared_service.address, tmp_path, "second") as other,
        connected(other.socket) as second,
    ):
        for each in (stub, second):
            each.prepare("default/1/work")
            each.commit("default/2/layer", "default/1/work")
            each.prepare("default/3/work", "default/2/layer")
        stub.update("default/2/layer", {"mine": "yes"})
        assert dict(second.stat("default/2/layer").labels) == {}
        assert len(second.list()) == 2
        names = [info.name for info in shared_client.walk()]
        assert names == [
            f"{name}/{key}"
            for name in ("containerd", "second")
            for key in ("default/2/layer", "default/3/work")
        ]
        second.remove("default/3/work")
        assert len(stub.list()) == 2


def test_the_label_of_the_owner_is_hidden_and_kept_by_every_change(
    stub: Stub, shared_client: BlockingClient
) -> None:
    def stored(name: str) -> dict[str, str]:
        return dict(shared_client.stat(f"containerd/{name}").labels)

    mark = {OWNER_LABEL: "containerd"}
    stub.prepare("work", labels={"a": "1"})
    assert stored("work") == {"a": "1", **mark}
    stub.commit("base", "work", {"b": "2"})
    assert stored("base") == {"b": "2", **mark}
    shared_client.update("containerd/base", {STANDBY_LABEL: "1"}, [f"labels.{STANDBY_LABEL}"])
    hidden = {STANDBY_LABEL: "1", **mark}
    for labels, paths, expected in (
        ({"c": "3"}, [], {"c": "3"}),
        ({"c.d/e": "4"}, ["labels.c.d/e"], {"c": "3", "c.d/e": "4"}),
        ({}, ["labels.c"], {"c.d/e": "4"}),
        ({"f": "5"}, ["labels"], {"f": "5"}),
        ({}, ["labels"], {}),
        ({}, [], {}),
    ):
        before = stub.stat("base")
        info = stub.update("base", labels, paths)
        assert dict(info.labels) == expected
        assert info == stub.stat("base")
        assert info.created_at == before.created_at
        changed = info.updated_at.seconds, info.updated_at.nanos
        assert changed > (before.updated_at.seconds, before.updated_at.nanos)
        assert stored("base") == expected | hidden
    shared_client.update("containerd/base", {}, [f"labels.{STANDBY_LABEL}"])


@pytest.mark.parametrize("label", [OWNER_LABEL, STANDBY_LABEL])
def test_containerd_cannot_set_labels_of_the_service(stub: Stub, base: str, label: str) -> None:
    stub.prepare("work", base)
    for call in (
        lambda: stub.prepare("new", labels={label: "1"}),
        lambda: stub.view("new", labels={label: "1"}),
        lambda: stub.commit("new", "work", {label: "1"}),
        lambda: stub.update("base", {label: "1"}),
        lambda: stub.update("base", {}, [f"labels.{label}"]),
    ):
        with refused(StatusCode.INVALID_ARGUMENT, label):
            call()
    assert [info.name for info in stub.list()] == ["base", "work"]


def test_list_answers_in_blocks_of_100(stub: Stub, shared_client: BlockingClient) -> None:
    for number in range(2 * BLOCK + 1):
        stub.view(f"key {number:03}")
        shared_client.view(f"theirs {number:03}")
    blocks = stub.blocks()
    assert [len(block) for block in blocks] == [BLOCK, BLOCK, 1]
    names = [info.name for block in blocks for info in block]
    assert names == [f"key {number:03}" for number in range(2 * BLOCK + 1)]


@pytest.mark.parametrize(
    ("filters", "expected"),
    [
        ([], ["base", "look", "work"]),
        (["name==base"], ["base"]),
        (["name==containerd/base"], []),
        (["name~=^(base|look)$"], ["base", "look"]),
        (["parent==base,kind==active"], ["work"]),
        (["kind==view", "kind==committed"], ["base", "look"]),
        (['labels."a.b/c"==d'], ["work"]),
        (['labels."a.b/c"'], ["work"]),
        ([f'labels."{OWNER_LABEL}"'], []),
    ],
)
def test_filters_apply_to_what_containerd_sees(
    stub: Stub, base: str, filters: list[str], expected: list[str]
) -> None:
    stub.prepare("work", base, {"a.b/c": "d"})
    stub.view("look", base)
    assert [info.name for info in stub.list(*filters)] == expected


def test_the_usage_of_an_active_snapshot_is_measured_once_within_the_age(
    shared_service: Service, stub: Stub, tmp_path: Path
) -> None:
    tree = Path(stub.prepare("work").source)
    before = stub.usage("work")
    (tree / "file").write_bytes(b"x" * 100_000)
    assert stub.usage("work") == before
    with (
        plugin(shared_service.address, tmp_path, "containerd", "--usage-age", "0") as exact,
        connected(exact.socket) as other,
    ):
        size, inodes = other.usage("work")
        assert (size >= before[0] + 100_000, inodes) == (True, before[1] + 1)
    # A committed snapshot has the recorded usage.
    stub.commit("base", "work")
    assert stub.usage("base") == (size, inodes)


def test_a_key_that_is_prepared_again_is_measured_again(
    shared_client: BlockingClient, stub: Stub
) -> None:
    tree = Path(stub.prepare("work").source)
    (tree / "file").write_text("text")
    assert stub.usage("work")[1] == 2
    shared_client.remove("containerd/work")
    stub.prepare("work")
    assert stub.usage("work")[1] == 1


def test_callers_share_one_measurement_at_idle_priority(
    shared_service: Service, shared_client: BlockingClient, stub: Stub
) -> None:
    stub.prepare("first")
    stub.usage("first")
    stub.prepare("work")
    with ThreadPoolExecutor() as callers, hold_workers(shared_service, IDLE):
        asked = [callers.submit(stub.usage, "work") for _ in range(5)]
        wait_until(lambda: shared_client.jobs() != [])
        (job,) = shared_client.jobs()
        assert (job.operation, job.key) == ("usage", "containerd/work")
        assert not any(call.done() for call in asked)
    assert len({call.result() for call in asked}) == 1


def test_a_measurement_ends_for_the_others_when_the_first_caller_leaves(
    shared_service: Service, shared_client: BlockingClient, stub: Stub
) -> None:
    stub.prepare("first")
    stub.usage("first")
    stub.prepare("work")
    with ThreadPoolExecutor() as callers, hold_workers(shared_service, IDLE):
        first = stub.begin("Usage", wire.KeyRequest(key="work"), wire.UsageResponse)
        wait_until(lambda: shared_client.jobs() != [])
        second = callers.submit(stub.usage, "work")
        first.cancel()
    assert second.result()[1] == 1


def test_a_cancelled_prepare_leaves_nothing(
    shared_service: Service, shared_client: BlockingClient, stub: Stub, base: str
) -> None:
    before = shared_service.directories()
    with hold_at_files(Path(stub.view("look", base).source) / "file") as copying:
        request = wire.CreateRequest(key="work", parent=base)
        preparing = stub.begin("Prepare", request, wire.MountsResponse)
        copying.wait_until_reached()
        wait_until(lambda: shared_client.jobs() != [])
        preparing.cancel()
        wait_until_equal(shared_client.jobs, [])
    wait_until_idle(shared_service)
    shared_client.cleanup()
    assert shared_service.directories() == before
    assert [info.name for info in stub.list()] == ["base", "look"]
    stub.prepare("work", base)


def test_a_prepare_whose_deadline_passes_leaves_nothing(
    shared_service: Service, shared_client: BlockingClient, stub: Stub, base: str
) -> None:
    """Containerd's CRI gives up after two minutes."""
    before = shared_service.directories()
    with hold_at_files(Path(stub.view("look", base).source) / "file"):
        request = wire.CreateRequest(key="work", parent=base)
        preparing = stub.begin("Prepare", request, wire.MountsResponse, 3)
        wait_until(lambda: shared_client.jobs() != [])
        with pytest.raises(grpc.RpcError) as caught:
            preparing.result()
        assert caught.value.code() is StatusCode.DEADLINE_EXCEEDED
        wait_until_equal(shared_client.jobs, [])
    wait_until_idle(shared_service)
    shared_client.cleanup()
    assert shared_service.directories() == before


def test_a_cancelled_commit_leaves_the_active_snapshot(
    shared_service: Service, shared_client: BlockingClient, stub: Stub
) -> None:
    file = Path(stub.prepare("work").source) / "file"
    file.touch()
    with hold_at_files(file) as sealing:
        request = wire.CommitRequest(name="base", key="work")
        committing = stub.begin("Commit", request, wire.Empty)
        sealing.wait_until_reached()
        wait_until(lambda: shared_client.jobs() != [])
        committing.cancel()
        wait_until_equal(shared_client.jobs, [])
    assert shared_client.stat("containerd/work").kind is Kind.ACTIVE
    stub.commit("base", "work")


def test_more_calls_than_the_service_runs_at_a_time_wait_for_their_turn(
    stub: Stub, base: str
) -> None:
    with ThreadPoolExecutor(100) as callers:
        made = [callers.submit(stub.prepare, f"work {n}", base) for n in range(100)]
        assert len({call.result().source for call in made}) == 100


def test_the_log_of_the_plugin_contains_no_error(stub: Stub, lasting_plugin: Plugin) -> None:
    with refused(StatusCode.NOT_FOUND):
        stub.stat("none")
    assert "ERROR" not in lasting_plugin.log.read_text()
