"""From a message to an answer: find the method, judge the caller, check, run, reply.

The order is the contract's: authorisation, arguments, state. Whatever happens, a caller that
waits gets exactly one answer, and never more of an exception than its one sentence.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Collection
from pathlib import Path

from dbus_next.constants import MessageType
from dbus_next.errors import DBusError
from dbus_next.message import Message

from snapd_native.bus.authority import Action, Authority
from snapd_native.bus.connection import ServiceConnection
from snapd_native.bus.incoming import Call
from snapd_native.bus.introspection import contract, document, shapes
from snapd_native.bus.lanes import Lanes
from snapd_native.bus.manager import Manager, Method, signal
from snapd_native.errors import Internal, InvalidArgument, SnapdError, Unavailable
from snapd_native.model import Change, shown
from snapd_native.wire.names import (
    DRIVER,
    INTROSPECTABLE,
    MANAGER,
    OBJECT_PATH,
    PEER,
    PROPERTIES,
    error_name,
)
from snapd_native.wire.values import Body

log = logging.getLogger(__name__)

_ERROR = "org.freedesktop.DBus.Error."


class Dispatcher:
    """Answers every method call that reaches the connection."""

    def __init__(self, manager: Manager, lanes: Lanes) -> None:
        self._manager = manager
        self._lanes = lanes
        self._shape = shapes(contract())[MANAGER]
        self._running: set[asyncio.Task[None]] = set()
        self._stopping = False
        self.connection = ServiceConnection(self._on_call)
        self._authority = Authority(self.connection)
        self.connection.add_message_handler(self._on_message)

    async def start(self) -> None:
        """Connect to the bus, and watch it for callers that leave.

        Raises:
            Unavailable: there is no bus.
        """
        await self.connection.open()
        rule = f"type='signal',sender='{DRIVER}',interface='{DRIVER}',member='NameOwnerChanged'"
        await self.connection.ask_driver("AddMatch", "s", [rule + ",arg2=''"])

    def emit(self, change: Change) -> None:
        """Send the signal that tells of ``change``."""
        member, body = signal(change)
        signature = self._shape.signals[member]
        message = Message.new_signal(OBJECT_PATH, MANAGER, member, signature, body)
        self._send(message)

    def refuse(self) -> None:
        """From now on, answer every call with Unavailable."""
        self._stopping = True

    async def finish(self, seconds: float | None) -> bool:
        """Wait until all calls are answered, or ``seconds`` are over; tell whether they are."""
        if self._running:
            await asyncio.wait(self._running, timeout=seconds)
        return not self._running

    def _on_message(self, message: Message) -> None:
        if message.message_type is MessageType.SIGNAL and message.member == "NameOwnerChanged":
            self._authority.forget(message.body[0])

    def _on_call(self, call: Call) -> None:
        task = asyncio.get_running_loop().create_task(self._answer(call))
        self._running.add(task)
        task.add_done_callback(self._running.discard)

    async def _answer(self, call: Call) -> None:
        serial = self.connection.next_serial()
        try:
            answer = await self._handle(call, serial)
        except Exception as error:
            answer = _marshalled(_error(call, error), serial)
        if call.wants_reply:
            self.connection.send_marshalled(answer)

    async def _handle(self, call: Call, serial: int) -> bytes:
        """Return the marshalled reply to ``call``."""
        interface = self._interface(call)
        if interface in (PEER, INTROSPECTABLE):
            signature, body = _standard(call, interface)
            return _marshalled(_reply(call, signature, body), serial)
        if interface == PROPERTIES:
            await self._authority.check(call.sender, Action.READ, call.member)
            signature, body = self._property(call)
            return _marshalled(_reply(call, signature, body), serial)
        method = self._manager.methods.get(call.member)
        if method is None:
            raise DBusError(
                f"{_ERROR}UnknownMethod",
                f"{MANAGER} has no method {call.member}: introspect it to see which there are",
            )
        await self._authority.check(call.sender, method.action, call.member)
        if self._stopping:
            raise Unavailable(f"{call.member} cannot be called: the service is stopping")
        types = self._shape.methods[call.member]
        return await self._lanes.run(method.lane, lambda: _run(call, method, types, serial))

    def _interface(self, call: Call) -> str:
        """Return the interface that is called; a call need not name it, the member tells then."""
        if call.interface == PEER:
            return PEER
        if document(call.path) is None:
            raise DBusError(
                f"{_ERROR}UnknownObject", f"there is no object {call.path}: use {OBJECT_PATH}"
            )
        interfaces: dict[str, Collection[str]] = {PEER: _PEER, INTROSPECTABLE: _INTROSPECTABLE}
        if call.path == OBJECT_PATH:
            interfaces |= {PROPERTIES: _PROPERTIES, MANAGER: self._manager.methods}
        if not call.interface:
            for name, members in interfaces.items():
                if call.member in members:
                    return name
            raise DBusError(
                f"{_ERROR}UnknownMethod", f"{call.path} has no method {call.member}: introspect it"
            )
        if call.interface not in interfaces:
            raise DBusError(
                f"{_ERROR}UnknownInterface",
                f"{call.path} has no interface {call.interface}: introspect it",
            )
        return call.interface

    def _property(self, call: Call) -> tuple[str, Body]:
        _check_signature(call, _PROPERTIES)
        interface, *rest = call.arguments()
        if interface not in (MANAGER, PEER, INTROSPECTABLE, PROPERTIES, ""):
            raise DBusError(
                f"{_ERROR}UnknownInterface", f"{OBJECT_PATH} has no interface {interface}"
            )
        values = self._manager.properties if interface in (MANAGER, "") else {}
        if call.member == "GetAll":
            return "a{sv}", [values]
        name = rest[0]
        if name not in values:
            raise DBusError(
                f"{_ERROR}UnknownProperty", f"{interface or MANAGER} has no property {name}"
            )
        if call.member == "Set":
            raise DBusError(f"{_ERROR}PropertyReadOnly", f"{name} cannot be set")
        return "v", [values[name]]

    def _send(self, message: Message) -> None:
        self.connection.send_marshalled(_marshalled(message, self.connection.next_serial()))


_PEER = {"Ping": "", "GetMachineId": ""}
_INTROSPECTABLE = {"Introspect": ""}
_PROPERTIES = {"Get": "ss", "GetAll": "s", "Set": "ssv"}


def _run(call: Call, method: Method, types: tuple[str, str], serial: int) -> bytes:
    """Do what a method does, in a worker thread, from the call's bytes to the answer's."""
    takes, returns = types
    try:
        _check_signature(call, {call.member: takes})
        message = _reply(call, returns, method.run(*call.arguments()))
    except Exception as error:
        message = _error(call, error)
    return _marshalled(message, serial)


def _standard(call: Call, interface: str) -> tuple[str, Body]:
    _check_signature(call, _PEER if interface == PEER else _INTROSPECTABLE)
    if call.member == "Ping":
        return "", []
    if call.member == "GetMachineId":
        return "s", [_machine_id()]
    return "s", [document(call.path)]


def _machine_id() -> str:
    for path in (Path("/etc/machine-id"), Path("/var/lib/dbus/machine-id")):
        try:
            return path.read_text("ascii").strip()
        except OSError:
            continue
    raise DBusError(f"{_ERROR}Failed", "this machine has no machine-id: run dbus-uuidgen --ensure")


def _check_signature(call: Call, members: dict[str, str]) -> None:
    takes = members.get(call.member)
    if takes is None:
        raise DBusError(
            f"{_ERROR}UnknownMethod", f"{call.interface} has no method {call.member}: introspect it"
        )
    if call.signature != takes:
        raise InvalidArgument(
            f"{call.member} takes ({takes}) but was called with ({call.signature}):"
            " mend the argument types"
        )


def _reply(call: Call, signature: str, body: Body) -> Message:
    return Message(
        message_type=MessageType.METHOD_RETURN,
        destination=call.sender,
        reply_serial=call.serial,
        signature=signature,
        body=body,
    )


def _error(call: Call, error: Exception) -> Message:
    if isinstance(error, SnapdError):
        name, text = error_name(error), error.message
    elif isinstance(error, DBusError):
        name, text = error.type, error.text
    else:
        log.error("%s failed: %s", call.member, error, exc_info=error)
        name = error_name(Internal())
        text = f"{call.member} failed because of a bug: see the service's log"
    return Message(
        message_type=MessageType.ERROR,
        destination=call.sender,
        reply_serial=call.serial,
        error_name=name,
        signature="s",
        # Text that no message may carry would have the bus hang up on the service.
        body=[shown(text)],
    )


def _marshalled(message: Message, serial: int) -> bytes:
    message.serial = serial
    return bytes(message._marshall())
