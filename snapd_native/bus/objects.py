"""The objects of the service, and the standard interfaces of each."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from pathlib import Path

from dbus_next.errors import DBusError
from dbus_next.signature import Variant

from snapd_native.bus.incoming import Call
from snapd_native.bus.introspection import describe
from snapd_native.bus.jobs import Jobs
from snapd_native.bus.manager import Manager
from snapd_native.bus.replies import ERROR, check_signature
from snapd_native.model import quote
from snapd_native.wire.names import (
    INTROSPECTABLE,
    JOB,
    MANAGER,
    OBJECT_PATH,
    PEER,
    PROPERTIES,
)
from snapd_native.wire.values import Body

JOB_METHODS = {"Cancel": ""}
"""The methods of a job, and the types of their arguments."""

_PEER = {"Ping": "", "GetMachineId": ""}
_INTROSPECTABLE = {"Introspect": ""}
_PROPERTIES = {"Get": "ss", "GetAll": "s", "Set": "ssv"}


class Objects:
    """The object of the manager, the objects of jobs, and the paths that lead to them."""

    def __init__(self, manager: Manager, jobs: Jobs) -> None:
        self._manager = manager
        self._jobs = jobs

    def interface(self, call: Call) -> str:
        """Return the interface of a call; if the call names none, the member determines it.

        Raises:
            DBusError: there is no such object, interface or member.
        """
        if call.interface == PEER:
            return PEER
        interfaces: dict[str, Collection[str]] = {PEER: _PEER, INTROSPECTABLE: _INTROSPECTABLE}
        if call.path == OBJECT_PATH:
            interfaces |= {PROPERTIES: _PROPERTIES, MANAGER: self._manager.methods}
        elif self._jobs.may_be_at(call.path):
            interfaces |= {PROPERTIES: _PROPERTIES, JOB: JOB_METHODS}
        elif describe(call.path, self._jobs.ids()) is None:
            raise DBusError(
                f"{ERROR}UnknownObject", f"there is no object {quote(call.path)}: use {OBJECT_PATH}"
            )
        if not call.interface:
            for name, members in interfaces.items():
                if call.member in members:
                    return name
            raise DBusError(
                f"{ERROR}UnknownMethod",
                f"{quote(call.path)} has no method {call.member}: introspect it",
            )
        if call.interface not in interfaces:
            raise DBusError(
                f"{ERROR}UnknownInterface",
                f"{quote(call.path)} has no interface {call.interface}: introspect it",
            )
        return call.interface

    def standard(self, call: Call) -> tuple[str, Body]:
        """Run a method of Peer or Introspectable; return the signature and the body.

        Raises:
            DBusError: there is no such method, or no machine-id.
            NotFound: there is no such job.
        """
        check_signature(call, _PEER if call.member in _PEER else _INTROSPECTABLE)
        if call.member == "Ping":
            return "", []
        if call.member == "GetMachineId":
            return "s", [_machine_id()]
        if self._jobs.may_be_at(call.path):
            self._jobs.get(call.path)
        return "s", [describe(call.path, self._jobs.ids())]

    def property(self, call: Call) -> tuple[str, Body]:
        """Run a method of Properties; return the signature and the body.

        Raises:
            DBusError: there is no such interface or property, or it cannot be set.
            NotFound: there is no such job.
        """
        check_signature(call, _PROPERTIES)
        asked, *rest = call.arguments()
        own, properties = MANAGER, self._manager.properties
        if self._jobs.may_be_at(call.path):
            own, properties = JOB, self._jobs.get(call.path).properties()
        if asked not in (own, PEER, INTROSPECTABLE, PROPERTIES, ""):
            raise DBusError(
                f"{ERROR}UnknownInterface", f"{quote(call.path)} has no interface {quote(asked)}"
            )
        values: Mapping[str, Variant] = properties if asked in (own, "") else {}
        if call.member == "GetAll":
            return "a{sv}", [values]
        name = rest[0]
        if name not in values:
            raise DBusError(
                f"{ERROR}UnknownProperty", f"{asked or own} has no property {quote(name)}"
            )
        if call.member == "Set":
            raise DBusError(f"{ERROR}PropertyReadOnly", f"{name} cannot be set")
        return "v", [values[name]]


def _machine_id() -> str:
    for path in (Path("/etc/machine-id"), Path("/var/lib/dbus/machine-id")):
        try:
            return path.read_text("ascii").strip()
        except OSError:
            continue
    raise DBusError(f"{ERROR}Failed", "this machine has no machine-id: run dbus-uuidgen --ensure")
