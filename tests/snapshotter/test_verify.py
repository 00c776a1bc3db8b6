"""Digests recorded at commit, and Verify, which finds trees that have changed since."""

from __future__ import annotations

import json
import mmap
import os
import re
import sqlite3
import subprocess
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path

import pytest

from snapd_native.client import BlockingClient
from snapd_native.errors import (
    Cancelled,
    DataLoss,
    FailedPrecondition,
    InvalidArgument,
    NotFound,
    SnapdError,
)
from snapd_native.jobs import Job
from snapd_native.model import DIGEST_LABEL, Usage
from snapd_native.snapshotter import Snapshotter
from tests.support.disk_damage import damage_on_disk
from tests.support.engine import open_engine, state_of, write_files
from tests.support.file_systems import long_on_xfs, new_file_system
from tests.support.sealing import unsealed
from tests.support.service import Service, call_method

pytestmark = long_on_xfs

LABEL = f"labels.{DIGEST_LABEL}"

MAP_LOCKED = 0x2000


def digest_of(engine: Snapshotter, name: str) -> str:
    return engine.stat(name).labels[DIGEST_LABEL]


@contextmanager
def expect_error_without_change(
    engine: Snapshotter, error: type[SnapdError], says: str
) -> Iterator[None]:
    before = state_of(engine)
    with pytest.raises(error, match=says):
        yield
    assert state_of(engine) == before


@pytest.fixture
def engine_with_digest(populated: Snapshotter) -> Snapshotter:
    write_files(populated.mounts("work"), more="more")
    populated.commit("done", "work", {"of": "done"}, digest=True)
    return populated


def test_commit_with_digest_records_the_digest(engine_with_digest: Snapshotter) -> None:
    assert re.fullmatch("sha256:[0-9a-f]{64}", digest_of(engine_with_digest, "done"))
    assert engine_with_digest.stat("done").labels["of"] == "done"
    assert engine_with_digest.upkeep.verify("done") == digest_of(engine_with_digest, "done")
    assert DIGEST_LABEL not in engine_with_digest.stat("base").labels


def test_verify_finds_damage_on_disk_that_the_page_cache_hides(populated: Snapshotter) -> None:
    file = Path(populated.mounts("work").source) / "large"
    file.write_bytes(os.urandom(3 << 20))
    populated.commit("done", "work", digest=True)
    content = file.read_bytes()
    # Mapped and locked pages stay in memory, even when memory is short.
    flags = mmap.MAP_SHARED | MAP_LOCKED
    with file.open("rb") as opened, mmap.mmap(opened.fileno(), 0, flags, mmap.PROT_READ):
        damage_on_disk(file)
        assert file.read_bytes() == content
        with pytest.raises(DataLoss, match='"done"'):
            populated.upkeep.verify("done")


def test_verify_finds_damage_on_a_file_system_that_ignores_o_direct(loop_directory: Path) -> None:
    with (
        new_file_system("ext4", 64 << 20, loop_directory, flags="data=journal") as journaled,
        open_engine(journaled.root / "state") as engine,
    ):
        file = Path(engine.prepare("work").source) / "large"
        file.write_bytes(os.urandom(3 << 20))
        engine.commit("done", "work", digest=True)
        # A freeze writes the data from the journal to its place.
        for flag in ("--freeze", "--unfreeze"):
            subprocess.run(["fsfreeze", flag, str(journaled.root)], check=True)
        content = file.read_bytes()
        damage_on_disk(file)
        assert file.read_bytes() == content
        with pytest.raises(DataLoss, match='"done"'):
            engine.upkeep.verify("done")


@pytest.mark.parametrize("text", ["sha256", "yes", "SHA256:12"])
def test_commit_with_the_digest_label_records_the_digest(populated: Snapshotter, text: str) -> None:
    populated.prepare("copy", "base")
    populated.commit("done", "work", {DIGEST_LABEL: text})
    populated.commit("same", "copy", digest=True)
    assert (
        digest_of(populated, "done")
        == digest_of(populated, "same")
        == populated.upkeep.verify("done")
    )


def test_commit_with_another_digest_in_the_label_raises_failed_precondition(
    populated: Snapshotter,
) -> None:
    populated.prepare("copy", "base")
    populated.prepare("other", "base")
    populated.commit("done", "work", digest=True)
    populated.commit("same", "copy", {DIGEST_LABEL: digest_of(populated, "done")})
    assert digest_of(populated, "same") == digest_of(populated, "done")
    write_files(populated.mounts("other"), other="other")
    with expect_error_without_change(populated, FailedPrecondition, "its digest is sha256:"):
        populated.commit("another", "other", {DIGEST_LABEL: digest_of(populated, "done")})
    populated.commit("another", "other")


@pytest.mark.parametrize("text", ["sha256:", "sha256:" + "0" * 63, "sha256:" + "G" * 64])
def test_commit_with_a_malformed_digest_raises_invalid_argument(
    populated: Snapshotter, text: str
) -> None:
    with expect_error_without_change(populated, InvalidArgument, "64 hexadecimal digits"):
        populated.commit("done", "work", {DIGEST_LABEL: text})


def test_update_cannot_change_or_remove_the_digest(engine_with_digest: Snapshotter) -> None:
    digest = digest_of(engine_with_digest, "done")
    assert engine_with_digest.update("done", {"of": "new"}).labels == {
        "of": "new",
        DIGEST_LABEL: digest,
    }
    assert engine_with_digest.update("done", {DIGEST_LABEL: digest}).labels == {
        DIGEST_LABEL: digest
    }
    engine_with_digest.update("done", {DIGEST_LABEL: digest}, [LABEL])
    for name, labels, paths in (
        ("done", {}, [LABEL]),
        ("done", {DIGEST_LABEL: "sha256:" + "0" * 64}, [LABEL]),
        ("done", {DIGEST_LABEL: "no"}, []),
        ("base", {DIGEST_LABEL: digest}, [LABEL]),
    ):
        with expect_error_without_change(engine_with_digest, InvalidArgument, "only Commit"):
            engine_with_digest.update(name, labels, paths)
    assert engine_with_digest.update("base", {}, [LABEL]).labels == {"of": "base"}
    # On a snapshot that is not committed, it is an ordinary label.
    engine_with_digest.update("lone", {DIGEST_LABEL: "sha256:1"})
    engine_with_digest.update("lone", {}, [LABEL])


def test_update_can_remove_a_label_that_is_not_a_digest(populated_state: Path) -> None:
    """Older versions gave the label no meaning, so it can have any value."""
    with closing(sqlite3.connect(populated_state / "metadata.db")) as db, db:
        labels = json.dumps({DIGEST_LABEL: "no", "a": "b"})
        db.execute("UPDATE snapshots SET labels = ? WHERE name = 'base'", (labels,))
    with open_engine(populated_state) as engine:
        with expect_error_without_change(engine, FailedPrecondition, "no digest was recorded"):
            engine.upkeep.verify("base")
        with expect_error_without_change(engine, InvalidArgument, "only Commit"):
            engine.update("base", {DIGEST_LABEL: "else"}, [LABEL])
        assert engine.update("base", {DIGEST_LABEL: "no"}).labels == {DIGEST_LABEL: "no"}
        assert engine.update("base", {}, [LABEL]).labels == {}


def test_the_digest_counts_toward_the_limit_of_all_labels(populated: Snapshotter) -> None:
    labels = {f"{number:04}": "x" * 4092 for number in range(256)}
    for asked in ({}, {DIGEST_LABEL: "x"}):
        with expect_error_without_change(populated, InvalidArgument, "in all"):
            populated.commit("done", "work", {**labels, **asked}, digest=True)
    populated.commit("done", "work", labels)


def test_verify_of_a_changed_tree_raises_data_loss(engine_with_digest: Snapshotter) -> None:
    (source,) = (p for p in snapshots(engine_with_digest) if (p / "more").exists())
    times = (source / "more").stat()
    (unsealed(source) / "more").write_text("mere")
    os.utime(source / "more", ns=(times.st_atime_ns, times.st_mtime_ns))
    with expect_error_without_change(
        engine_with_digest, DataLoss, '"done" is not what was committed'
    ):
        engine_with_digest.upkeep.verify("done")
    (source / "more").write_text("more")
    os.utime(source / "more", ns=(times.st_atime_ns, times.st_mtime_ns))
    assert engine_with_digest.upkeep.verify("done") == digest_of(engine_with_digest, "done")


def test_verify_of_a_lost_tree_raises_data_loss(engine_with_digest: Snapshotter) -> None:
    (source,) = (p for p in snapshots(engine_with_digest) if (p / "more").exists())
    unsealed(source).rename(engine_with_digest.state_directory / "elsewhere")
    with pytest.raises(DataLoss, match="gone"):
        engine_with_digest.upkeep.verify("done")


def test_verify_without_a_recorded_digest_raises_failed_precondition(
    populated: Snapshotter,
) -> None:
    for name in ("base", "work", "look"):
        with expect_error_without_change(populated, FailedPrecondition, "no digest was recorded"):
            populated.upkeep.verify(name)
    with pytest.raises(NotFound):
        populated.upkeep.verify("nothing")
    with pytest.raises(InvalidArgument):
        populated.upkeep.verify("")


def test_verify_reports_progress_and_can_be_cancelled(engine_with_digest: Snapshotter) -> None:
    job = Job()
    engine_with_digest.upkeep.verify("done", job)
    assert job.done == job.total != Usage(0, 0)
    job = Job()
    job.cancel()
    with expect_error_without_change(engine_with_digest, Cancelled, "verify"):
        engine_with_digest.upkeep.verify("done", job)


def snapshots(engine: Snapshotter) -> list[Path]:
    return [path for path in (engine.state_directory / "snapshots").iterdir() if path.is_dir()]


def test_verify_over_the_bus_returns_the_digest(
    shared_service: Service, shared_client: BlockingClient
) -> None:
    source = Path(shared_client.prepare("key").source)
    (source / "file").write_text("text")
    shared_client.commit("name", "key", digest=True)
    digest = shared_client.verify("name")
    assert shared_client.stat("name").labels == {DIGEST_LABEL: digest}
    assert call_method("Verify", "sa{sv}", "name", {}) == [digest]
    assert shared_client.repair() == []
    (unsealed(source) / "file").write_text("next")
    with pytest.raises(DataLoss):
        shared_client.verify("name")
