"""Authorization with the real bus and the real polkit of a machine."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from snapd_native.wire.names import MANAGER
from tests.vm.guest import Guest

RULE = """
polkit.addRule(function (action, subject) {
    if (action.id == "org.snapdnative1.manage" && subject.user == "vagrant")
        return polkit.Result.YES;
});
"""
RULE_FILE = "/etc/polkit-1/rules.d/50-snapd-native-test.rules"
PREPARE = f"busctl call org.snapdnative1 /org/snapdnative1 {MANAGER} Prepare 'ssa{{sv}}'"
AS_USER = "runuser -u vagrant --"


@pytest.fixture
def ruled(guest: Guest) -> Iterator[Guest]:
    """Yield a machine with a polkit rule that lets one user manage snapshots."""
    guest.run(f"cat >{RULE_FILE}; systemctl restart polkit", stdin=RULE)
    yield guest
    guest.run(f"rm -f {RULE_FILE}; systemctl restart polkit")


ATTEMPT = """
from snapd_native.client import BlockingClient
from snapd_native.errors import SnapdError
try:
    with BlockingClient() as client:
        client.prepare("theirs")
        client.remove("theirs")
except SnapdError as error:
    print(f"{type(error).__name__}: {error}")
else:
    print("allowed")
"""


def attempt(guest: Guest, user: str = "vagrant") -> str:
    """Prepare a snapshot as a user; return ``allowed`` or the error."""
    return guest.run(f"runuser -u {user} -- python3 -", stdin=ATTEMPT)


def denied(guest: Guest, user: str = "vagrant") -> bool:
    told = attempt(guest, user)
    return told.startswith(("AccessDenied: ", "InteractiveAuthorizationRequired: "))


def test_a_denied_user_gets_an_error_that_names_the_polkit_action(guest: Guest) -> None:
    outcome = guest.attempt(f"{AS_USER} {PREPARE} theirs '' 0")
    assert outcome.returncode == 1
    # busctl prints its own text for the error.
    assert "Access denied" in outcome.stderr
    assert denied(guest)
    assert "org.snapdnative1.manage" in attempt(guest)
    guest.run(f"{PREPARE} mine '' 0")


def test_a_polkit_rule_allows_a_user_until_it_is_removed(ruled: Guest) -> None:
    assert attempt(ruled) == "allowed\n"
    assert denied(ruled, user="nobody")
    ruled.run(f"rm {RULE_FILE}; systemctl restart polkit")
    assert denied(ruled)


def test_without_polkit_users_are_denied_and_root_is_not(guest: Guest) -> None:
    guest.run("systemctl mask --runtime --now polkit")
    try:
        assert denied(guest)
        guest.run(f"{PREPARE} mine '' 0")
    finally:
        guest.run("systemctl unmask --runtime polkit; systemctl start polkit")
