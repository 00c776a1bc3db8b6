"""The metastore on real SQLite: durability, constraints, damage, full disks, query plans."""

from __future__ import annotations

import os
import re
import sqlite3
import stat
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest

from snapd_native.errors import (
    AlreadyExists,
    DataLoss,
    FailedPrecondition,
    InvalidArgument,
    NotFound,
    ResourceExhausted,
    SnapdError,
    Unavailable,
)
from snapd_native.filters import parse
from snapd_native.metastore import Metastore, connections
from snapd_native.metastore.connections import Connections
from snapd_native.metastore.schema import VERSION, ensure_schema
from snapd_native.model import Added, Change, Committed, Kind, Removed, Updated, Usage
from tests.support.file_systems import new_file_system
from tests.support.full_disk import free_space, use_all_space

USAGE = Usage(4096, 1)


@pytest.fixture
def database() -> Iterator[Path]:
    with TemporaryDirectory(prefix="metastore", dir="/var/tmp") as directory:
        yield Path(directory) / "metadata.db"


@contextmanager
def open_store(
    path: Path, announce: Callable[[Change], None] = lambda *_: None
) -> Iterator[Metastore]:
    with closing(Metastore(path, announce)) as store:
        yield store


@contextmanager
def open_database(path: Path) -> Iterator[sqlite3.Connection]:
    with closing(sqlite3.connect(path, isolation_level=None)) as db:
        db.execute("PRAGMA foreign_keys = ON")
        yield db


def add(
    store: Metastore,
    key: str,
    parent: str = "",
    kind: Kind = Kind.ACTIVE,
    labels: dict[str, str] | None = None,
) -> int:
    held = store.reserve(key, parent)
    try:
        store.publish(held, kind, labels or {})
    finally:
        store.release(held)
    return held.id


def commit(store: Metastore, name: str, key: str, parent: str = "") -> None:
    store.publish_commit(store.reserve_commit(name, key, parent), USAGE, {})


def names(store: Metastore, *filters: str, after: str = "", limit: int = 1000) -> list[str]:
    return [info.name for info in store.list(parse(filters), after, limit)]


@pytest.fixture
def store(database: Path) -> Iterator[Metastore]:
    """Yield a metastore with `base`, its children `work` and `look`, and `lone`."""
    with open_store(database) as made:
        add(made, "preparing base")
        commit(made, "base", "preparing base")
        add(made, "work", "base")
        add(made, "look", "base", Kind.VIEW)
        add(made, "lone")
        yield made


def test_the_database_uses_wal_foreign_keys_and_full_synchronous_writes(database: Path) -> None:
    with closing(Connections(database, lambda: False)) as connections:
        for lend in (connections.writing, connections.reading):
            with lend() as db:
                assert db.execute("PRAGMA journal_mode").fetchone() == ("wal",)
                assert db.execute("PRAGMA foreign_keys").fetchone() == (1,)
        with connections.writing() as db:
            assert db.execute("PRAGMA synchronous").fetchone() == (2,)
            assert not db.in_transaction


def test_a_reading_connection_cannot_write(store: Metastore) -> None:
    with (
        pytest.raises(SnapdError, match="readonly"),
        store._connections.reading() as db,
    ):
        db.execute("DELETE FROM snapshots")
    assert len(names(store)) == 4


def start_process(script: str, *arguments: object) -> subprocess.Popen[str]:
    """Run a script in another process; its input and output are pipes."""
    command = [sys.executable, "-c", script, *map(str, arguments)]
    return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)


TRY_TO_USE = """
import sqlite3, sys
db = sqlite3.connect(sys.argv[1], timeout=0, isolation_level=None)
for statement in ("SELECT count(*) FROM snapshots", "BEGIN IMMEDIATE"):
    try:
        db.execute(statement)
    except sqlite3.OperationalError as error:
        print(error)
"""


def test_no_other_process_can_use_the_database_of_an_open_store(
    store: Metastore, database: Path
) -> None:
    with start_process(TRY_TO_USE, database) as process:
        assert process.communicate()[0] == "database is locked\n" * 2
    assert len(names(store)) == 4


KEEP_OPEN = """
import sqlite3, sys
db = sqlite3.connect(sys.argv[1], isolation_level=None)
db.execute("SELECT count(*) FROM snapshots").fetchone()
print("open", flush=True)
sys.stdin.read()
"""


def test_a_database_that_another_process_has_open_raises_unavailable(
    database: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with open_store(database) as store:
        add(store, "key")
    monkeypatch.setattr(connections, "BUSY_SECONDS", 0)
    with start_process(KEEP_OPEN, database) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "open\n"
        with pytest.raises(Unavailable, match="is open in another program"):
            Metastore(database, lambda _: None)
        process.communicate()
    with open_store(database) as store:
        assert names(store) == ["key"]


def test_no_file_of_the_database_is_mapped_into_memory(store: Metastore) -> None:
    """The kernel kills a process if the disk has no space for a page of a file that it maps."""
    add(store, "another")
    assert len(names(store)) == 5
    assert "metadata.db" not in Path("/proc/self/maps").read_text()


@pytest.mark.parametrize("umask", [0, 0o077])
def test_the_database_files_get_mode_0600(database: Path, umask: int) -> None:
    before = os.umask(umask)
    try:
        with open_store(database) as store:
            add(store, "key")
            modes = {path.name: path.stat().st_mode for path in database.parent.iterdir()}
    finally:
        os.umask(before)
    kept = {"metadata.db", "metadata.db.changes"}
    assert set(modes) == {*kept, "metadata.db-wal"}
    assert {stat.S_IMODE(mode) for mode in modes.values()} == {0o600}
    assert {path.name for path in database.parent.iterdir()} == kept


def test_a_database_file_that_cannot_be_opened_raises_unavailable(database: Path) -> None:
    """The error of SQLite can have passed, such as a lack of inodes on xfs."""
    wal = Path(f"{database}-wal")
    wal.symlink_to(wal)
    with pytest.raises(Unavailable, match="could not be opened"):
        Metastore(database, lambda _: None)


def test_a_database_that_is_a_symlink_is_refused(database: Path) -> None:
    database.symlink_to(database.parent / "elsewhere")
    with pytest.raises(FailedPrecondition, match="is not a file"):
        Metastore(database, lambda *_: None)
    assert not (database.parent / "elsewhere").exists()


SCHEMA_ERRORS = (
    "constraint|cannot store|malformed JSON|the parent is not committed|only Commit changes"
)
INSERT = "INSERT INTO snapshots (name, kind, parent, created, updated, labels, size, inodes) VALUES"


@pytest.mark.parametrize(
    "statement",
    [
        f"{INSERT} ('work', 'active', NULL, 1, 1, '{{}}', NULL, NULL)",
        f"{INSERT} ('new', 'nonsense', NULL, 1, 1, '{{}}', NULL, NULL)",
        f"{INSERT} ('new', NULL, NULL, 1, 1, '{{}}', NULL, NULL)",
        f"{INSERT} (NULL, 'active', NULL, 1, 1, '{{}}', NULL, NULL)",
        f"{INSERT} ('', 'active', NULL, 1, 1, '{{}}', NULL, NULL)",
        f"{INSERT} (printf('%.4095c', 'x') || 'ä', 'active', NULL, 1, 1, '{{}}', NULL, NULL)",
        f"{INSERT} (x'00ff', 'active', NULL, 1, 1, '{{}}', NULL, NULL)",
        f"{INSERT} ('new', 'active', NULL, 'yesterday', 1, '{{}}', NULL, NULL)",
        f"{INSERT} ('new', 'active', NULL, 1, 1, '[]', NULL, NULL)",
        f"{INSERT} ('new', 'active', NULL, 1, 1, 'nonsense', NULL, NULL)",
        f"{INSERT} ('new', 'active', NULL, 1, 1, NULL, NULL, NULL)",
        f"{INSERT} ('new', 'active', NULL, 1, 1, '{{}}', 0, 1)",
        f"{INSERT} ('new', 'committed', NULL, 1, 1, '{{}}', NULL, NULL)",
        f"{INSERT} ('new', 'committed', NULL, 1, 1, '{{}}', 1, NULL)",
        f"{INSERT} ('new', 'committed', NULL, 1, 1, '{{}}', -1, 1)",
        f"{INSERT} ('new', 'committed', NULL, 1, 1, '{{}}', 1, -1)",
        f"{INSERT} ('new', 'active', 999, 1, 1, '{{}}', NULL, NULL)",
        f"{INSERT} ('new', 'active', 2, 1, 1, '{{}}', NULL, NULL)",
        f"{INSERT} ('new', 'view', 3, 1, 1, '{{}}', NULL, NULL)",
        "DELETE FROM snapshots WHERE name = 'base'",
        "UPDATE snapshots SET name = 'other' WHERE name = 'base'",
        "UPDATE snapshots SET name = 'other' WHERE name = 'work'",
        "UPDATE snapshots SET kind = 'active', size = NULL, inodes = NULL WHERE name = 'base'",
        "UPDATE snapshots SET kind = 'view' WHERE name = 'work'",
        "UPDATE snapshots SET kind = 'committed', size = 1, inodes = 1 WHERE name = 'look'",
        "UPDATE snapshots SET kind = 'committed' WHERE name = 'work'",
        "UPDATE snapshots SET parent = NULL WHERE name = 'work'",
        "UPDATE snapshots SET parent = 3 WHERE name = 'lone'",
        "UPDATE snapshots SET kind = 'committed', size = 1, inodes = 1, parent = 2"
        " WHERE name = 'lone'",
        "UPDATE snapshots SET kind = 'committed', size = 1, inodes = 1, parent = id"
        " WHERE name = 'lone'",
        "UPDATE snapshots SET size = 5 WHERE name = 'base'",
        "UPDATE snapshots SET created = 5 WHERE name = 'base'",
        "UPDATE snapshots SET id = 99 WHERE name = 'lone'",
        "UPDATE snapshots SET labels = '7' WHERE name = 'base'",
    ],
)
def test_the_schema_refuses_invalid_rows_and_changes(
    store: Metastore, database: Path, statement: str
) -> None:
    before = store.list(parse([]), "", 100)
    with open_database(database) as db, pytest.raises(sqlite3.Error, match=SCHEMA_ERRORS):
        db.execute(statement)
    assert store.list(parse([]), "", 100) == before


def test_a_name_of_4096_bytes_can_be_stored(store: Metastore) -> None:
    name = "ä" * 2048
    add(store, name, "base")
    assert store.get(name).info.name == name


def test_the_schema_of_a_current_database_is_not_changed(database: Path) -> None:
    with open_store(database) as store:
        add(store, "key")
    with open_database(database) as db:
        assert db.execute("PRAGMA user_version").fetchone() == (VERSION,)
        before = list(db.execute("SELECT * FROM sqlite_schema"))
        ensure_schema(db)
        assert list(db.execute("SELECT * FROM sqlite_schema")) == before
    with open_store(database) as store:
        assert names(store) == ["key"]


def test_a_database_of_a_newer_version_is_refused_and_unchanged(database: Path) -> None:
    with open_store(database) as store:
        add(store, "key")
    with open_database(database) as db:
        db.execute(f"PRAGMA user_version = {VERSION + 1}")
    with pytest.raises(DataLoss, match="newer version"):
        Metastore(database, lambda *_: None)
    with open_database(database) as db:
        assert db.execute("SELECT name FROM snapshots").fetchall() == [("key",)]
        db.execute(f"PRAGMA user_version = {VERSION}")
    with open_store(database) as store:
        assert names(store) == ["key"]


@pytest.mark.parametrize("kept", [0, 24, 100], ids="{} bytes kept".format)
def test_a_damaged_database_file_raises_data_loss(database: Path, kept: int) -> None:
    with open_store(database) as store:
        add(store, "key")
    content = database.read_bytes()
    database.write_bytes(content[:kept] + b"garbage!" * 2000)
    with pytest.raises(DataLoss, match=r"metadata\.db"), open_store(database) as store:
        store.get("key")


def test_damaged_database_pages_raise_data_loss(database: Path) -> None:
    with open_store(database) as store:
        for number in range(500):
            add(store, f"key {number:03}", labels={"label": "x" * 200})
    size = database.stat().st_size
    with database.open("r+b") as file:
        file.seek(size // 4)
        file.write(b"garbage!" * (size // 16))
    with open_store(database) as store, pytest.raises(DataLoss):
        names(store)


def test_readers_do_not_wait_for_a_writer(store: Metastore, database: Path) -> None:
    def read_everything() -> list[str]:
        store.check_health()
        assert store.get("work").info.parent == "base"
        assert set(store.directories()) == {1, 2, 4}
        return names(store)

    with open_database(database) as other, ThreadPoolExecutor(1) as pool:
        other.execute("BEGIN IMMEDIATE")
        other.execute("DELETE FROM snapshots WHERE name = 'lone'")
        assert read_everything() == ["base", "lone", "look", "work"]
        other.execute("ROLLBACK")
        with store._connections.writing() as db:
            db.execute("BEGIN IMMEDIATE")
            db.execute("DELETE FROM snapshots WHERE name = 'lone'")
            seen = pool.submit(read_everything).result(timeout=60)
            db.execute("ROLLBACK")
    assert seen == ["base", "lone", "look", "work"]


def test_changes_fail_on_a_full_disk_until_space_is_free(loop_directory: Path) -> None:
    announced: list[Change] = []
    with new_file_system("ext4", 16 << 20, loop_directory) as disk:
        with open_store(disk.root / "metadata.db", announced.append) as store:
            add(store, "before")
            use_all_space(disk.root)
            with pytest.raises(ResourceExhausted, match="no room"):
                add_large_snapshots(store)
            full = names(store)
            assert announced == [Added(name, Kind.ACTIVE, "") for name in ["before", *full[1:]]]
            for change in (
                lambda: store.update("before", lambda _: {"label": "x" * 400_000}),
                lambda: add(store, "large", labels={"label": "x" * 400_000}),
                lambda: store.publish_commit(
                    store.reserve_commit("large", "before", ""), USAGE, {"label": "x" * 400_000}
                ),
            ):
                with pytest.raises(ResourceExhausted):
                    change()
            assert names(store) == full
            assert store.get("before").info.labels == {}
            free_space(disk.root)
            store.release(store._reservations._held["large"])
            add(store, "later", labels={"label": "x" * 400_000})
            assert names(store) == [*full, "later"]
        with open_store(disk.root / "metadata.db") as store:
            assert names(store) == [*full, "later"]


def test_a_metastore_on_a_full_disk_raises_resource_exhausted(loop_directory: Path) -> None:
    with new_file_system("ext4", 16 << 20, loop_directory) as disk:
        with open_store(disk.root / "metadata.db") as store:
            add(store, "before")
        use_all_space(disk.root)
        with pytest.raises(ResourceExhausted), open_store(disk.root / "metadata.db") as store:
            add_large_snapshots(store)
        free_space(disk.root)
        with open_store(disk.root / "metadata.db") as store:
            assert names(store)[0] == "before"


def add_large_snapshots(store: Metastore) -> None:
    for number in range(1000):
        add(store, f"filling {number:04}", labels={"label": "x" * 4000})


# Rules.


def test_reserve_and_reserve_commit_check_their_arguments_in_order(store: Metastore) -> None:
    prepares: tuple[tuple[str, str, type[SnapdError]], ...] = (
        ("work", "nothing", NotFound),
        ("work", "lone", InvalidArgument),
        ("work", "look", InvalidArgument),
        ("work", "base", AlreadyExists),
        ("base", "", AlreadyExists),
    )
    for key, parent, error in prepares:
        with pytest.raises(error):
            store.reserve(key, parent)
    commits: tuple[tuple[str, str, str, type[SnapdError]], ...] = (
        ("work", "nothing", "nothing", AlreadyExists),
        ("work", "work", "", AlreadyExists),
        ("new", "nothing", "nothing", NotFound),
        ("new", "look", "nothing", FailedPrecondition),
        ("new", "base", "nothing", FailedPrecondition),
        ("new", "work", "nothing", InvalidArgument),
        ("new", "lone", "nothing", NotFound),
        ("new", "lone", "look", InvalidArgument),
        ("new", "lone", "lone", InvalidArgument),
    )
    for name, key, parent, error in commits:
        with pytest.raises(error):
            store.reserve_commit(name, key, parent)
    assert store.reserved() == set()


def test_a_reservation_blocks_its_name_and_its_parent(store: Metastore) -> None:
    held = store.reserve("new", "base")
    store.remove("work")
    store.remove("look")
    with pytest.raises(NotFound):
        store.get("new")
    with pytest.raises(AlreadyExists):
        store.reserve("new", "")
    with pytest.raises(AlreadyExists):
        store.reserve_commit("new", "lone", "")
    with pytest.raises(FailedPrecondition, match="it has children"):
        store.remove("base")
    store.release(held)
    committing = store.reserve_commit("new", "lone", "base")
    store.release(held)
    for refused in (
        lambda: store.reserve("new", ""),
        lambda: store.reserve_commit("other", "lone", ""),
        lambda: store.remove("base"),
        lambda: store.remove("lone"),
    ):
        with pytest.raises((AlreadyExists, FailedPrecondition)):
            refused()
    store.publish_commit(committing, USAGE, {})
    assert store.get("new").info.parent == "base"
    assert store.reserved() == set()


def test_a_new_start_forgets_reservations_and_reuses_no_id(database: Path) -> None:
    with open_store(database) as store:
        last = max(add(store, str(number)) for number in range(5))
        store.reserve("held", "")
        for number in range(5):
            store.remove(str(number))
    with open_store(database) as store:
        assert add(store, "held") > last
    with closing(Metastore(database, lambda *_: None, first_id=1000)) as store:
        assert add(store, "new") == 1000


def test_pages_are_in_byte_order(store: Metastore) -> None:
    more = ["Z", "a", "a b", "a/b", "ä", "z", "\uffff", "😀", "\x01", "\x7f"]
    for name in more:
        add(store, name)
    expected = sorted([*more, "base", "work", "look", "lone"], key=str.encode)
    assert names(store) == expected
    for limit in (1, 3, len(expected), 1000):
        paged: list[str] = []
        while page := names(store, after=paged[-1] if paged else "", limit=limit):
            paged += page
        assert paged == expected
    assert names(store, "name!=a", after="a b", limit=2) == ["a/b", "base"]


@pytest.mark.parametrize(
    ("filters", "expected"),
    [
        (["name==base"], ["base"]),
        (["parent==base"], ["look", "work"]),
        (["parent==base,kind==view"], ["look"]),
        (["parent==nothing"], []),
        (['parent==""'], ["base", "lone"]),
        (["kind==active", "name==look"], ["lone", "look", "work"]),
        (["name==base,name==lone"], []),
        (["kind~=^a", "nonsense"], ["lone", "work"]),
        ([r'name=="\xff"', r'parent=="\u0000"'], []),
        ([",".join(["name==base"] * 20)] * 100, ["base"]),
        ([",".join(["name==base"] * 1400)], ["base"]),
        ([",".join(["kind==active"] * 20 + ["name==lone"])], ["lone"]),
    ],
    ids=str,
)
def test_list_returns_the_snapshots_that_match_the_filters(
    store: Metastore, filters: list[str], expected: list[str]
) -> None:
    assert names(store, *filters) == expected


def test_a_page_larger_than_a_message_raises_resource_exhausted(store: Metastore) -> None:
    for number in range(9):
        add(store, f"large {number}", labels={"label": "x" * (1 << 20)})
    with pytest.raises(ResourceExhausted, match="smaller limit"):
        names(store)
    assert len(names(store, limit=7)) == 7
    with store._connections.writing() as db:
        assert db.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchone()[0] == 0


def test_announcements_are_in_the_order_of_the_changes(database: Path) -> None:
    with open_store(database) as store:
        add(store, "preparing base")
        commit(store, "base", "preparing base")
    with open_database(database) as db:
        db.executescript("""
            CREATE TABLE log (number INTEGER PRIMARY KEY AUTOINCREMENT, change TEXT);
            CREATE TRIGGER added AFTER INSERT ON snapshots
                BEGIN INSERT INTO log (change) VALUES ('Added ' || new.name); END;
            CREATE TRIGGER committed AFTER UPDATE OF kind ON snapshots
                BEGIN INSERT INTO log (change)
                    VALUES ('Committed ' || new.name || ' ' || old.name); END;
            CREATE TRIGGER labelled AFTER UPDATE OF labels ON snapshots WHEN new.kind = old.kind
                BEGIN INSERT INTO log (change) VALUES ('Updated ' || new.name); END;
            CREATE TRIGGER removed AFTER DELETE ON snapshots
                BEGIN INSERT INTO log (change) VALUES ('Removed ' || old.name); END;
        """)
    announced: list[Change] = []
    start = threading.Barrier(8)

    def work(number: int) -> None:
        start.wait()
        for turn in range(10):
            key, name = f"{number}-{turn}", f"{number}-{turn}-done"
            add(store, key, "base")
            store.update(key, lambda _: {"a": "b"})
            commit(store, name, key)
            store.remove(name)

    with open_store(database, announced.append) as store, ThreadPoolExecutor(8) as pool:
        list(pool.map(work, range(8)))
    with open_database(database) as db:
        logged = [change for (change,) in db.execute("SELECT change FROM log ORDER BY number")]
    assert [describe(change) for change in announced] == logged
    assert len(logged) == 320


def describe(change: Change) -> str:
    match change:
        case Added(key):
            return f"Added {key}"
        case Committed(name, key):
            return f"Committed {name} {key}"
        case Updated(name):
            return f"Updated {name}"
        case Removed(key):
            return f"Removed {key}"


# Query plans.


@contextmanager
def trace_statements(store: Metastore) -> Iterator[list[str]]:
    """Collect the statements that the store executes."""
    statements: list[str] = []
    for lend in (store._connections.writing, store._connections.reading):
        with lend() as db:
            db.set_trace_callback(statements.append)
    yield statements


@pytest.mark.parametrize(
    ("call", "indices"),
    [
        (lambda store: store.get("work"), ["name=?"]),
        (lambda store: names(store, limit=2), ["name>?"]),
        (lambda store: names(store, after="k", limit=2), ["name>?"]),
        (lambda store: names(store, "labels.x~=y"), ["name>?"]),
        (lambda store: names(store, "name==work"), ["name=?"]),
        (lambda store: names(store, "parent==base"), ["children (parent=?)", "name=?"]),
        (lambda store: names(store, "name==work", "name==look"), ["name"]),
        (lambda store: store.reserve("new", "base"), ["name=?"]),
        (lambda store: add(store, "new", "base"), ["name=?"]),
        (lambda store: store.update("work", lambda _: {}), ["name=?"]),
        (lambda store: commit(store, "new", "lone", "base"), ["name=?"]),
        (lambda store: store.remove("lone"), ["name=?", "children (parent=?)"]),
    ],
    ids=[
        *("get", "first page", "page in the middle", "page of a label", "by name", "by parent"),
        *("by two names", "reserve", "publish", "update", "commit", "remove"),
    ],
)
def test_queries_use_the_indexes(
    store: Metastore, database: Path, call: Callable[[Metastore], object], indices: list[str]
) -> None:
    with trace_statements(store) as statements:
        call(store)
    plans = []
    with open_database(database) as db:
        for statement in statements:
            if re.match("SELECT|INSERT|UPDATE|DELETE", statement.lstrip()):
                plans += [row[3] for row in db.execute(f"EXPLAIN QUERY PLAN {statement}")]
    assert plans
    assert not [plan for plan in plans if re.match("SCAN (?!CONSTANT)", plan)]
    for index in indices:
        assert any(index in plan for plan in plans), plans
    if indices == ["name>?"]:
        assert not [plan for plan in plans if "TEMP B-TREE" in plan]
