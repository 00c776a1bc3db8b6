"""Calls of users other than root, which a real polkit allows or denies."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from snapd_native.bus.authority import MAX_QUESTIONS
from snapd_native.client import BlockingClient
from snapd_native.errors import (
    AccessDenied,
    InteractiveAuthorizationRequired,
    ResourceExhausted,
    Unavailable,
)
from snapd_native.private import private_bus
from snapd_native.trees.relay import IDLE
from snapd_native.wire.names import BUS_NAME, JOB, MANAGER, OBJECT_PATH, error_from
from snapd_native.wire.values import Body
from tests.support.file_systems import on_ext4
from tests.support.holding import hold_workers, stop_processes
from tests.support.kernel_mounts import make_target, mounts_below
from tests.support.polkit_daemon import POLICY, run_polkitd
from tests.support.raw_client import connect_many
from tests.support.service import (
    HANG_TIMEOUT,
    NOBODY,
    Service,
    connection,
    run_daemon,
    snapshots_and_directories,
)
from tests.support.waiting import wait_until

pytestmark = on_ext4

RULES = """
polkit.addRule(function(action, subject) {
    if (action.id.indexOf("org.snapdnative1.") != 0) return;
    var what = action.id.split(".").pop();
    if (subject.user == "nobody")
        return {read: polkit.Result.YES, manage: polkit.Result.AUTH_ADMIN,
                mount: polkit.Result.NO}[what];
    if (subject.user == "daemon") {
        if (action.lookup("key") == "forbidden" || action.lookup("target") == "/forbidden")
            return polkit.Result.NO;
        // Mount names a key, Unmount does not.
        if (what == "mount" && !action.lookup("key")) return polkit.Result.NO;
        return polkit.Result.YES;
    }
});
"""

DAEMON, BIN = 1, 2
"""Uids that every Debian has. `RULES` allow calls of the first, and do not mention the second."""

READS = [
    ("Stat", "s", "base"),
    ("Usage", "s", "base"),
    ("BackgroundUsage", "sa{sv}", "base", "0"),
    ("Mounts", "s", "work"),
    ("Standby", "s", "base"),
    ("List", "asa{sv}", "0", "0"),
    ("ListMounts", "s", ""),
    ("ListJobs",),
]
CHANGES = [
    ("Prepare", "ssa{sv}", "new", "", "0"),
    ("View", "ssa{sv}", "new", "base", "0"),
    ("Commit", "ssa{sv}", "new", "work", "0"),
    ("Update", "sa{ss}as", "base", "0", "0"),
    ("Remove", "sa{sv}", "work", "0"),
    ("Cleanup", "a{sv}", "0"),
    ("PrepareJob", "ssa{sv}", "new", "", "0"),
    ("CommitJob", "ssa{sv}", "new", "work", "0"),
]
MOUNTS = [
    ("Mount", "ssa{sv}", "work", "", "0"),
    ("Unmount", "sa{sv}", "/none", "0"),
    ("OpenTree", "sa{sv}", "work", "0"),
]
"""The calls of each polkit action, as arguments of busctl."""

CHALLENGED = "after a person has authenticated"
DENIED = "Access denied"
"""The error message of busctl."""

Call = tuple[str, ...]
Polkit = tuple[Service, "subprocess.Popen[str]"]


@pytest.fixture
def polkit(scratch: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Polkit]:
    """Run polkit, and a service with the committed snapshot `base`, and `work` from it."""
    tmp_path.chmod(0o755)
    with private_bus([POLICY]) as address, run_polkitd(address, RULES, tmp_path) as process:
        monkeypatch.setenv("DBUS_SYSTEM_BUS_ADDRESS", address)
        with run_daemon(address, scratch / "state") as service:
            with BlockingClient() as client:
                client.prepare("making")
                client.commit("base", "making")
                client.prepare("work", "base")
            yield service, process


@pytest.fixture
def service(polkit: Polkit) -> Service:
    return polkit[0]


@contextmanager
def check_unchanged(service: Service) -> Iterator[None]:
    with BlockingClient() as client:
        before = snapshots_and_directories(client, service), client.list_mounts()
        yield
        assert (snapshots_and_directories(client, service), client.list_mounts()) == before


def expect_refusal(service: Service, call: Call, user: int, ask: bool = False) -> str:
    """Make a call that must fail, with or without interactive authorization; return the error."""
    leave = "yes" if ask else "no"
    done = service.busctl(
        f"--allow-interactive-authorization={leave}",
        *("call", BUS_NAME, OBJECT_PATH, MANAGER, *call),
        user=user,
    )
    assert (done.returncode, done.stdout) == (1, "")
    return done.stderr


def test_polkit_decides_read_manage_and_mount_separately(service: Service) -> None:
    with check_unchanged(service):
        for call in READS:
            assert service.call(*call, user=NOBODY).returncode == 0
        for call in CHANGES:
            assert CHALLENGED in expect_refusal(service, call, NOBODY), call
            # There is no session in which polkit could ask a person.
            assert DENIED in expect_refusal(service, call, NOBODY, ask=True), call
        for call in MOUNTS:
            assert DENIED in expect_refusal(service, call, NOBODY), call
        version = ("get-property", BUS_NAME, OBJECT_PATH, MANAGER, "Version")
        assert service.busctl(*version, user=NOBODY).returncode == 0


def test_polkit_refusals_become_the_errors_of_the_contract(service: Service) -> None:
    error = error_from(*service.dbus_send("Update", "int32:1", user=NOBODY))
    assert isinstance(error, InteractiveAuthorizationRequired)
    assert "allow interactive authorization" in error.message
    error = error_from(*service.dbus_send("Mount", "int32:1", user=NOBODY))
    assert isinstance(error, AccessDenied)
    assert f"uid {NOBODY} may not call Mount (org.snapdnative1.mount)" in error.message


def test_the_default_policy_requires_interactive_authorization(service: Service) -> None:
    """No user of this test has a session."""
    with check_unchanged(service):
        for call in (*READS, *CHANGES, *MOUNTS):
            assert CHALLENGED in expect_refusal(service, call, BIN), call
            assert DENIED in expect_refusal(service, call, BIN, ask=True), call


def test_a_user_that_polkit_allows_may_change_and_mount_snapshots(
    service: Service, places: Path
) -> None:
    here = str(make_target(places))
    for call in (
        ("Prepare", "ssa{sv}", "mine", "base", "0"),
        ("Mount", "ssa{sv}", "mine", here, "0"),
        ("ListMounts", "s", ""),
        ("OpenTree", "sa{sv}", "mine", "0"),
        ("Unmount", "sa{sv}", here, "0"),
        ("Commit", "ssa{sv}", "ours", "mine", "0"),
        ("View", "ssa{sv}", "look", "ours", "0"),
        ("Remove", "sa{sv}", "look", "0"),
        ("Cleanup", "a{sv}", "0"),
    ):
        done = service.call(*call, user=DAEMON)
        assert done.returncode == 0, done.stderr
        if call[0] == "ListMounts":
            assert done.stdout == f'a(ssbsu) 1 "{here}" "mine" false "persistent" {DAEMON}\n'
    with BlockingClient() as client:
        assert [info.name for info in client.list()] == ["base", "ours", "work"]


def test_polkit_rules_get_the_key_and_the_target_of_a_call(service: Service) -> None:
    with check_unchanged(service):
        for call in (
            ("Prepare", "ssa{sv}", "forbidden", "", "0"),
            ("Mount", "ssa{sv}", "work", "/forbidden", "0"),
            ("Stat", "s", "forbidden"),
        ):
            assert DENIED in expect_refusal(service, call, DAEMON), call


@pytest.mark.parametrize(
    "target",
    ["/forbidden/", "//forbidden", "/./forbidden", "/allowed/../forbidden", "/../forbidden"],
)
def test_polkit_rules_get_the_normalized_target(service: Service, target: str) -> None:
    with check_unchanged(service):
        for call in (("Mount", "ssa{sv}", "work", target, "0"), ("Unmount", "sa{sv}", target, "0")):
            assert DENIED in expect_refusal(service, call, DAEMON), call


def test_a_user_may_unmount_its_own_mount_although_polkit_denies(
    service: Service, places: Path
) -> None:
    """The rules deny every Unmount."""
    mine, other = str(make_target(places)), str(make_target(places, "other"))
    with BlockingClient() as client:
        client.mount("work", other)
    assert service.call("Mount", "ssa{sv}", "work", mine, "0", user=DAEMON).returncode == 0
    for user, target in ((NOBODY, mine), (NOBODY, other), (DAEMON, other), (DAEMON, "/none")):
        assert DENIED in expect_refusal(service, ("Unmount", "sa{sv}", target, "0"), user)
    assert service.call("Unmount", "sa{sv}", mine, "0", user=DAEMON).returncode == 0
    assert mounts_below(places) == [other]


def test_a_user_may_cancel_its_own_job_without_the_manage_permission(service: Service) -> None:
    """The rules allow the user to read, as Verify does, but not to manage without a password."""
    with BlockingClient() as client:
        client.prepare("read", "base")
        client.commit("verified", "read", digest=True)
        # After this call the daemon has workers for Verify.
        client.verify("verified")
        with hold_workers(service, IDLE):
            done = service.call("VerifyJob", "sa{sv}", "verified", "0", user=NOBODY)
            job = done.stdout.split('"')[1]
            cancel = ("call", BUS_NAME, job, JOB, "Cancel")
            assert DENIED in service.busctl(*cancel, user=BIN).stderr
            assert client.jobs() != []
            assert service.busctl(*cancel, user=NOBODY).returncode == 0
        assert client.jobs() == []
        gone = service.busctl(*cancel, user=NOBODY)
    assert DENIED in gone.stderr


def test_authorization_is_checked_before_arguments_and_state(service: Service) -> None:
    """A caller without authorisation learns nothing about their arguments or about snapshots."""
    calls: list[Call] = [
        ("Remove", "sa{sv}", "work", "0"),
        ("Remove", "sa{sv}", "none", "0"),
        ("Remove", "sa{sv}", "", "0"),
        ("Remove", "sa{sv}", "work", "1", "no", "s", "such"),
        ("Remove", "i", "1"),
        ("Remove",),
    ]
    (sentence,) = {expect_refusal(service, call, NOBODY) for call in calls}
    assert CHALLENGED in sentence


def test_without_polkit_a_user_other_than_root_is_denied(polkit: Polkit) -> None:
    service, process = polkit
    process.terminate()
    process.wait(HANG_TIMEOUT)
    with check_unchanged(service):
        for call in (*READS, *CHANGES, *MOUNTS):
            assert DENIED in expect_refusal(service, call, DAEMON)


@contextmanager
def hold_calls_at_polkit(
    service: Service, process: subprocess.Popen[str], times: int
) -> Iterator[None]:
    """Stop polkit during the block, and make calls as NOBODY that wait for it."""
    with stop_processes(process.pid), connect_many(service.address, 1, NOBODY) as (denied,):
        denied.call("Stat", "s", "base", times=times)
        # The bus replies after it has delivered the calls before this one.
        denied.ask_driver("GetId")
        denied.replies(1)
        yield


def test_calls_of_root_do_not_wait_for_polkit(polkit: Polkit) -> None:
    service, process = polkit
    with hold_calls_at_polkit(service, process, 3), BlockingClient() as client:
        assert client.stat("base").name == "base"
        client.remove("work")
    assert service.call("Stat", "s", "base", user=NOBODY).returncode == 0


@contextmanager
def with_uid(uid: int) -> Iterator[None]:
    """Run the block with the real and effective uid ``uid``, so that the bus sees it too."""
    os.setresuid(uid, uid, 0)
    try:
        yield
    finally:
        os.setresuid(0, 0, 0)


def test_too_many_pending_polkit_questions_raise_resource_exhausted(polkit: Polkit) -> None:
    _, process = polkit

    async def flood() -> list[BaseException | Body]:
        with with_uid(NOBODY):
            bus = connection()
            await bus.open()
        try:
            asking = [
                asyncio.ensure_future(
                    bus.request(BUS_NAME, OBJECT_PATH, MANAGER, "Stat", "s", ["base"])
                )
                for _ in range(MAX_QUESTIONS + 5)
            ]
            await asyncio.wait(asking, return_when=asyncio.FIRST_EXCEPTION)
            os.kill(process.pid, signal.SIGCONT)
            return await asyncio.gather(*asking, return_exceptions=True)
        finally:
            bus.disconnect()

    with stop_processes(process.pid):
        outcomes = asyncio.run(asyncio.wait_for(flood(), HANG_TIMEOUT))
    refusals = [outcome for outcome in outcomes if isinstance(outcome, BaseException)]
    assert {type(refusal) for refusal in refusals} == {ResourceExhausted}
    assert len(outcomes) - len(refusals) >= MAX_QUESTIONS


@pytest.mark.parametrize("when", ["asked", "asking"])
def test_a_stopping_daemon_does_not_wait_for_polkit(polkit: Polkit, when: str) -> None:
    """Calls that wait for polkit and calls that arrive with SIGTERM are refused."""
    service, process = polkit
    members = ("Stat", "Usage", "Standby")

    async def end() -> list[BaseException | Body]:
        with with_uid(NOBODY):
            bus = connection()
            await bus.open()
        async with connection() as root:
            if when == "asking":
                os.kill(service.pid, signal.SIGSTOP)
                service.daemon.process.terminate()
            asking = [
                asyncio.ensure_future(
                    bus.request(BUS_NAME, OBJECT_PATH, MANAGER, member, "s", ["base"])
                )
                for member in members
            ]
            # The bus replies after it has delivered the calls before this one.
            await bus.ask_driver("GetId", "", [])
            if when == "asking":
                os.kill(service.pid, signal.SIGCONT)
            else:
                await root.request(BUS_NAME, OBJECT_PATH, MANAGER, "Stat", "s", ["base"])
                service.daemon.process.terminate()
            outcomes = await asyncio.gather(*asking, return_exceptions=True)
        bus.disconnect()
        return outcomes

    with stop_processes(process.pid):
        outcomes = asyncio.run(asyncio.wait_for(end(), HANG_TIMEOUT))
        assert service.daemon.stop() == 0
    assert {type(outcome) for outcome in outcomes} == {Unavailable}
    assert {str(outcome) for outcome in outcomes} == {
        f"{member} cannot be called: the service is stopping" for member in members
    }


def test_a_polkit_question_ends_when_its_caller_leaves_the_bus(polkit: Polkit) -> None:
    service, process = polkit
    for _ in range(3):
        with hold_calls_at_polkit(service, process, MAX_QUESTIONS):
            pass
    wait_until(lambda: service.call("Stat", "s", "base", user=NOBODY).returncode == 0)
