"""Authorization with the real bus and the real polkit of a machine."""

from __future__ import annotations

from snapd_native.wire.names import MANAGER
from tests.vm.authorization import RULE_FILE, is_denied, try_to_prepare
from tests.vm.guest import Guest

PREPARE = f"busctl call org.snapdnative1 /org/snapdnative1 {MANAGER} Prepare 'ssa{{sv}}'"
AS_USER = "runuser -u vagrant --"


def test_a_denied_user_gets_an_error_that_names_the_polkit_action(guest: Guest) -> None:
    outcome = guest.attempt(f"{AS_USER} {PREPARE} theirs '' 0")
    assert outcome.returncode == 1
    # busctl prints its own text for the error.
    assert "Access denied" in outcome.stderr
    assert is_denied(guest)
    assert "org.snapdnative1.manage" in try_to_prepare(guest)
    guest.run(f"{PREPARE} mine '' 0")


def test_a_polkit_rule_allows_a_user_until_it_is_removed(guest_with_rule: Guest) -> None:
    assert try_to_prepare(guest_with_rule) == "allowed\n"
    assert is_denied(guest_with_rule, user="nobody")
    guest_with_rule.run(f"rm {RULE_FILE}; systemctl restart polkit")
    assert is_denied(guest_with_rule)


def test_without_polkit_users_are_denied_and_root_is_not(guest: Guest) -> None:
    guest.run("systemctl mask --runtime --now polkit")
    try:
        assert is_denied(guest)
        guest.run(f"{PREPARE} mine '' 0")
    finally:
        guest.run("systemctl unmask --runtime polkit; systemctl start polkit")
