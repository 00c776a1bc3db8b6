"""Calls of a user, which polkit allows or denies."""

from __future__ import annotations

from tests.vm.guest import Guest

POLKIT_RULE = """
polkit.addRule(function (action, subject) {
    if (action.id == "org.snapdnative1.manage" && subject.user == "vagrant")
        return polkit.Result.YES;
});
"""
RULE_FILE = "/etc/polkit-1/rules.d/50-snapd-native-test.rules"

PREPARE_PROGRAM = """
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


def try_to_prepare(guest: Guest, user: str = "vagrant") -> str:
    """Prepare a snapshot as a user; return ``allowed`` or the error."""
    return guest.run(f"runuser -u {user} -- python3 -", stdin=PREPARE_PROGRAM)


def is_denied(guest: Guest, user: str = "vagrant") -> bool:
    outcome = try_to_prepare(guest, user)
    return outcome.startswith(("AccessDenied: ", "InteractiveAuthorizationRequired: "))
