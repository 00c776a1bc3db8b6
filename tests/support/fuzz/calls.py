"""Strategies for any call that a caller may send to the service, well-formed or not."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from dbus_next.signature import Variant
from hypothesis import strategies as st

from snapd_native.bus.introspection import contract, shapes
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
    CANNOT_BE,
    FIELD_PATHS,
    FILTERS,
    LABELS,
    RANDOM,
    TARGETS,
    TEXTS,
    VARIANTS,
    Arguments,
    Long,
    mixed,
    right_options,
    wrong_options,
)
from tests.support.fuzz.packets import Packet

SHAPE = shapes(contract())[MANAGER]

RETURNS = {
    **{member: out for member, (_, out) in SHAPE.methods.items()},
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
        "options": mixed((9, right_options(member)), (1, wrong_options(member))),
        "target": TARGETS,
        "labels": LABELS,
        "fieldpaths": st.lists(FIELD_PATHS | RANDOM, max_size=3),
        "filters": st.lists(FILTERS, max_size=3),
        "parent": mixed((3, st.sampled_from(["", "base"])), (1, TEXTS)),
        "key": TEXTS,
        "name": TEXTS,
    }[name]


def _call(member: str, **instead: st.SearchStrategy[Any]) -> st.SearchStrategy[Packet]:
    """Return a strategy for calls of a method of the manager with arguments of its types.

    ``instead`` replaces the strategies of arguments by name.
    """
    values = [
        instead[name] if name in instead else _argument(member, name)
        for name in SHAPE.arguments[member]
    ]
    return st.builds(
        lambda body, interface: Packet(
            member, interface, signature=SHAPE.methods[member][0], body=list(body)
        ),
        st.tuples(*values),
        st.sampled_from([MANAGER, MANAGER, MANAGER, ""]),
    )


JOBS = mixed(
    (3, st.integers(0, 9).map(lambda number: f"{LAST_JOB}{number}")),
    (
        1,
        st.sampled_from(
            [f"{JOB_PATH}/{n}" for n in ("0", "1", "4294967295", "4294967296", "x", "01")]
        ),
    ),
)
NOWHERE = st.sampled_from(
    [
        "/",
        "/org",
        JOB_PATH,
        f"{JOB_PATH}/1/2",
        f"{OBJECT_PATH}/other",
        f"{OBJECT_PATH}1",
        "/org/freedesktop/DBus",
        Long("/" + "long/" * 1000 + "path"),
        Long("/" + "x" * 60_000),
    ]
)
NO_MEMBERS = st.sampled_from(
    ["None", "prepare", "_", Long("x" * 255), "Hello", "PropertiesChanged"]
)
NO_INTERFACES = st.sampled_from(
    [
        "org.snapdnative1",
        "org.snapdnative1.manager",
        "org.freedesktop.DBus",
        "org.freedesktop.DBus.ObjectManager",
        Long("a." + "b" * 253),
    ]
)
MEMBERS = st.sampled_from([*SHAPE.methods])
MAKING = ("Prepare", "PrepareJob", "View", "Commit", "CommitJob")
"""The methods that make snapshots. The other methods need snapshots to work on."""
STANDARD = [
    *((PEER, member) for member in ("Ping", "GetMachineId")),
    (INTROSPECTABLE, "Introspect"),
    *((PROPERTIES, member) for member in ("Get", "Set", "GetAll")),
    (JOB, "Cancel"),
]

INTERFACES = st.sampled_from(
    [MANAGER, MANAGER, JOB, PROPERTIES, "", "no.such", "é", Long("k" * 4097)]
)
PROPERTY_NAMES = st.sampled_from([*SHAPE.properties, "Id", "Key", "BytesDone", "", "None", "\n"])
OBJECTS = mixed((3, st.just(OBJECT_PATH)), (1, JOBS), (1, NOWHERE))

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
WELL_TYPED = mixed(*((4 if member in MAKING else 1, _call(member)) for member in SHAPE.methods))
PLAIN = st.builds(
    lambda what, path: Packet(what[1], what[0], path), st.sampled_from(STANDARD[:3]), OBJECTS
)
JOB_CALLS = st.builds(lambda path: Packet("Cancel", JOB, path), JOBS)


def _takes(interface: str, member: str) -> str:
    own = {"Get": "ss", "GetAll": "s", "Set": "ssv"}
    return SHAPE.methods[member][0] if interface == MANAGER else own.get(member, "")


def _mistyped(what: tuple[str, str], path: str, given: Arguments) -> Packet:
    (interface, member), (signature, body) = what, given
    return Packet(member, interface, path, signature, body)


ILL_TYPED = st.one_of(
    st.builds(_mistyped, st.tuples(st.just(MANAGER), MEMBERS), st.just(OBJECT_PATH), ARGUMENTS),
    st.builds(_mistyped, st.sampled_from(STANDARD), st.just(OBJECT_PATH) | JOBS, ARGUMENTS),
).filter(lambda packet: packet.signature != _takes(packet.interface, packet.member))

UNKNOWN = st.one_of(
    st.builds(
        _mistyped,
        st.tuples(st.sampled_from([MANAGER, PROPERTIES, PEER, ""]), NO_MEMBERS),
        *(st.just(OBJECT_PATH), ARGUMENTS),
    ),
    st.builds(
        _mistyped,
        st.tuples(NO_INTERFACES, MEMBERS | NO_MEMBERS),
        *(st.just(OBJECT_PATH), ARGUMENTS),
    ),
    st.builds(lambda packet, path: replace(packet, path=path), WELL_TYPED, NOWHERE | JOBS),
)

_BAD = {
    "options": wrong_options,
    "key": lambda _: CANNOT_BE,
    "name": lambda _: CANNOT_BE,
    "target": lambda _: st.sampled_from(["relative", "..", "@/places/link", "@/state", "/"]),
    "filters": lambda _: st.just(["=bad"]),
    "fieldpaths": lambda _: st.lists(st.sampled_from(["kind", "", "labels."]), min_size=1),
}


def _bad(member: str) -> st.SearchStrategy[Packet]:
    """Return a strategy for calls with arguments of the right types, one of which is invalid."""
    names = [name for name in SHAPE.arguments[member] if name in _BAD and member != "ListMounts"]
    return st.one_of(*(_call(member, **{name: _BAD[name](member)}) for name in names))


BAD = st.one_of(*(_bad(member) for member in SHAPE.methods))
ILL_FORMED = mixed((3, ILL_TYPED), (1, UNKNOWN), (2, BAD))
WITH_REPLY = [0] * 20 + [2, 4, 6, 0x80, 0xF8, 0xFE]
"""Flags of calls that want a reply. Some of their bits have no meaning."""

WITHOUT_REPLY = [1, 3, 0xFF]

EXTRA = st.sampled_from(
    [()] * 20
    + [
        ((4, Variant("s", "org.example.Error")),),
        ((7, Variant("s", ":1.1")),),
        ((9, Variant("u", 0)),),
        ((42, Variant("s", "new")), (255, Variant("a{sv}", {"a": Variant("u", 1)}))),
        ((10, Variant("o", "/container")),),
    ]
)


def _dressed(calls: st.SearchStrategy[Packet], flags: list[int]) -> st.SearchStrategy[Packet]:
    return st.builds(
        lambda packet, flags, extra: replace(packet, flags=flags, extra=extra),
        *(calls, st.sampled_from(flags), EXTRA),
    )


_ANY = mixed(
    (30, WELL_TYPED), (2, PROPERTY_CALLS), (3, JOB_CALLS), (1, PLAIN), (2, ILL_TYPED), (1, UNKNOWN)
)

REFUSED = _dressed(ILL_FORMED, WITH_REPLY)
"""Calls that the service refuses in any state."""

ANSWERED = _dressed(_ANY, WITH_REPLY)
"""Any call that wants a reply."""

CALLS = _dressed(_ANY, WITH_REPLY + WITHOUT_REPLY)
"""Any call."""
