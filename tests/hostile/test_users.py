"""Local users without rights: the files that they can reach, and the facts that they learn."""

from __future__ import annotations

import os
import stat
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from dbus_next.message import Message

from snapd_native.bus.introspection import contract, interfaces
from snapd_native.client import BlockingClient
from snapd_native.errors import FailedPrecondition
from snapd_native.private import private_bus
from snapd_native.wire.names import INTROSPECTABLE, JOB, JOB_PATH, MANAGER, OBJECT_PATH, PROPERTIES
from tests.support.bus_mounts import populate_service
from tests.support.descriptors import worker_pids
from tests.support.engine import open_engine, populate
from tests.support.file_systems import on_ext4
from tests.support.kernel_mounts import make_target
from tests.support.polkit_daemon import POLICY, run_polkitd
from tests.support.raw_client import RawClient, connect_many
from tests.support.service import NOBODY, Service, as_user, check_sentence, run_daemon

pytestmark = on_ext4

METHODS = interfaces(contract())[MANAGER].methods
VALUES: dict[str, object] = {"a{sv}": {}, "a{ss}": {}, "as": []}


@pytest.fixture
def populated_service(service: Service) -> Service:
    with BlockingClient() as client:
        populate_service(client)
        client.usage("work")
    return service


def get_reply(
    raw: RawClient,
    member: str,
    signature: str,
    *body: object,
    path: str = OBJECT_PATH,
    interface: str = MANAGER,
) -> Message:
    raw.socket.sendall(raw.pack_call(member, signature, *body, path=path, interface=interface))
    (reply,) = raw.replies(1).values()
    return reply


def errors_of(raw: RawClient, member: str, texts: list[str]) -> set[tuple[str, str]]:
    """Call a method with each text as its first argument; return the errors."""
    signature, _ = METHODS[member]
    found = set()
    for text in texts:
        rest = signature
        body: list[object] = []
        while rest:
            kind = next(kind for kind in ("s", *VALUES) if rest.startswith(kind))
            rest = rest.removeprefix(kind)
            body.append(VALUES.get(kind, text if not body else "secret"))
        reply = get_reply(raw, member, signature, *body)
        found.add((reply.error_name, reply.body[0]))
    return found


def check_same_error_for_all(raw: RawClient, texts: list[str]) -> None:
    for member in METHODS:
        ((name, sentence),) = errors_of(raw, member, texts)
        assert name.startswith("org.freedesktop.DBus.Error."), name
        check_sentence(sentence, member, f"uid {NOBODY}")
        assert not any(f'"{text}"' in sentence for text in texts)


NAMES = ["base", "work", "look", "none", "", "x" * 5000]
"""Names of snapshots, an unused name, and invalid names."""


def test_a_denied_user_does_not_learn_which_snapshots_exist(
    populated_service: Service, places: Path
) -> None:
    here = str(make_target(places))
    with BlockingClient() as client, connect_many(populated_service.address, 1, NOBODY) as (raw,):
        client.mount("work", here)
        check_same_error_for_all(raw, [*NAMES, here, "/none"])
        client.unmount(here)


RULES = """
polkit.addRule(function(action, subject) {
    if (action.id.indexOf("org.snapdnative1.") == 0) return polkit.Result.AUTH_ADMIN;
});
"""


def test_a_user_denied_by_polkit_does_not_learn_which_snapshots_exist(
    scratch: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tmp_path.chmod(0o755)
    with private_bus([POLICY]) as address, run_polkitd(address, RULES, tmp_path):
        monkeypatch.setenv("DBUS_SYSTEM_BUS_ADDRESS", address)
        with run_daemon(address, scratch / "state"), connect_many(address, 1, NOBODY) as (raw,):
            with BlockingClient() as client:
                populate_service(client)
            check_same_error_for_all(raw, NAMES)


def test_a_denied_user_learns_only_the_numbers_of_jobs(
    waiting_job: str, shared_service: Service
) -> None:
    """Introspect shows only the numbers, which the signals of jobs send to every user anyway."""
    none = f"{JOB_PATH}/4000000000"
    with connect_many(shared_service.address, 1, NOBODY) as (raw,):
        for member, interface, signature, body in (
            ("Cancel", JOB, "", []),
            ("Cancel", JOB, "s", ["key"]),
            ("Get", PROPERTIES, "ss", [JOB, "Key"]),
            ("GetAll", PROPERTIES, "s", [JOB]),
            ("GetAll", PROPERTIES, "", []),
        ):
            found = set()
            for path in (waiting_job, none, f"{JOB_PATH}/x"):
                reply = get_reply(raw, member, signature, *body, path=path, interface=interface)
                found.add((reply.error_name, reply.body[0]))
            ((name, _),) = found
            assert name == "org.freedesktop.DBus.Error.AccessDenied"
        for path in ("/org/snapdnative1", JOB_PATH, waiting_job):
            (xml,) = get_reply(raw, "Introspect", "", path=path, interface=INTROSPECTABLE).body
            assert not any(word in xml for word in ('"key"/', "base", "work", str(NOBODY)))


_PROBE = """
import os, sys
for path in sys.argv[1:]:
    for look in (os.listdir, os.readlink, lambda path: os.open(path, os.O_RDONLY)):
        try:
            look(path)
        except OSError:
            continue
        print(path)
        break
"""


def accessible(*paths: Path | str) -> list[str]:
    """Return those of ``paths`` that a user without rights can open, list or follow."""
    command = [*as_user(NOBODY), sys.executable, "-S", "-c", _PROBE, *map(str, paths)]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    return done.stdout.splitlines()


PRIVATE = ("fd", "fdinfo", "environ", "cwd", "root", "exe", "maps", "mem", "map_files")
"""Files in /proc that show data of a process or lead to its open files; see proc(5)."""


def test_other_users_cannot_read_the_processes_of_the_daemon(populated_service: Service) -> None:
    with BlockingClient() as client:
        client.prepare("secret", "base")
        client.usage("secret")
    pids = [populated_service.pid, *worker_pids(populated_service)]
    assert len(pids) > 1
    for pid in pids:
        process = Path(f"/proc/{pid}")
        private = [process / name for name in PRIVATE]
        assert accessible(*private, *(process / "fd").iterdir()) == []
        assert accessible(process / "cmdline") == [str(process / "cmdline")]
        assert b"secret" not in (process / "cmdline").read_bytes()


def test_other_users_cannot_reach_setuid_files_in_trees(populated_service: Service) -> None:
    with BlockingClient() as client:
        source = Path(client.mounts("work").source)
        (source / "rootshell").write_bytes(Path("/bin/sh").read_bytes())
        (source / "rootshell").chmod(0o4755)
        mounted = Path(client.mount("work"))
        found = [
            *(directory / "rootshell" for directory in (source, mounted)),
            *(
                Path(f"/proc/{populated_service.pid}/root/{path}/rootshell")
                for path in (source, mounted)
            ),
            *(source.parents[0], source.parents[1], mounted.parents[0], mounted.parents[1]),
        ]
        assert accessible(*found) == []
        for path in found[:2]:
            assert path.stat().st_mode & stat.S_ISUID
        client.unmount(str(mounted))


@pytest.fixture
def umask_zero() -> Iterator[None]:
    before = os.umask(0)
    yield
    os.umask(before)


@pytest.mark.usefixtures("umask_zero")
@pytest.mark.parametrize("mode", [None, 0o755, 0o777, 0o2777])
def test_the_run_directory_gets_mode_0700_and_no_acl(scratch: Path, mode: int | None) -> None:
    run = scratch / "run"
    if mode is not None:
        (run / "mounts").mkdir(parents=True)
        for path in (run, run / "mounts"):
            path.chmod(mode)
            subprocess.run(["setfacl", "-d", "-m", f"user:{NOBODY}:rwx", str(path)], check=True)
    with open_engine(scratch / "state") as engine:
        populate(engine)
        target = engine.mounter.mount("look")
        try:
            for path in (run, run / "mounts"):
                assert stat.S_IMODE(path.stat().st_mode) == 0o700
                assert os.listxattr(path) == []
            assert accessible(target, run, run / "mounts") == []
        finally:
            engine.mounter.unmount(target)


@pytest.mark.parametrize("owner", [0, NOBODY])
def test_a_run_directory_of_another_user_or_with_foreign_files_is_refused(
    scratch: Path, owner: int
) -> None:
    run = scratch / "run"
    run.mkdir(mode=0o755)
    run.chmod(0o755)
    if owner:
        os.chown(run, owner, owner)
    else:
        (run / "something else").touch()
    with pytest.raises(FailedPrecondition, match="run"), open_engine(scratch / "state"):
        pass
    assert stat.S_IMODE(run.stat().st_mode) == 0o755
