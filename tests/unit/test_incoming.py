"""Messages that the daemon reads: a bad message does not affect the next one."""

from __future__ import annotations

import asyncio
import socket
import struct
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import pytest
from dbus_next.constants import MessageType
from dbus_next.message import Message
from dbus_next.signature import SignatureTree
from hypothesis import given, settings
from hypothesis import strategies as st

from snapd_native.bus.connection import AT_ONCE, ServiceConnection
from snapd_native.bus.incoming import MAX_SIGNATURES, Call, Ignored, Reader
from snapd_native.wire.names import DRIVER
from tests.support.service import HANG_TIMEOUT

CALL = 1
PATH, INTERFACE, MEMBER, ERROR_NAME, REPLY, DESTINATION, SENDER, SIGNATURE, FDS = range(1, 10)

REQUIRED_FIELDS = {PATH: ("o", "/a"), MEMBER: ("s", "Stat"), SENDER: ("s", ":1.7")}
"""The fields that a call needs."""


class Wire:
    """Both ends of a connection; the service's end is a stream."""

    def __init__(self) -> None:
        self.far, near = socket.socketpair()
        with near:
            near.setblocking(False)
            self._stream = near.makefile("rwb")

    def read(self) -> object:
        """Return the next message, or None if it is not complete yet."""
        reader = Reader(self._stream, lambda _: False)
        return reader.unmarshall()

    def reader(self) -> Reader:
        return Reader(self._stream, lambda _: False)

    def close(self) -> None:
        self.far.close()
        self._stream.close()


@contextmanager
def open_wire() -> Iterator[Wire]:
    wire = Wire()
    try:
        yield wire
    finally:
        wire.close()


@pytest.fixture
def wire() -> Iterator[Wire]:
    with open_wire() as opened:
        yield opened


def packed(
    type_: int = CALL,
    flags: int = 0,
    version: int = 1,
    fields: Mapping[int, tuple[str, object]] | None = None,
    body: bytes = b"",
    big: bool = False,
) -> bytes:
    """Return a message as bytes; it need not be valid."""
    order = ">" if big else "<"
    header = b""
    for code, (signature, value) in (REQUIRED_FIELDS if fields is None else fields).items():
        header += b"\0" * (-len(header) % 8)
        header += bytes([code, len(signature)]) + signature.encode() + b"\0"
        if signature == "g":
            text = str(value).encode()
            header += bytes([len(text)]) + text + b"\0"
        else:
            header += b"\0" * (-len(header) % 4)
            if isinstance(value, int):
                header += struct.pack(f"{order}I", value)
            else:
                text = str(value).encode()
                header += struct.pack(f"{order}I", len(text)) + text + b"\0"
    start = struct.pack(
        f"{order}cBBBIII", b"B" if big else b"l", type_, flags, version, len(body), 9, len(header)
    )
    return start + header + b"\0" * (-len(header) % 8) + body


def text(value: str, order: str = "<") -> bytes:
    data = value.encode()
    return struct.pack(f"{order}I", len(data)) + data + b"\0"


def is_next(wire: Wire) -> bool:
    """Send a valid call, and return whether it is read without a change."""
    wire.far.sendall(packed())
    call = wire.read()
    return isinstance(call, Call) and (call.member, call.serial) == ("Stat", 9)


@pytest.mark.parametrize("big", [False, True])
def test_a_call_is_read_with_all_its_fields(wire: Wire, big: bool) -> None:
    order = ">" if big else "<"
    fields = {**REQUIRED_FIELDS, INTERFACE: ("s", "org.a"), SIGNATURE: ("g", "su")}
    body = text("kéy", order)
    body += b"\0" * (-len(body) % 4) + struct.pack(f"{order}I", 77)
    wire.far.sendall(packed(fields=fields, body=body, flags=4, big=big))
    call = wire.read()
    assert isinstance(call, Call)
    assert (call.serial, call.sender, call.path, call.interface, call.member, call.signature) == (
        *(9, ":1.7", "/a", "org.a", "Stat", "su"),
    )
    assert call.arguments() == ["kéy", 77]
    assert call.wants_reply
    assert call.may_ask


@pytest.mark.parametrize(
    ("flags", "wants_reply", "may_ask"),
    [(0, True, False), (1, False, False), (2, True, False), (4, True, True), (0xF8, True, False)],
)
def test_unknown_flags_are_ignored(
    wire: Wire, flags: int, wants_reply: bool, may_ask: bool
) -> None:
    wire.far.sendall(packed(flags=flags))
    call = wire.read()
    assert isinstance(call, Call)
    assert (call.wants_reply, call.may_ask) == (wants_reply, may_ask)


def test_unknown_header_fields_are_ignored(wire: Wire) -> None:
    fields = {**REQUIRED_FIELDS, 42: ("s", "new"), 0: ("u", 1), 255: ("g", "a{sv}"), FDS: ("u", 3)}
    wire.far.sendall(packed(fields=fields))
    call = wire.read()
    assert isinstance(call, Call)
    assert (call.path, call.member, call.arguments()) == ("/a", "Stat", [])


@pytest.mark.parametrize(
    "message",
    [
        packed(type_=0),
        packed(type_=5),
        packed(type_=255),
        packed(version=0),
        packed(version=2),
        packed(version=255, type_=99, flags=255),
        packed(fields={}),
        packed(fields={PATH: ("o", "/a")}),
        packed(fields={MEMBER: ("s", "Stat")}),
        packed(type_=4, fields={**REQUIRED_FIELDS, INTERFACE: ("s", "org.a")}),
        packed(type_=4, fields={SENDER: ("s", DRIVER)}),
        packed(type_=2, fields={SENDER: ("s", DRIVER)}),
        packed(type_=3, fields={SENDER: ("s", DRIVER), REPLY: ("u", 1)}),
        packed(type_=2, fields={REPLY: ("u", 1), SIGNATURE: ("g", "s")}, body=b"\xff\0\0\0x"),
        packed(type_=2, fields={REPLY: ("u", 1), SIGNATURE: ("g", "(")}, body=b"1234"),
        packed(type_=2, fields={REPLY: ("u", 1), 42: ("s", "new")}),
        packed(fields={**REQUIRED_FIELDS, 42: ("(", 1)}),
    ],
)
def test_an_unreadable_message_is_ignored_and_the_next_one_is_read(
    wire: Wire, message: bytes
) -> None:
    wire.far.sendall(message)
    assert isinstance(wire.read(), Ignored)
    assert is_next(wire)


def test_a_text_longer_than_its_message_does_not_affect_the_next_message(wire: Wire) -> None:
    whole = packed(fields=REQUIRED_FIELDS | {INTERFACE: ("s", "org.example")})
    cut = whole.replace(b"\x0b\0\0\0org.example", b"\xff\0\0\0org.example")
    assert cut != whole
    wire.far.sendall(cut + packed() * 5)
    assert isinstance(wire.read(), Ignored)
    for _ in range(5):
        assert isinstance(wire.read(), Call)


def test_replies_and_signals_of_the_bus_are_read(wire: Wire) -> None:
    reply = packed(
        type_=2,
        fields={SENDER: ("s", DRIVER), REPLY: ("u", 3), SIGNATURE: ("g", "u")},
        body=struct.pack("<I", 1000),
    )
    signal = packed(
        type_=4, fields={**REQUIRED_FIELDS, SENDER: ("s", DRIVER), INTERFACE: ("s", DRIVER)}
    )
    wire.far.sendall(reply + signal)
    first, second = wire.read(), wire.read()
    assert isinstance(first, Message)
    assert (first.message_type, first.reply_serial, first.body) == (
        *(MessageType.METHOD_RETURN, 3, [1000]),
    )
    assert isinstance(second, Message)
    assert second.message_type is MessageType.SIGNAL


@pytest.mark.parametrize("big", [False, True])
def test_a_message_that_arrives_byte_by_byte_is_read(wire: Wire, big: bool) -> None:
    data = packed(
        fields={**REQUIRED_FIELDS, SIGNATURE: ("g", "s")},
        body=text("key", ">" if big else "<"),
        big=big,
    )
    reader = wire.reader()
    for byte in data[:-1]:
        wire.far.send(bytes([byte]))
        assert reader.unmarshall() is None
    wire.far.send(data[-1:])
    call = reader.unmarshall()
    assert isinstance(call, Call)
    assert call.arguments() == ["key"]
    assert is_next(wire)


def test_a_closed_connection_raises_eof_error(wire: Wire) -> None:
    wire.far.sendall(packed()[:20])
    reader = wire.reader()
    assert reader.unmarshall() is None
    wire.far.close()
    with pytest.raises(EOFError):
        reader.unmarshall()


@settings(max_examples=300, deadline=None)
@given(
    type_=st.integers(0, 6),
    flags=st.integers(0, 255),
    version=st.sampled_from([1, 1, 1, 0, 2]),
    header=st.binary(max_size=200),
    body=st.binary(max_size=200),
    big=st.booleans(),
)
def test_random_bytes_do_not_affect_the_next_message(
    type_: int, flags: int, version: int, header: bytes, body: bytes, big: bool
) -> None:
    start = struct.pack(
        f"{'>' if big else '<'}cBBBIII",
        *(b"B" if big else b"l", type_, flags, version, len(body), 9, len(header)),
    )
    with open_wire() as wire:
        wire.far.sendall(start + header + b"\0" * (-len(header) % 8) + body)
        assert isinstance(wire.read(), Call | Message | Ignored)
        assert is_next(wire)


@settings(max_examples=300, deadline=None)
@given(at=st.integers(0, 200), value=st.integers(0, 255), big=st.booleans())
def test_one_wrong_byte_does_not_affect_the_next_message(at: int, value: int, big: bool) -> None:
    fields = {
        PATH: ("o", "/a"),
        INTERFACE: ("s", "org.a"),
        MEMBER: ("s", "Stat"),
        SENDER: ("s", ":1.7"),
        SIGNATURE: ("g", "sa{sv}"),
    }
    data = bytearray(packed(fields=fields, body=text("key") + bytes(8), big=big))
    # The first 16 bytes stay valid: the bus itself uses the lengths in them.
    at = 16 + at % (len(data) - 16)
    data[at] = value
    with open_wire() as wire:
        wire.far.sendall(data)
        assert isinstance(wire.read(), Call | Ignored)
        assert is_next(wire)


def test_the_cache_of_signatures_is_bounded(wire: Wire) -> None:
    for number in range(2 * MAX_SIGNATURES):
        signature = "".join("ybnqiuxtds"[int(digit)] for digit in str(number))
        inner = bytes([len(signature)]) + signature.encode() + b"\0"
        wire.far.sendall(packed(fields={**REQUIRED_FIELDS, SIGNATURE: ("g", "g")}, body=inner))
        call = wire.read()
        assert isinstance(call, Call)
        assert call.arguments() == [signature]
        SignatureTree._get(signature)
    assert len(SignatureTree._cache) <= MAX_SIGNATURES + 2


def test_the_connection_reads_a_bounded_number_of_messages_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The limit includes buffered messages, which the event loop does not report."""
    messages = 1000
    received: list[Call] = []
    monkeypatch.setenv("DBUS_SYSTEM_BUS_ADDRESS", f"unix:path={tmp_path}/socket")

    async def scenario(far: socket.socket) -> None:
        reading = ServiceConnection(received.append)
        bus, _ = far.accept()
        with bus:
            bus.sendall(packed() * messages)
            asyncio.get_running_loop().add_reader(reading._fd, reading._message_reader)
            while len(received) < messages:
                before = len(received)
                await asyncio.sleep(0)
                assert len(received) - before <= AT_ONCE
        reading.disconnect()

    with socket.socket(socket.AF_UNIX) as far:
        far.bind(f"{tmp_path}/socket")
        far.listen()
        asyncio.run(asyncio.wait_for(scenario(far), HANG_TIMEOUT))
