"""Answer method calls: find the method, authorise the caller, check, run, reply.

The order is the contract's: authorisation, arguments, state. A caller that waits gets exactly one
reply, whatever happens, and of an exception only its message.
"""

from __future__ import annotations

import asyncio
import logging
from functools import partial
from traceback import clear_frames
from typing import Any

from dbus_next.constants import MessageType
from dbus_next.errors import DBusError
from dbus_next.message import Message

from snapd_native.bus.authority import Action, Authority
from snapd_native.bus.connection import ServiceConnection, close
from snapd_native.bus.incoming import MAX_TEXT, Call
from snapd_native.bus.introspection import contract, interfaces
from snapd_native.bus.jobs import Jobs
from snapd_native.bus.lanes import Lane, Lanes
from snapd_native.bus.log import logged
from snapd_native.bus.manager import Caller, Context, Manager, Method, signal
from snapd_native.bus.objects import JOB_METHODS, Objects
from snapd_native.bus.outbox import Account, Outbox
from snapd_native.bus.replies import ERROR, Answer, check_signature, failure, marshalled, result
from snapd_native.errors import Cancelled, Unavailable
from snapd_native.jobs import Job
from snapd_native.model import Change
from snapd_native.mounts import plain
from snapd_native.snapshotter import Snapshotter
from snapd_native.wire import names
from snapd_native.wire.names import DRIVER, MANAGER, OBJECT_PATH
from snapd_native.wire.values import Body

log = logging.getLogger(__name__)

JOB_AFTER = 0.5
"""Seconds after which a call that copies, measures or waits shows as a job."""


class Dispatcher:
    """Answers every method call that reaches the connection."""

    def __init__(self, snapshotter: Snapshotter, lanes: Lanes) -> None:
        self._lanes = lanes
        self._mounter = snapshotter.mounter
        self._bus = ""
        self._jobs = Jobs(self._emit)
        self._manager = Manager(snapshotter, self._jobs)
        self._objects = Objects(self._manager, self._jobs)
        self._contract = interfaces(contract())[MANAGER]
        self._running: set[asyncio.Task[None] | asyncio.Task[Body]] = set()
        self._stopping = False
        self.connection = ServiceConnection(self._on_call)
        self._authority = Authority(self.connection)
        self._outbox = Outbox(self.connection)
        self.connection.add_message_handler(self._on_message)

    async def start(self) -> None:
        """Connect to the bus, and watch for callers that leave.

        Raises:
            Unavailable: there is no bus.
        """
        await self.connection.open()
        rule = f"type='signal',sender='{DRIVER}',interface='{DRIVER}',member='NameOwnerChanged'"
        await self.connection.ask_driver("AddMatch", "s", [rule + ",arg2=''"])
        (self._bus,) = await self.connection.ask_driver("GetId", "", [])
        for owner in self._mounter.owners():
            bus, _, sender = owner.partition(" ")
            if bus != self._bus or not await self._is_connected(sender):
                self._mounter.release(owner)

    async def _is_connected(self, sender: str) -> bool:
        (is_connected,) = await self.connection.ask_driver("NameHasOwner", "s", [sender])
        return bool(is_connected)

    def announce(self, change: Change) -> None:
        """Send the signal of a change."""
        self._emit(OBJECT_PATH, MANAGER, *signal(change))

    def refuse(self) -> None:
        """From now on, refuse every call with Unavailable, and cancel questions to persons."""
        self._stopping = True
        self._authority.close()
        self._outbox.close()
        self.connection.leave()

    async def finish(self, seconds: float | None) -> bool:
        """Wait at most ``seconds`` until all calls are answered; return whether they are."""
        if self._running:
            await asyncio.wait(self._running, timeout=seconds)
        return not self._running

    def _on_message(self, message: Message) -> None:
        if message.message_type is MessageType.SIGNAL and message.member == "NameOwnerChanged":
            sender = message.body[0]
            self._authority.forget(sender)
            self._outbox.forget(sender)
            if (owner := self._owner(sender)) in self._mounter.owners():
                self._mounter.release(owner)

    def _on_call(self, call: Call) -> None:
        client = self._outbox.account(call)
        self._track(asyncio.get_running_loop().create_task(self._answer(call, client)))

    def _track(self, task: asyncio.Task[None] | asyncio.Task[Body]) -> None:
        self._running.add(task)
        task.add_done_callback(self._running.discard)

    async def _answer(self, call: Call, client: Account) -> None:
        serial = self.connection.next_serial()
        await self._outbox.turn(client)
        try:
            answer = await self._handle(call, client, serial)
        except Exception as error:
            answer = failure(call, error, serial)
            # Frames whose variables refer to the error keep the call, which can be large, until the
            # garbage collector runs.
            clear_frames(error.__traceback__)
        if call.wants_reply:
            self._outbox.reply(client, answer)
        else:
            close(answer.fds)

    async def _handle(self, call: Call, client: Account, serial: int) -> Answer:
        """Return the marshalled reply to ``call``."""
        match self._objects.interface(call):
            case names.PEER | names.INTROSPECTABLE:
                return result(call, *self._objects.standard(call), serial)
            case names.PROPERTIES:
                await self._authority.check(call, Action.READ)
                return result(call, *self._objects.property(call), serial)
            case names.JOB:
                uid = await self._canceller(call)
                with logged(call, uid, {"job": call.path}, changes=True):
                    check_signature(call, JOB_METHODS)
                    await self._jobs.get(call.path).cancel()
                return result(call, "", [], serial)
        return await self._manage(call, client, serial)

    async def _manage(self, call: Call, client: Account, serial: int) -> Answer:
        """Call a method of the manager."""
        method = self._manager.methods.get(call.member)
        if method is None:
            raise DBusError(
                f"{ERROR}UnknownMethod",
                f"{MANAGER} has no method {call.member}: introspect it to see which there are",
            )
        caller = await self._authorised(call, method)
        async with self._outbox.room(client, method.room) as reserved:
            if self._stopping:
                raise Unavailable(f"{call.member} cannot be called: the service is stopping")
            run = self._work if method.lane.may_take_long else self._run
            answer = await run(call, method, caller, serial)
            if answer.fds or not method.changes:
                # Nothing has changed: the caller can call again.
                await self._outbox.check(client, answer, reserved)
            return answer

    async def _run(self, call: Call, method: Method, caller: Caller, serial: int) -> Answer:
        """Run a method that ends soon."""
        returns = self._returns(call)

        def run() -> Answer:
            # Pages of List are large, and descriptors scarce.
            if method.lane is Lane.LIST or returns == "h":
                self.connection.bus_reads.wait()
            if method.lane is Lane.LIST and not caller.is_connected():
                raise Cancelled("the caller has left the bus: nothing is read")
            body = self._perform(call, method, Context(caller, Job()))
            return result(call, returns, body, serial)

        try:
            return await self._lanes.run(method.lane, caller.uid, run)
        finally:
            if method.lane is Lane.MOUNT and not caller.is_connected():
                # The caller has left, so that nothing would unmount its mounts.
                self._mounter.release(caller.owner)

    async def _work(self, call: Call, method: Method, caller: Caller, serial: int) -> Answer:
        """Run a method that can take long; if it does, show it as a job."""
        loop = asyncio.get_running_loop()
        begun: asyncio.Future[None] = loop.create_future()
        job = Job(
            partial(loop.call_soon_threadsafe, begun.set_result, None),
            self._lanes.places(method.lane, caller.uid),
            caller.uid,
        )
        perform = partial(self._perform, call, method, Context(caller, job))
        work = loop.create_task(self._lanes.run(method.lane, caller.uid, perform))
        self._track(work)
        either: set[asyncio.Future[Any]] = {work, begun}
        await asyncio.wait(either, return_when=asyncio.FIRST_COMPLETED)
        if begun.done() and method.returns_job:
            path = self._jobs.show(job, caller.uid, work).path
            return result(call, "o", [path], serial)
        await asyncio.wait({work}, timeout=JOB_AFTER)
        if not work.done():
            self._jobs.show(job, caller.uid, work)
        return result(call, self._returns(call), await work, serial)

    def _returns(self, call: Call) -> str:
        return self._contract.methods[call.member][1]

    async def _authorised(self, call: Call, method: Method) -> Caller:
        """Return the caller, if they may call the method.

        Raises:
            AccessDenied: they may not.
        """
        uid, owner = await self._authority.uid(call.sender), self._owner(call.sender)
        is_connected = partial(self._authority.knows, call.sender)
        if uid == 0:
            return Caller(uid, owner, is_connected)
        texts = self._texts(call)
        if texts and method.user is not None:
            asking = partial(method.user, *texts.values())
            user = await self._lanes.run(Lane.USER, uid, asking)
            if uid == user:
                return Caller(uid, owner, is_connected, only_own=True)
        if (target := texts.get("target", "")).startswith("/"):
            # With ".." a path could lead out of the directory that a polkit rule permits.
            texts["target"] = plain(target)
        details = {name: text[:MAX_TEXT] for name, text in texts.items()}
        await self._authority.check(call, method.action, details)
        return Caller(uid, owner, is_connected)

    async def _canceller(self, call: Call) -> int:
        """Return the uid of the caller of Cancel, if they may; the job's own user always may.

        Raises as `Authority.check`.
        """
        uid = await self._authority.uid(call.sender)
        if self._jobs.is_of(call.path, uid):
            return uid
        return await self._authority.check(call, Action.MANAGE)

    def _texts(self, call: Call) -> dict[str, str]:
        """Return the leading text arguments of a call, by their names in the contract."""
        if call.signature != self._contract.methods[call.member][0]:
            return {}
        return dict(zip(self._contract.arguments[call.member], call.texts(), strict=False))

    def _owner(self, sender: str) -> str:
        # A new bus uses the same unique names again.
        return f"{self._bus} {sender}"

    def _perform(self, call: Call, method: Method, context: Context) -> Body:
        """Run a method in a worker thread."""
        uid = context.caller.uid
        with logged(call, uid, self._texts(call), changes=method.changes):
            check_signature(call, {call.member: self._contract.methods[call.member][0]})
            return method.run(context, *call.arguments())

    def _emit(self, path: str, interface: str, member: str, body: Body) -> None:
        signals = self._contract.signals if interface == MANAGER else _PROPERTY_SIGNALS
        message = Message.new_signal(path, interface, member, signals[member], body)
        data = marshalled(message, self.connection.next_serial())
        self._outbox.signal(data)


_PROPERTY_SIGNALS = {"PropertiesChanged": "sa{sv}as"}
