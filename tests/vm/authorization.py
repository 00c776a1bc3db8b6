"""Calls of users whom polkit allows or denies them."""

from __future__ import annotations

from tests.vm.guest import Guest

RULE = """
polkit.addRule(function (action, subject) {
    if (action.id == "org.snapdnative1.manage" && subject.user == "vagrant")
        return polkit.Result.YES;
});
"""
RULE_FILE = "/etc/polkit-1/rules.d/50-snapd-native-test.rules"

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
