"""Every bad argument of every call is refused and changes nothing."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from dbus_next.signature import Variant

from snapd_native.client import BlockingClient
from snapd_native.errors import FailedPrecondition, InvalidArgument, NotFound
from snapd_native.wire.values import Body
from tests.support.file_systems import long_on_xfs
from tests.support.service import (
    Service,
    call_method,
    commit_snapshot,
    expect_error,
    short_id,
    snapshots_and_directories,
)

pytestmark = long_on_xfs

CALLS: dict[str, tuple[str, Body]] = {
    "Prepare": ("ssa{sv}", ["new", "base", {}]),
    "View": ("ssa{sv}", ["new", "base", {}]),
    "Commit": ("ssa{sv}", ["new", "key", {}]),
    "Mounts": ("s", ["key"]),
    "Stat": ("s", ["key"]),
    "Update": ("sa{ss}as", ["key", {"a": "2"}, ["labels.a"]]),
    "Usage": ("s", ["key"]),
    "BackgroundUsage": ("sa{sv}", ["key", {}]),
    "List": ("asa{sv}", [["name==key"], {}]),
    "Remove": ("sa{sv}", ["key", {}]),
    "Cleanup": ("a{sv}", [{}]),
}
"""Every method with arguments that it accepts."""

NAME_ARGUMENTS = [
    ("Prepare", 0),
    ("Prepare", 1),
    ("View", 0),
    ("View", 1),
    ("Commit", 0),
    ("Commit", 1),
    ("Mounts", 0),
    ("Stat", 0),
    ("Update", 0),
    ("Usage", 0),
    ("BackgroundUsage", 0),
    ("Remove", 0),
]
"""Each argument that names a snapshot."""

WITH_OPTIONS = ["Prepare", "View", "Commit", "List", "Remove", "Cleanup"]

TOO_LONG_NAMES = {
    "4097 bytes": "k" * 4097,
    "4097 characters of two bytes": "é" * 4097,
    "1025 characters of four bytes": "😀" * 1025,
    "2 MiB": "k" * (2 << 20),
}

ODD_NAMES = (
    "a/b",
    "../../etc/passwd",
    "../metadata.db",
    "%00",
    "\\0",
    "\\x00",
    "'; DROP TABLE snapshots; --",
    "%s%n",
    "\x01\x1b[2J\x7f",
    "two\nlines\r\n",
    "\u2028\u202e\ufeff\u0645\u0631\u062d\u0628\u0627",
    "👩‍👩‍👧😀",
    "\ufdd0\uffff\U0010ffff",
    "k" * 4096,
    "é" * 2048,
)
"""Unusual valid names that no snapshot has."""

INVALID_LABELS: dict[str, tuple[dict[str, str], str]] = {
    "no key": ({"": "v"}, "empty key"),
    "4097 bytes": ({"k": "v" * 4096}, '"k" has 4097 bytes'),
    "4097 bytes of key": ({"k" * 4097: ""}, "4097 bytes"),
    "4098 bytes in characters of two": ({"é": "é" * 2048}, '"é" has 4098 bytes'),
    "1 MiB": ({"k": "v" * (1 << 20)}, '"k" has 1048577 bytes'),
    "too many": ({f"{n:04}": "v" * 4092 for n in range(257)}, "1052672 bytes in all"),
}


@pytest.fixture
def client_without_changes(
    shared_service: Service, shared_client: BlockingClient
) -> Iterator[BlockingClient]:
    """Make the snapshots base, key and view; check that the test does not change them."""
    commit_snapshot(shared_client, "base", files={"file": "text"})
    shared_client.prepare("key", "base", {"a": "1"})
    shared_client.view("view", "base")
    before = snapshots_and_directories(shared_client, shared_service)
    yield shared_client
    assert snapshots_and_directories(shared_client, shared_service) == before


def with_argument(member: str, index: int, value: object) -> tuple[str, Body]:
    signature, body = CALLS[member]
    return signature, [value if at == index else given for at, given in enumerate(body)]


@pytest.mark.parametrize(("member", "index"), NAME_ARGUMENTS)
def test_an_empty_or_too_long_name_raises_invalid_argument(
    client_without_changes: BlockingClient, member: str, index: int
) -> None:
    for text in TOO_LONG_NAMES.values():
        signature, body = with_argument(member, index, text)
        with expect_error(InvalidArgument, text[:40], f"{len(text.encode())} bytes", "4096"):
            call_method(member, signature, *body)
    if (member, index) not in (("Prepare", 1), ("View", 1)):
        signature, body = with_argument(member, index, "")
        with expect_error(InvalidArgument, "is empty"):
            call_method(member, signature, *body)


@pytest.mark.parametrize(
    ("member", "index"),
    [name for name in NAME_ARGUMENTS if name not in (("Prepare", 0), ("View", 0), ("Commit", 0))],
)
def test_an_unused_odd_name_raises_not_found(
    client_without_changes: BlockingClient, member: str, index: int
) -> None:
    for text in ODD_NAMES:
        signature, body = with_argument(member, index, text)
        shown = "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text[:80])
        with expect_error(NotFound, shown):
            call_method(member, signature, *body)


@pytest.mark.parametrize("name", ODD_NAMES, ids=short_id)
def test_error_messages_escape_odd_names(shared_client: BlockingClient, name: str) -> None:
    """Messages about a snapshot with such a name contain only printable characters."""
    commit_snapshot(shared_client, name)
    shown = "".join(c if c.isprintable() else ascii(c)[1:-1] for c in name[:80])
    with expect_error(FailedPrecondition, shown):
        shared_client.mounts(name)
    shared_client.view("child", name)
    with expect_error(FailedPrecondition, shown):
        shared_client.remove(name)


@pytest.mark.parametrize("member", ["Prepare", "View", "Commit"])
@pytest.mark.parametrize("which", INVALID_LABELS)
def test_bad_labels_raise_invalid_argument(
    client_without_changes: BlockingClient, member: str, which: str
) -> None:
    labels, says = INVALID_LABELS[which]
    signature, body = with_argument(member, 2, {"labels": Variant("a{ss}", labels)})
    with expect_error(InvalidArgument, says):
        call_method(member, signature, *body)


@pytest.mark.parametrize("which", INVALID_LABELS)
def test_update_with_bad_labels_raises_invalid_argument(
    client_without_changes: BlockingClient, which: str
) -> None:
    labels, says = INVALID_LABELS[which]
    for paths in ([], ["labels"], ["labels.a"]):
        with expect_error(InvalidArgument, says):
            client_without_changes.update("key", labels, paths)
    if which != "too many":
        with expect_error(InvalidArgument):
            client_without_changes.update("key", {"b": "v" * 4096}, ["labels.a", "labels.b"])


@pytest.mark.parametrize(
    "path", [*ODD_NAMES[:13], "labels." * 2000 + "\n", "k" * (1 << 20)], ids=short_id
)
def test_update_with_an_odd_field_path_is_refused(
    client_without_changes: BlockingClient, path: str
) -> None:
    if path.startswith("labels."):
        with expect_error(NotFound):
            client_without_changes.update("none", {}, [path])
    else:
        with expect_error(InvalidArgument, "labels.KEY"):
            client_without_changes.update("key", {"a": "2"}, [path])


@pytest.mark.parametrize("member", WITH_OPTIONS)
def test_an_unknown_option_raises_invalid_argument(
    client_without_changes: BlockingClient, member: str
) -> None:
    index = len(CALLS[member][1]) - 1
    for option in ("", "Labels", "force", "labels ", "\x01", "😀", "o" * 5000):
        signature, body = with_argument(member, index, {option: Variant("b", True)})
        with expect_error(InvalidArgument, "option", option[:80].replace("\x01", "\\x01")):
            call_method(member, signature, *body)


@pytest.mark.parametrize(
    ("member", "option", "right"),
    [
        ("Prepare", "labels", "a{ss}"),
        ("View", "labels", "a{ss}"),
        ("Commit", "labels", "a{ss}"),
        ("Commit", "parent", "s"),
        ("List", "after", "s"),
        ("List", "limit", "u"),
    ],
)
def test_an_option_of_the_wrong_type_raises_invalid_argument(
    client_without_changes: BlockingClient, member: str, option: str, right: str
) -> None:
    index = len(CALLS[member][1]) - 1
    values = {
        "a{ss}": {"a": "b"},
        "a{sv}": {"a": Variant("s", "b")},
        "as": ["a"],
        "s": "text",
        "o": "/text",
        "u": 7,
        "i": 7,
        "t": 7,
        "v": Variant("u", 7),
        "b": True,
        "(s)": ["a"],
        "ay": b"bytes",
    }
    for signature, value in values.items():
        if signature != right:
            takes, body = with_argument(member, index, {option: Variant(signature, value)})
            with expect_error(InvalidArgument, option, f'"{signature}"', f"give {right}"):
                call_method(member, takes, *body)


@pytest.mark.parametrize("member", CALLS)
def test_a_wrong_signature_raises_invalid_argument(
    client_without_changes: BlockingClient, member: str
) -> None:
    right, body = CALLS[member]
    wrong: list[tuple[str, Body]] = [
        ("", []),
        ("u", [7]),
        (right + "s", [*body, "more"]),
        ("v" + right, [Variant("s", "more"), *body]),
        (f"({right})", [body]),
        ("a{sv}" * 20, [{}] * 20),
        ("a" * 32 + "s", [[]]),
    ]
    for signature, given in wrong:
        with expect_error(InvalidArgument, member, f"({right})"):
            call_method(member, signature, *given)


def test_list_with_bad_paging_or_filters_raises_invalid_argument(
    client_without_changes: BlockingClient,
) -> None:
    for text in TOO_LONG_NAMES.values():
        with expect_error(InvalidArgument, text[:40], f"{len(text.encode())} bytes"):
            client_without_changes.list(after=text)
    for filters in (["name==a"] * 101, ["name==" + "a" * 20_000], ["name~=" + "a" * 2000]):
        with expect_error(InvalidArgument):
            client_without_changes.list(filters)
    for text in ODD_NAMES[:13]:
        with expect_error(InvalidArgument, "the filter"):
            client_without_changes.list([f"={text}"])
        assert client_without_changes.list(["name==none"], after=text) == []


@pytest.mark.parametrize("member", CALLS)
def test_a_body_over_4_mib_raises_invalid_argument(
    client_without_changes: BlockingClient, member: str
) -> None:
    signature, body = CALLS[member]
    for index, given in enumerate(body):
        large = "x" * (5 << 20)
        values: dict[type, object] = {str: large, list: [large], dict: {"a": large}}
        value = values[type(given)]
        if isinstance(value, dict) and "v" in signature:
            value = {"labels": Variant("s", large)}
        _, mended = with_argument(member, index, value)
        with expect_error(InvalidArgument, member, "4194304"):
            call_method(member, signature, *mended)


@pytest.mark.parametrize("pattern", ['"(?\\x00"', '"(?\\xff"', '"\\x00**"', '"\\ud800("'])
def test_error_messages_escape_characters_that_dbus_forbids(
    client_without_changes: BlockingClient, pattern: str
) -> None:
    """The bus would disconnect the service for an error message with such a character."""
    with pytest.raises(InvalidArgument):
        client_without_changes.list([f"name~={pattern}"])
    assert client_without_changes.stat("base").name == "base"
