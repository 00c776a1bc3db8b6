"""Strategies for any call that a caller may send to the service, well-formed or not."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from dbus_next.signature import Variant
from hypothesis import strategies as st

from snapd_native.bus.introspection import contract, interfaces
from snapd_native.wire.names import (
    INTROSPECTABLE,
    JOB,
    JOB_PATH,
    MANAGER,
    OBJECT_PATH,
    PEER,
    PROPERTIES,
)
from tests.support.fuzz.arguments import (
    ARGUMENTS,
    FIELD_PATHS,
    FILTERS,
    INVALID_KEYS,
    LABELS,
    RANDOM,
    TARGETS,
    TEXTS,
    VARIANTS,
    Arguments,
    LongText,
    invalid_options,
    valid_options,
    weighted_choice,
)
from tests.support.fuzz.packets import Packet

MANAGER_SHAPE = interfaces(contract())[MANAGER]

RETURNS = {
    **{member: out for member, (_, out) in MANAGER_SHAPE.methods.items()},
    "Ping": "",
    "GetMachineId": "s",
    "Introspect": "s",
    "Get": "v",
    "GetAll": "a{sv}",
    "Cancel": "",
}
"""The signature of the reply of each member that can succeed."""

LAST_JOB = "the last job but "
"""The beginning of a placeholder for the path of a job; a number follows.

The path is known only when the message is sent.
"""


def _argument(member: str, name: str) -> st.SearchStrategy[Any]:
    return {
        "options": weighted_choice((9, valid_options(member)), (1, invalid_options(member))),
        "target": TARGETS,
        "labels": LABELS,
        "fieldpaths": st.lists(FIELD_PATHS | RANDOM, max_size=3),
        "filters": st.lists(FILTERS, max_size=3),
        "parent": weighted_choice((3, st.sampled_from(["", "base"])), (1, TEXTS)),
        "key": TEXTS,
        "name": TEXTS,
    }[name]


def _call(member: str, **instead: st.SearchStrategy[Any]) -> st.SearchStrategy[Packet]:
    """Return a strategy for calls of a method of the manager with arguments of its types.

    ``instead`` replaces the strategies of arguments by name.
    """
    values = [
        instead[name] if name in instead else _argument(member, name)
        for name in MANAGER_SHAPE.arguments[member]
    ]
    return st.builds(
        lambda body, interface: Packet(
            member, interface, signature=MANAGER_SHAPE.methods[member][0], body=list(body)
        ),
        st.tuples(*values),
        st.sampled_from([MANAGER, MANAGER, MANAGER, ""]),
    )


JOBS = weighted_choice(
    (3, st.integers(0, 9).map(lambda number: f"{LAST_JOB}{number}")),
    (
        1,
        st.sampled_from(
            [f"{JOB_PATH}/{n}" for n in ("0", "1", "4294967295", "4294967296", "x", "01")]
        ),
    ),
)
UNKNOWN_PATHS = st.sampled_from(
    [
        "/",
        "/org",
        JOB_PATH,
        f"{JOB_PATH}/1/2",
        f"{OBJECT_PATH}/other",
        f"{OBJECT_PATH}1",
        "/org/freedesktop/DBus",
        LongText("/" + "long/" * 1000 + "path"),
        LongText("/" + "x" * 60_000),
    ]
)
UNKNOWN_MEMBERS = st.sampled_from(
    ["None", "prepare", "_", LongText("x" * 255), "Hello", "PropertiesChanged"]
)
UNKNOWN_INTERFACES = st.sampled_from(
    [
        "org.snapdnative1",
        "org.snapdnative1.manager",
        "org.freedesktop.DBus",
        "org.freedesktop.DBus.ObjectManager",
        LongText("a." + "b" * 253),
    ]
)
MEMBERS = st.sampled_from([*MANAGER_SHAPE.methods])
CREATING_METHODS = ("Prepare", "PrepareJob", "View", "Commit", "CommitJob")
"""The methods that make snapshots. The other methods need snapshots to work on."""
STANDARD_METHODS = [
    *((PEER, member) for member in ("Ping", "GetMachineId")),
    (INTROSPECTABLE, "Introspect"),
    *((PROPERTIES, member) for member in ("Get", "Set", "GetAll")),
    (JOB, "Cancel"),
]

INTERFACES = st.sampled_from(
    [MANAGER, MANAGER, JOB, PROPERTIES, "", "no.such", "é", LongText("k" * 4097)]
)
PROPERTY_NAMES = st.sampled_from(
    [*MANAGER_SHAPE.properties, "Id", "Key", "BytesDone", "", "None", "\n"]
)
OBJECTS = weighted_choice((3, st.just(OBJECT_PATH)), (1, JOBS), (1, UNKNOWN_PATHS))

PROPERTY_CALLS = st.one_of(
    st.builds(
        lambda path, *body: Packet("Get", PROPERTIES, path, "ss", [*body]),
        *(OBJECTS, INTERFACES, PROPERTY_NAMES),
    ),
    st.builds(lambda path, of: Packet("GetAll", PROPERTIES, path, "s", [of]), OBJECTS, INTERFACES),
    st.builds(
        lambda path, *body: Packet("Set", PROPERTIES, path, "ssv", [*body]),
        *(OBJECTS, INTERFACES, PROPERTY_NAMES, VARIANTS),
    ),
)
WELL_TYPED_CALLS = weighted_choice(
    *((4 if member in CREATING_METHODS else 1, _call(member)) for member in MANAGER_SHAPE.methods)
)
PLAIN_CALLS = st.builds(
    lambda what, path: Packet(what[1], what[0], path),
    st.sampled_from(STANDARD_METHODS[:3]),
    OBJECTS,
)
JOB_CALLS = st.builds(lambda path: Packet("Cancel", JOB, path), JOBS)


def _signature_of(interface: str, member: str) -> str:
    own = {"Get": "ss", "GetAll": "s", "Set": "ssv"}
    return MANAGER_SHAPE.methods[member][0] if interface == MANAGER else own.get(member, "")


def _mistyped(what: tuple[str, str], path: str, given: Arguments) -> Packet:
    (interface, member), (signature, body) = what, given
    return Packet(member, interface, path, signature, body)


ILL_TYPED_CALLS = st.one_of(
    st.builds(_mistyped, st.tuples(st.just(MANAGER), MEMBERS), st.just(OBJECT_PATH), ARGUMENTS),
    st.builds(_mistyped, st.sampled_from(STANDARD_METHODS), st.just(OBJECT_PATH) | JOBS, ARGUMENTS),
).filter(lambda packet: packet.signature != _signature_of(packet.interface, packet.member))

CALLS_OF_UNKNOWN = st.one_of(
    st.builds(
        _mistyped,
        st.tuples(st.sampled_from([MANAGER, PROPERTIES, PEER, ""]), UNKNOWN_MEMBERS),
        *(st.just(OBJECT_PATH), ARGUMENTS),
    ),
    st.builds(
        _mistyped,
        st.tuples(UNKNOWN_INTERFACES, MEMBERS | UNKNOWN_MEMBERS),
        *(st.just(OBJECT_PATH), ARGUMENTS),
    ),
    st.builds(
        lambda packet, path: replace(packet, path=path), WELL_TYPED_CALLS, UNKNOWN_PATHS | JOBS
    ),
)

_INVALID_VALUES = {
    "options": invalid_options,
    "key": lambda _: INVALID_KEYS,
    "name": lambda _: INVALID_KEYS,
    "target": lambda _: st.sampled_from(["relative", "..", "@/places/link", "@/state", "/"]),
    "filters": lambda _: st.just(["=bad"]),
    "fieldpaths": lambda _: st.lists(st.sampled_from(["kind", "", "labels."]), min_size=1),
}


def _invalid_call(member: str) -> st.SearchStrategy[Packet]:
    """Return a strategy for calls with arguments of the right types, one of which is invalid."""
    names = [
        name
        for name in MANAGER_SHAPE.arguments[member]
        if name in _INVALID_VALUES and member != "ListMounts"
    ]
    return st.one_of(*(_call(member, **{name: _INVALID_VALUES[name](member)}) for name in names))


INVALID_CALLS = st.one_of(*(_invalid_call(member) for member in MANAGER_SHAPE.methods))
REFUSED_CALLS = weighted_choice((3, ILL_TYPED_CALLS), (1, CALLS_OF_UNKNOWN), (2, INVALID_CALLS))
WITH_REPLY = [0] * 20 + [2, 4, 6, 0x80, 0xF8, 0xFE]
"""Flags of calls that want a reply. Some of their bits have no meaning."""

WITHOUT_REPLY = [1, 3, 0xFF]

EXTRA_FIELDS = st.sampled_from(
    [()] * 20
    + [
        ((4, Variant("s", "org.example.Error")),),
        ((7, Variant("s", ":1.1")),),
        ((9, Variant("u", 0)),),
        ((42, Variant("s", "new")), (255, Variant("a{sv}", {"a": Variant("u", 1)}))),
        ((10, Variant("o", "/container")),),
    ]
)


def _with_flags_and_fields(
    calls: st.SearchStrategy[Packet], flags: list[int]
) -> st.SearchStrategy[Packet]:
    return st.builds(
        lambda packet, flags, extra: replace(packet, flags=flags, extra=extra),
        *(calls, st.sampled_from(flags), EXTRA_FIELDS),
    )


_ANY_CALL = weighted_choice(
    (30, WELL_TYPED_CALLS),
    (2, PROPERTY_CALLS),
    (3, JOB_CALLS),
    (1, PLAIN_CALLS),
    (2, ILL_TYPED_CALLS),
    (1, CALLS_OF_UNKNOWN),
)

REFUSED = _with_flags_and_fields(REFUSED_CALLS, WITH_REPLY)
"""Calls that the service refuses in any state."""

ANSWERED = _with_flags_and_fields(_ANY_CALL, WITH_REPLY)
"""Any call that wants a reply."""

CALLS = _with_flags_and_fields(_ANY_CALL, WITH_REPLY + WITHOUT_REPLY)
"""Any call."""
