"""Who may call what."""

from __future__ import annotations

from enum import StrEnum
from typing import Protocol

from snapd_native.errors import AccessDenied, SnapdError
from snapd_native.wire.values import Body


class Action(StrEnum):
    """What a caller must be allowed to do; the value is the polkit action's name."""

    READ = "org.snapdnative1.read"
    MANAGE = "org.snapdnative1.manage"
    MOUNT = "org.snapdnative1.mount"


class Driver(Protocol):
    """The part of a connection that asks the bus itself."""

    async def ask_driver(self, member: str, signature: str, body: Body) -> Body:
        """Call a method of the bus."""


class Authority:
    """Judges callers: uid 0 may do everything, nobody else anything."""

    def __init__(self, bus: Driver) -> None:
        self._bus = bus
        self._uids: dict[str, int] = {}

    async def check(self, sender: str, action: Action, member: str) -> None:
        """Return if the connection ``sender`` may do ``action`` by calling ``member``.

        Raises:
            AccessDenied: it may not, or is gone.
        """
        uid = await self._uid(sender)
        if uid != 0:
            raise AccessDenied(f"uid {uid} may not call {member} ({action.value}): call it as root")

    def forget(self, sender: str) -> None:
        """Drop what is known of a connection that has left the bus."""
        self._uids.pop(sender, None)

    async def _uid(self, sender: str) -> int:
        known = self._uids.get(sender)
        if known is not None:
            return known
        try:
            (uid,) = await self._bus.ask_driver("GetConnectionUnixUser", "s", [sender])
        except SnapdError:
            raise AccessDenied("the caller cannot be identified: call again") from None
        self._uids[sender] = uid
        return int(uid)
