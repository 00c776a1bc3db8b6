"""Ask polkit; see its interface org.freedesktop.PolicyKit1.Authority."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine, Mapping
from enum import Enum
from itertools import count
from typing import Any, Protocol

from dbus_next.signature import Variant

from snapd_native.errors import SnapdError
from snapd_native.wire.values import Body

NAME = "org.freedesktop.PolicyKit1"
_PATH = "/org/freedesktop/PolicyKit1/Authority"
_INTERFACE = "org.freedesktop.PolicyKit1.Authority"
_ALLOW_USER_INTERACTION = 1


class Verdict(Enum):
    """The decision of polkit."""

    ALLOWED = "allowed"
    DENIED = "denied"
    CHALLENGE = "challenge"
    """It would be allowed after a person has authenticated."""


class Bus(Protocol):
    """The part of a connection that calls another service."""

    def request(
        self,
        destination: str,
        path: str,
        interface: str,
        member: str,
        signature: str = "",
        body: Body | None = None,
    ) -> Coroutine[Any, Any, Body]:
        """Call a method, and return the result."""

    def tell(
        self,
        destination: str,
        path: str,
        interface: str,
        member: str,
        signature: str,
        body: Body,
    ) -> None:
        """Call a method without waiting for the reply."""


class Polkit:
    """Asks polkit."""

    def __init__(self, bus: Bus) -> None:
        self._bus = bus
        self._questions = count(1)

    async def judge(
        self, sender: str, action: str, details: Mapping[str, str], may_ask: bool
    ) -> Verdict:
        """Tell whether the connection ``sender`` may do ``action``.

        With ``may_ask`` polkit can ask a person, and this waits for the answer; a cancellation ends
        the question. Without polkit, or without an answer, the action is denied.
        """
        subject = ["system-bus-name", {"name": Variant("s", sender)}]
        flags = _ALLOW_USER_INTERACTION if may_ask else 0
        question = f"snapd-native-{next(self._questions)}"
        body = [subject, action, dict(details), flags, question]
        try:
            answer = await self._bus.request(
                NAME, _PATH, _INTERFACE, "CheckAuthorization", "(sa{sv})sa{ss}us", body
            )
        except asyncio.CancelledError:
            # The reply is not awaited: polkit may not answer.
            self._bus.tell(NAME, _PATH, _INTERFACE, "CancelCheckAuthorization", "s", [question])
            raise
        except SnapdError:
            return Verdict.DENIED
        ((allowed, challenge, _),) = answer
        if allowed:
            return Verdict.ALLOWED
        return Verdict.CHALLENGE if challenge else Verdict.DENIED
