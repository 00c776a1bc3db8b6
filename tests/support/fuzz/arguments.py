"""Strategies for arguments: valid ones, ones that the contract refuses, and random ones."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from dbus_next.signature import Variant
from hypothesis import strategies as st

from snapd_native.model import DIGEST_LABEL, STANDBY_LABEL
from snapd_native.wire.names import JOB_PATH, OBJECT_PATH
from snapd_native.wire.values import Body


class LongText(str):
    """A long text, whose representation is short."""

    __slots__ = ()

    def __repr__(self) -> str:
        return f"{self[:2]!r}...[{len(self)}]"


def weighted_choice(*weighted: tuple[int, st.SearchStrategy[Any]]) -> st.SearchStrategy[Any]:
    """Choose among strategies with the given weights; ``one_of`` ignores repeated strategies."""
    choices = [strategy for count, strategy in weighted for _ in range(count)]
    return st.sampled_from(range(len(choices))).flatmap(choices.__getitem__)


# No absolute path: a random one could be an existing directory of the machine.
RANDOM = st.text(
    st.characters(exclude_categories=["Cs"], exclude_characters="\0"), max_size=12
).filter(lambda text: not text.startswith("/"))
KEYS = st.sampled_from(["a", "b", "c", "base", "look", "é/😀 key", LongText("k" * 4096), "../a"])
INVALID_KEYS = st.sampled_from(
    ["", LongText("k" * 4097), LongText("é" * 2049), LongText("😀" * 1025), LongText("k" * 100_000)]
)
ODD_TEXTS = st.sampled_from(
    [
        "../../etc/passwd",
        "%00\\0",
        "'; DROP TABLE snapshots; --",
        "%s%n{0}",
        "\x01\x1b[2J\x7f",
        "two\nlines\r\n",
        "\u2028\u202e\ufeff\u0645\u0631\u062d\u0628\u0627",
        "\ufdd0\uffff\U0010ffff",
        LongText("é" * 2048),
    ]
)
TEXTS = weighted_choice((20, KEYS), (1, INVALID_KEYS), (1, ODD_TEXTS), (1, RANDOM))

DIRECTORIES = ["@/places/0", "@/places/1", "@/places/2", "@/places/é 😀"]
TARGETS = weighted_choice(
    (6, st.sampled_from(["", *DIRECTORIES])),
    (
        1,
        st.sampled_from(
            [
                "@",
                "@/state",
                "@/state/metadata.db",
                "@/places/file",
                "@/places/link",
                "@/places/link/below",
                "@/places/none",
                "@/places/0/",
                "@/places//1",
                "@/places/../places/2",
                "@/places/./2",
                LongText("@/places/" + "x" * 255),
                LongText("@/places/" + "x" * 256),
                LongText("@/places" + "/x" * 3000),
                "/",
                "//",
                "/proc/self",
                "/proc/self/root",
                "/proc/self/fd/0",
                "/dev/null",
                "/\x01\n",
                "relative",
                "./a",
                "..",
            ]
        ),
    ),
    (1, RANDOM),
)

LABEL_KEYS = st.sampled_from(
    ["k", "k.l/m", STANDBY_LABEL, DIGEST_LABEL, "", LongText("k" * 4097), "é\n"]
)
LABEL_VALUES = st.sampled_from(
    ["", "1", "2", "65", "x", LongText("v" * 4092), "\x1b", "sha256:", "sha256:" + "0" * 64]
)
LABELS = weighted_choice(
    (8, st.dictionaries(st.sampled_from(["k", "l", "k.l/m"]), LABEL_VALUES, max_size=2)),
    (2, st.sampled_from([{STANDBY_LABEL: "1"}, {DIGEST_LABEL: "any"}])),
    (1, st.dictionaries(LABEL_KEYS | RANDOM, LABEL_VALUES | RANDOM, max_size=3)),
    (1, st.just({f"{number:04}": LongText("v" * 4092) for number in range(257)})),
)
FIELD_PATHS = weighted_choice(
    (6, st.sampled_from(["labels", "labels.k", "labels.k.l/m"])),
    (1, st.sampled_from(["labels.", "kind", "", "name", "labels.snapd-native.", "labels" * 1000])),
)
FILTERS = weighted_choice(
    (
        6,
        st.sampled_from(
            [
                "name==base",
                "kind==active",
                "kind!=view,parent==base",
                "labels.k",
                'labels."k.l/m"==1',
                'name~="^[a-c]$"',
                "name~=/a|b/",
                "no such==x",
            ]
        ),
    ),
    (
        1,
        st.sampled_from(
            [
                "",
                "=bad",
                "name",
                "name==",
                'name~="("',
                'name~="a**"',
                'name~="(?<x>"',
                'name~="\\xff"',
                LongText('name~="' + "a" * 2000 + '"'),
                'labels."k',
                "name==a,",
                ",",
            ]
        ),
    ),
    (1, RANDOM),
)

OPTIONS: dict[str, st.SearchStrategy[Variant]] = {
    "labels": LABELS.map(lambda labels: Variant("a{ss}", labels)),
    "parent": TEXTS.map(lambda text: Variant("s", text)),
    "after": TEXTS.map(lambda text: Variant("s", text)),
    "limit": st.sampled_from([1, 2, 1000, 10_000, 0, 10_001, 0xFFFF_FFFF]).map(
        lambda limit: Variant("u", limit)
    ),
    "read-only": st.booleans().map(lambda flag: Variant("b", flag)),
    "digest": st.booleans().map(lambda flag: Variant("b", flag)),
    "lazy": st.booleans().map(lambda flag: Variant("b", flag)),
    "lifetime": st.sampled_from(["client", "persistent", "", "for ever"]).map(
        lambda text: Variant("s", text)
    ),
}
OPTIONS_OF: dict[str, list[str]] = {
    "Prepare": ["labels"],
    "PrepareJob": ["labels"],
    "View": ["labels"],
    "Commit": ["labels", "parent", "digest"],
    "CommitJob": ["labels", "parent", "digest"],
    "List": ["after", "limit"],
    "Mount": ["read-only", "lifetime"],
    "Unmount": ["lazy"],
    "OpenTree": ["read-only"],
}
"""The options of the methods that have any."""


@dataclass(frozen=True)
class Type:
    """A type of D-Bus, and a strategy for its values."""

    signature: str
    values: st.SearchStrategy[Any]


def _number(signature: str, least: int, most: int) -> Type:
    return Type(signature, st.sampled_from([0, 1, least, most]))


NUMBERS = [
    _number("y", 0, 0xFF),
    _number("n", -(1 << 15), (1 << 15) - 1),
    _number("q", 0, (1 << 16) - 1),
    _number("i", -(1 << 31), (1 << 31) - 1),
    _number("u", 0, (1 << 32) - 1),
    _number("x", -(1 << 63), (1 << 63) - 1),
    _number("t", 0, (1 << 64) - 1),
    _number("h", 0, 2),
]
BASIC_TYPES = [
    *NUMBERS,
    Type("b", st.booleans()),
    Type("s", TEXTS),
    Type("o", st.sampled_from(["/", "/a/b", OBJECT_PATH, f"{JOB_PATH}/1"])),
    Type("g", st.sampled_from(["", "s", "a{sv}", "(a(ss)v)", "a" * 32 + "y"])),
]
"""The types that the keys of a dictionary may have."""

DOUBLE = Type("d", st.sampled_from([0.0, -1.5, float("inf"), float("nan"), 5e-324]))


def _array(inner: Type) -> Type:
    if inner.signature == "y":
        return Type("ay", st.binary(max_size=4))
    return Type(f"a{inner.signature}", st.lists(inner.values, max_size=2))


def _struct(inner: list[Type]) -> Type:
    signature = "".join(part.signature for part in inner)
    return Type(f"({signature})", st.tuples(*(part.values for part in inner)).map(list))


def _dictionary(of: tuple[Type, Type]) -> Type:
    key, value = of
    return Type(
        f"a{{{key.signature}{value.signature}}}",
        st.dictionaries(key.values, value.values, max_size=2),
    )


def _variant(of: Type) -> st.SearchStrategy[Variant]:
    return of.values.map(lambda value: Variant(of.signature, value))


def _containers(inner: st.SearchStrategy[Type]) -> st.SearchStrategy[Type]:
    return st.one_of(
        inner.map(_array),
        st.lists(inner, min_size=1, max_size=3).map(_struct),
        st.tuples(st.sampled_from(BASIC_TYPES), inner).map(_dictionary),
    )


VARIANTS: st.SearchStrategy[Variant] = st.deferred(lambda: TYPES.flatmap(_variant))
TYPES: st.SearchStrategy[Type] = st.recursive(
    st.sampled_from([*BASIC_TYPES, DOUBLE, Type("v", VARIANTS)]), _containers, max_leaves=3
)


def _nested_variant(levels: int) -> Variant:
    value = Variant("s", "deep")
    for _ in range(levels):
        value = Variant("v", value)
    return value


def _nested_list(levels: int) -> Any:  # noqa: ANN401 - a list of lists of lists
    return [_nested_list(levels - 1)] if levels else "deep"


Arguments = tuple[str, Body]
"""A signature, and values of its types."""


def _arguments(types: list[Type]) -> st.SearchStrategy[Arguments]:
    signature = "".join(of.signature for of in types)
    values = st.tuples(*(of.values for of in types))
    return values.map(lambda body: (signature, list(body)))


EXTREME: list[Arguments] = [
    ("v", [_nested_variant(50)]),
    ("a" * 32 + "s", [[]]),
    ("(" * 32 + "s" + ")" * 32, [_nested_list(32)]),
    ("a{sv}" * 20, [{}] * 20),
    ("s" * 255, ["a"] * 255),
    ("s", [LongText("k" * (5 << 20))]),
]
ARGUMENTS: st.SearchStrategy[Arguments] = weighted_choice(
    (8, st.lists(TYPES, max_size=4).flatmap(_arguments)), (1, st.sampled_from(EXTREME))
)
"""Any arguments."""


def invalid_options(member: str) -> st.SearchStrategy[dict[str, Variant]]:
    """Return a strategy for options of which at least one has an unknown name or a wrong type."""
    unknown = st.sampled_from(["", "Labels", "force", "\x01", "😀", LongText("o" * 5000)])
    wrong = st.dictionaries(unknown, VARIANTS, min_size=1, max_size=2)
    if takes := OPTIONS_OF.get(member):
        mistyped = VARIANTS.filter(lambda of: of.signature not in ("a{ss}", "s", "u", "b"))
        wrong |= st.dictionaries(st.sampled_from(takes), mistyped, min_size=1, max_size=2)
    return st.builds(lambda some, others: some | others, valid_options(member), wrong)


def valid_options(member: str) -> st.SearchStrategy[dict[str, Variant]]:
    optional = {name: OPTIONS[name] for name in OPTIONS_OF.get(member, [])}
    return st.fixed_dictionaries({}, optional=optional)
