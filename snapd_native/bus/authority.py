"""Decide whether a caller may call a method."""

from __future__ import annotations

import asyncio
from collections import Counter, defaultdict
from collections.abc import Coroutine, Mapping
from enum import StrEnum
from typing import Any, Protocol

from snapd_native.bus.incoming import Call
from snapd_native.bus.polkit import Bus, Polkit, Verdict
from snapd_native.errors import (
    AccessDenied,
    InteractiveAuthorizationRequired,
    ResourceExhausted,
    SnapdError,
    Unavailable,
)
from snapd_native.tasks import undisturbed
from snapd_native.wire.values import Body

MAX_QUESTIONS = 16
"""Open questions to polkit about one uid at most; a person can take long to answer."""


MAX_UNKNOWN = 256
"""Calls of one connection at most that wait until the bus has told its uid."""


class Action(StrEnum):
    """What a caller needs permission for; the value is the name of the polkit action."""

    READ = "org.snapdnative1.read"
    MANAGE = "org.snapdnative1.manage"
    MOUNT = "org.snapdnative1.mount"


class Driver(Bus, Protocol):
    """The part of a connection that calls the bus itself and other services."""

    def ask_driver(self, member: str, signature: str, body: Body) -> Coroutine[Any, Any, Body]:
        """Call a method of the bus."""


class Authority:
    """Authorises callers: uid 0 may do everything, others what polkit permits."""

    def __init__(self, bus: Driver) -> None:
        self._bus = bus
        self._polkit = Polkit(bus)
        self._uids: dict[str, asyncio.Future[Body]] = {}
        self._unknown: Counter[str] = Counter()
        self._questions: defaultdict[str, set[asyncio.Task[Verdict]]] = defaultdict(set)
        self._open: Counter[int] = Counter()
        self._closed = False

    async def check(
        self, call: Call, action: Action, details: Mapping[str, str] | None = None
    ) -> int:
        """Return the uid of the caller of ``call``, if they may do ``action``.

        polkit shows ``details`` to the person whom it asks.

        Raises:
            AccessDenied: they may not, or have left the bus.
            InteractiveAuthorizationRequired: a person would have to agree, but the call does not
                permit to ask one.
            ResourceExhausted: too many questions about that uid are open.
            Unavailable: the service is stopping.
        """
        uid = await self.uid(call.sender)
        verdict = Verdict.ALLOWED if uid == 0 else await self._ask(uid, call, action, details or {})
        if verdict is Verdict.ALLOWED:
            return uid
        if verdict is Verdict.CHALLENGE and not call.may_ask:
            raise InteractiveAuthorizationRequired(
                f"uid {uid} may call {call.member} ({action.value}) after a person has"
                " authenticated: allow interactive authorization, or call it as root"
            )
        raise AccessDenied(
            f"uid {uid} may not call {call.member} ({action.value}): call it as root,"
            " or have polkit allow it"
        )

    def knows(self, sender: str) -> bool:
        """Tell whether a connection with a known uid is still on the bus."""
        asked = self._uids.get(sender)
        # After a connection has left, a late call of it makes the service ask the bus again. That
        # question is open or has failed, because the bus does not reuse unique names.
        return asked is not None and asked.done() and asked.exception() is None

    def forget(self, sender: str) -> None:
        """Forget a connection that has left the bus, and cancel the questions about it."""
        self._uids.pop(sender, None)
        for question in self._questions.pop(sender, ()):
            question.cancel()

    def close(self) -> None:
        """Cancel the open questions to polkit, and ask no new ones."""
        self._closed = True
        for sender in list(self._questions):
            self.forget(sender)

    async def uid(self, sender: str) -> int:
        """Return the uid of the connection ``sender``.

        Raises:
            AccessDenied: it has left the bus.
            ResourceExhausted: too many of its calls wait for this.
        """
        # The pending question is kept, not only its answer: a second call waits for the same
        # answer, and a connection that leaves before the answer is forgotten too.
        asked = self._uids.get(sender)
        if asked is None:
            question = self._bus.ask_driver("GetConnectionUnixUser", "s", [sender])
            asked = self._uids[sender] = asyncio.ensure_future(question)
        if not asked.done() and self._unknown[sender] >= MAX_UNKNOWN:
            raise ResourceExhausted(
                f"{MAX_UNKNOWN} calls wait until their caller is known: let some end first"
            )
        self._unknown[sender] += 1
        try:
            (uid,) = await undisturbed(asked)
        except SnapdError:
            self.forget(sender)
            raise AccessDenied("the caller cannot be identified: call again") from None
        finally:
            self._unknown[sender] -= 1
            if not self._unknown[sender]:
                del self._unknown[sender]
        return int(uid)

    async def _ask(
        self, uid: int, call: Call, action: Action, details: Mapping[str, str]
    ) -> Verdict:
        if self._open[uid] >= MAX_QUESTIONS:
            raise ResourceExhausted(
                f"{MAX_QUESTIONS} calls of uid {uid} wait for an authorization: let some end first"
            )
        stopping = Unavailable(f"{call.member} cannot be called: the service is stopping")
        if self._closed:
            raise stopping
        judging = self._polkit.judge(call.sender, action.value, details, call.may_ask)
        question = asyncio.get_running_loop().create_task(judging)
        self._open[uid] += 1
        self._questions[call.sender].add(question)
        await asyncio.wait({question})
        self._open[uid] -= 1
        questions = self._questions.get(call.sender, set())
        questions.discard(question)
        if not questions:
            self._questions.pop(call.sender, None)
        if question.cancelled():
            raise stopping
        return question.result()
