"""Who may call what."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from enum import StrEnum
from typing import Any, Protocol

from snapd_native.errors import AccessDenied, SnapdError
from snapd_native.wire.values import Body


class Action(StrEnum):
    """What a caller must be allowed to do; the value is the polkit action's name."""

    READ = "org.snapdnative1.read"
    MANAGE = "org.snapdnative1.manage"
    MOUNT = "org.snapdnative1.mount"


class Driver(Protocol):
    """The part of a connection that asks the bus itself."""

    def ask_driver(self, member: str, signature: str, body: Body) -> Coroutine[Any, Any, Body]:
        """Call a method of the bus."""


class Authority:
    """Judges callers: uid 0 may do everything, nobody else anything."""

    def __init__(self, bus: Driver) -> None:
        self._bus = bus
        self._uids: dict[str, asyncio.Future[Body]] = {}

    async def check(self, sender: str, action: Action, member: str) -> int:
        """Return the uid of the connection ``sender``, which may do ``action`` by ``member``.

        Raises:
            AccessDenied: it may not, or is gone.
        """
        uid = await self.uid(sender)
        if uid != 0:
            raise AccessDenied(f"uid {uid} may not call {member} ({action.value}): call it as root")
        return uid

    def knows(self, sender: str) -> bool:
        """Tell whether a connection that was checked is still there."""
        return sender in self._uids

    def forget(self, sender: str) -> None:
        """Drop what is known of a connection that has left the bus."""
        self._uids.pop(sender, None)

    async def uid(self, sender: str) -> int:
        """Return the uid of the connection ``sender``.

        Raises:
            AccessDenied: it is gone.
        """
        # What is kept is the question: one that is asked at once again waits for the same answer,
        # and a connection that leaves meanwhile is forgotten all the same.
        asked = self._uids.get(sender)
        if asked is None:
            question = self._bus.ask_driver("GetConnectionUnixUser", "s", [sender])
            asked = self._uids[sender] = asyncio.ensure_future(question)
        try:
            (uid,) = await asyncio.shield(asked)
        except SnapdError:
            self.forget(sender)
            raise AccessDenied("the caller cannot be identified: call again") from None
        return int(uid)
