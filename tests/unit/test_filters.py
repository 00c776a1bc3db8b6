"""containerd's filter language, and Go's regular expressions inside it."""

from __future__ import annotations

import re
import time
from collections.abc import Sequence
from contextlib import suppress

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from snapd_native import patterns
from snapd_native.errors import InvalidArgument
from snapd_native.filters import MATCH_SECONDS, MAX_FIELDS, MAX_FILTER, MAX_FILTERS, parse
from snapd_native.model import Info, Kind
from snapd_native.patterns import Pattern


def info(name: str, labels: dict[str, str] | None = None, parent: str = "", **more: str) -> Info:
    return Info(name, Kind(more.get("kind", "active")), parent, 1, 1, labels or {})


CORPUS = [
    info("foo", {"foo": "true"}),
    info("bar", kind="view"),
    info("foo", {"foo": "present", "more complex label": "present"}),
    info("bar", {"bar": "true"}, kind="committed"),
    info("fooer", {'label with \\ and "': "present"}),
    info("fooer", {'label with \\ and ".post': "present"}),
    info("baz", parent="too complex, yo"),
    info("bazo", parent="abc"),
    info("compound", {"foo": "omg_asdf.asdf-qwer"}),
    info("牛", {"a.b/c": "x", "a.b": "y"}, parent="a/b|c"),
]
ALL = list(range(len(CORPUS)))


def matching(*filters: str) -> list[int]:
    chosen = parse(filters)
    return [number for number, entry in enumerate(CORPUS) if chosen.matches(entry)]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", ALL),
        ("name", ALL),
        ("parent", ALL),
        ("kind", ALL),
        ("nonsense", []),
        ("nonsense==x", []),
        ('nonsense==""', []),
        ("nonsense!=x", ALL),
        ('nonsense!=""', []),
        ("nonsense~=^$", ALL),
        ("nonsense~=/./", []),
        ("labels", []),
        ("labels.foo", [0, 2, 8]),
        ("labels.foo,name", [0, 2, 8]),
        ("labels.foo==true", [0]),
        ('labels.foo==""', []),
        ("labels.foo==omg_asdf.asdf-qwer", [8]),
        ("labels.foo!=true", [1, 2, 3, 4, 5, 6, 7, 8, 9]),
        ("labels.foo~=^$", [1, 3, 4, 5, 6, 7, 9]),
        ("name==bar", [1, 3]),
        ("name!=bar", [0, 2, 4, 5, 6, 7, 8, 9]),
        ("name==bar,labels.bar", [3]),
        ("name==bar,labels.bar==true", [3]),
        ("name==bar,labels.bar==wrong", []),
        ("name.whatever.else==bar", [1, 3]),
        ("kind==view", [1]),
        ("kind!=active", [1, 3]),
        ("kind==View", []),
        ("name==牛", [9]),
        ("name~=牛", [9]),
        ("name~=|牛|", [9]),
        ('parent==""', [0, 1, 2, 3, 4, 5, 8]),
        ('parent=="too complex, yo"', [6]),
        ("parent~=^[abc]+,name!=foo", [7, 9]),
        ("parent~=/[abc]+/,name!=foo", [6, 7, 9]),
        ("parent~=/[abc]{1,2}/,name!=foo", [6, 7, 9]),
        (r'parent~=/[abc]{0,1}"\//', []),
        (r"parent~=/^a\/b/", [9]),
        ("parent~=|^a/b.c$|", [9]),
        (r"parent~=|^a/b\\\|c$|", [9]),
        (r'parent~="^a/b\\|c$"', [9]),
        ('name==foo,labels."more complex label"', [2]),
        (r'labels."label with \\ and \""==present', [4]),
        (r'labels."label with \\ and \"".post==present', [5]),
        ('labels."a.b/c"==x', [9]),
        ('labels.a."b/c"==x', [9]),
        ("labels.a.b==y", [9]),
        ('labels.""', []),
        ('"name"=="bar"', [1, 3]),
        ('"labels".foo', [0, 2, 8]),
        ("name== bar", [1, 3]),
        ("name ==\t\u00a0bar", [1, 3]),
        ("  name\u2003 == bar,\n labels. bar", [3]),
        ("name==a=b!c~d", []),
        ("name==bar.baz/q|", []),
        (r'name=="\x62\141\u0072"', [1, 3]),
        (r'name=="\U0000725b"', [9]),
        (r'name=="\xe7\x89\x9b"', [9]),
        (r'name=="\347\211\233"', [9]),
        (r'name=="\xff"', []),
        (r'name!="\xff\ud800"', ALL),
    ],
)
def test_a_filter_matches_as_in_containerd(text: str, expected: list[int]) -> None:
    assert matching(text) == expected


@pytest.mark.parametrize(
    ("filters", "expected"),
    [
        ([], ALL),
        (["name==bar", "name==baz"], [1, 3, 6]),
        (["nonsense", ""], ALL),
        (["name==bar,kind==view", "labels.foo==true"], [0, 1]),
        (["nonsense"] * MAX_FILTERS, []),
    ],
)
def test_several_filters_are_combined_with_or(filters: Sequence[str], expected: list[int]) -> None:
    assert matching(*filters) == expected


@pytest.mark.parametrize(
    ("text", "position", "what"),
    [
        ("labels.|foo|==x", 8, "a field is quoted"),
        ("labels./foo/==x", 8, "a field is quoted"),
        ('labels.?"more"==present', 8, "expected a field"),
        ("name==foo,", 11, "expected a field"),
        ("labels.", 8, "expected a field"),
        (",name", 1, "expected a field"),
        (" ", 2, "expected a field"),
        ("ä==x", 1, "expected a field"),
        ("'name'==x", 1, "expected a field"),
        ("labels.ns/key==value", 10, "expected ==, != or ~="),
        ("name x", 6, "expected ==, != or ~="),
        ("name ", 6, "expected ==, != or ~="),
        ("name=bar", 5, "expected ==, != or ~="),
        ("name===bar", 5, "expected ==, != or ~="),
        ("name=~bar", 5, "expected ==, != or ~="),
        ("name!bar", 5, "expected ==, != or ~="),
        ("foo\0bar", 4, "expected ==, != or ~="),
        ("image~=,id?=?fbaq", 8, "expected a value"),
        ("name==", 7, "expected a value"),
        ("name==.x", 7, "expected a value"),
        ("name== =x", 8, "expected a value"),
        ("name==a b", 8, "expected a comma"),
        ("name==a ", 8, "expected a comma"),
        ('name=="a"b', 10, "expected a comma"),
        ("name==a\x01", 8, "expected a comma"),
        ("labels.key==/value/", 13, "a value is quoted"),
        ("labels.key!=|value|", 13, "a value is quoted"),
        ('name=="x', 7, "is not closed"),
        ('labels."containerd.io\nkey"==value', 8, "is not closed"),
        ("name~=/x", 7, "is not closed"),
        ('name=="x\\', 10, "unknown escape"),
        (r'labels."\g"', 10, "unknown escape"),
        (r"""name=="\'" """, 9, "unknown escape"),
        (r'name=="\|"', 9, "unknown escape"),
        (r'labels."\xaz"', 11, "expected 2 digits"),
        (r'name=="\1"', 9, "expected 3 digits"),
        (r'name=="\18f"', 9, "expected 3 digits"),
        (r'name=="\400"', 12, r"at most \377"),
        (r'name=="\u00"', 10, "expected 4 digits"),
        (r'name=="\U00110000"', 18, "no such character"),
        ("name==x,parent~=/(/", 17, "the regular expression is wrong"),
    ],
)
def test_a_syntax_error_names_its_position(text: str, position: int, what: str) -> None:
    with pytest.raises(InvalidArgument) as caught:
        parse(["name", text])
    assert f"is wrong at character {position}: " in str(caught.value)
    assert what in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("escape", "char"),
    [
        (r"\a", "\a"),
        (r"\b", "\b"),
        (r"\f", "\f"),
        (r"\n", "\n"),
        (r"\r", "\r"),
        (r"\t", "\t"),
        (r"\v", "\v"),
        (r"\\", "\\"),
        (r"\"", '"'),
        (r"\x41", "A"),
        (r"\101", "A"),
        (r"\uD7FF", "\ud7ff"),
        (r"\uD800", "\ufffd"),
        (r"\uDFFF", "\ufffd"),
        (r"\uE000", "\ue000"),
        (r"\U0010FFFF", "\U0010ffff"),
    ],
)
def test_an_escape_stands_for_the_same_character_as_in_go(escape: str, char: str) -> None:
    chosen = parse([f'name=="{escape}"'])
    assert chosen.matches(info(char))
    assert not chosen.matches(info(chr(ord(char) - 1)))


def test_filters_over_the_size_limit_raise_invalid_argument() -> None:
    assert matching("name==" + "x" * (MAX_FILTER - 6)) == []
    assert matching(",".join(["name==bar"] * 1500)) == [1, 3]
    for filters in (["name==" + "ä" * (MAX_FILTER // 2)], ["name"] * (MAX_FILTERS + 1)):
        with pytest.raises(InvalidArgument):
            parse(filters)


def test_more_fields_in_all_filters_than_allowed_raise_invalid_argument() -> None:
    path = ".".join(["labels"] * 100)
    parse([path] * (MAX_FIELDS // 100))
    for filters in ([path] * (MAX_FIELDS // 100) + ["name"], [",".join(["name"] * 2001)]):
        with pytest.raises(InvalidArgument, match=f"2001 fields .* at most {MAX_FIELDS}"):
            parse(filters)


def test_filters_that_compare_for_too_long_raise_invalid_argument() -> None:
    chosen = parse([",".join(["name==bar"] * 1000)])
    snapshot = info("bar")
    assert chosen.matches(snapshot)
    spent = MATCH_SECONDS - chosen.left
    assert 0 < spent < MATCH_SECONDS
    chosen.left = 0
    # The match that exceeds the limit still succeeds. The next one fails.
    assert chosen.matches(snapshot)
    with pytest.raises(InvalidArgument, match="too long"):
        chosen.matches(snapshot)


def test_time_is_counted_from_the_beginning_to_the_end_of_a_comparison(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    clock = iter([100.0, 100.25])
    chosen = parse(["name==foo"])
    monkeypatch.setattr(time, "thread_time", lambda: next(clock))
    assert chosen.matches(info("foo"))
    assert chosen.left == MATCH_SECONDS - 0.25
    clock = iter([100.0, 100.25])
    budget = patterns.Budget()
    pattern = Pattern("a", budget)
    monkeypatch.setattr(time, "monotonic", lambda: next(clock))
    assert pattern.search("a")
    assert budget.left == patterns.SECONDS - 0.25


@given(st.text() | st.text(alphabet='nameprt.=!~,"/|\\x0() []{}^$*+?', max_size=40))
@example("\ud800")
@example('name=="\ud800"')
@example("name~=" + "(" * 900)
def test_any_text_parses_or_raises_invalid_argument(text: str) -> None:
    with suppress(InvalidArgument):
        parse([text]).matches(info("some name", {"x": "y"}))


NAMES = st.text(st.characters(exclude_categories=["Cs"]), min_size=1)


@given(NAMES, st.text(st.characters(exclude_categories=["Cs"])))
def test_a_quoted_value_matches_only_that_value(name: str, other: str) -> None:
    plain = re.sub(r'([\\"])', r"\\\1", name).replace("\n", r"\n")
    octal = "".join(f"\\{byte:03o}" for byte in name.encode())
    runes = "".join(f"\\U{ord(char):08x}" for char in name)
    for quoted in (plain, octal, runes):
        for text, entry in (
            (f'name=="{quoted}"', info(name)),
            (f'parent=="{quoted}"', info("x", parent=name)),
            (f'labels."{quoted}"', info("x", {name: "y"})),
            (f'labels.l=="{quoted}"', info("x", {"l": name})),
        ):
            assert parse([text]).matches(entry)
        assert parse([f'name=="{quoted}"']).matches(info(other)) == (other == name)
        assert parse([f'name!="{quoted}"']).matches(info(other)) == (other != name)


# Regular expressions.


@pytest.mark.parametrize(
    ("pattern", "matched", "unmatched"),
    [
        ("", ["", "x"], []),
        ("a|", ["", "b"], []),
        ("^b", ["bc"], ["a\nb"]),
        ("a$", ["ba"], ["a\n", "a\nb"]),
        (r"a\z", ["a"], ["a\n"]),
        ("(?m)a$", ["a", "a\nb"], ["ab"]),
        (r"(?m)a\z", ["a"], ["a\nb"]),
        ("(?m)^b", ["a\nb"], ["ab"]),
        (r"(?m)\Ab", ["b"], ["a\nb"]),
        ("a.b", ["axb"], ["a\nb"]),
        ("(?s)a.b", ["a\nb"], []),
        ("(?ims)^A.B$", ["x\na\nb\nx"], []),
        ("(?i)é", ["É"], ["e"]),
        ("(?i)[é-ë]", ["Ê"], ["e"]),
        ("[a-c-e]", ["-", "b", "e"], ["d"]),
        (r"\Qa.(\E+", ["a.((("], ["ab("]),
        (r"x\Q$^", ["x$^"], ["x"]),
        (r"\Q\\E", ["\\"], ["E"]),
        ("x{2,3}y", ["xxy"], ["xy"]),
        ("^x{2,}?$", ["xxx"], ["x"]),
        ("x{,2}", ["x{,2}"], ["xx"]),
        ("x{a}", ["x{a}"], ["x"]),
        ("x{e<=1}", ["x{e<=1}"], ["y"]),
        ("(?P<n>a)(?<m>b)(?:c)", ["abc"], []),
        ("^a??b*?c+?$", ["abbcc", "c"], ["b"]),
        (r"\pL", ["é", "a", "牛"], ["1", " "]),
        (r"\PL", ["1"], ["é"]),
        (r"\p{Lu}", ["É"], ["é"]),
        (r"\p{Greek}", ["\u03b1"], ["a"]),
        (r"\p{^Greek}", ["a"], ["\u03b1"]),
        (r"[\pN\p{Greek}]", ["5", "²", "\u03b1"], ["a"]),
        (r"[^\PL]", ["é"], ["1"]),
        (r"^\w+$", ["a_9"], ["é", ""]),
        (r"^\W$", ["é", "-"], ["a"]),
        (r"\d", ["5"], ["\u0665"]),
        (r"^\D$", ["\u0665"], ["5"]),
        (r"\s", [" ", "\f"], ["\v", "\u00a0"]),
        (r"^\S$", ["\v", "x"], [" "]),
        (r"\bé", ["aé"], ["é", " é"]),
        (r"\Bé", ["é"], ["aé"]),
        (r"^[\d-z]$", ["5", "-", "z"], ["a"]),
        (r"^[\W5]$", ["é", "5"], ["6", "_"]),
        (r"^[^\W5]$", ["6", "a"], ["é", "5"]),
        (r"^[\s-x]$", [" ", "-", "x"], ["a", "0"]),
        (r"[\x41-\x{43}]", ["B"], ["D", "x"]),
        (r"\x{1F600}\x41", ["😀A"], []),
        (r"^\0\12\101\777$", ["\0\nA\u01ff"], []),
        (r"\a\f\n\r\t\v", ["\a\f\n\r\t\v"], []),
        (r"^\.\-\_\~\/\ $", [".-_~/ "], []),
        ("[]a]", ["]"], ["b"]),
        ("^[a-]$", ["a", "-"], ["b", "]"]),
        ("^[^a-]$", ["b"], ["a", "-"]),
        ("^[+--]$", ["+", ",", "-"], ["."]),
        ('^ !"#', [' !"#'], ["", " "]),
        ("[^]a]", ["b"], ["]", "a"]),
        ("[[a]", ["[", "a"], ["]"]),
        ("^[a&&b||c]$", ["&", "|", "a"], ["-"]),
        ("[[:alpha:][:digit:]]", ["a", "5"], ["é", "-"]),
        ("^[[:^alpha:]]$", ["5", "é"], ["a"]),
        ("^[^[:^alpha:]x]$", ["a"], ["x", "5"]),
        ("[:alpha:]", ["p", ":"], ["x"]),
        ("(?i)[[:upper:]]", ["a"], ["5"]),
    ],
)
def test_a_pattern_matches_as_in_go(pattern: str, matched: list[str], unmatched: list[str]) -> None:
    compiled = Pattern(pattern)
    assert [text for text in matched + unmatched if compiled.search(text)] == matched


@pytest.mark.parametrize(
    ("name", "count", "samples"),
    [
        ("alnum", 62, "a9"),
        ("alpha", 52, "aZ"),
        ("ascii", 128, "\0\x7f"),
        ("blank", 2, "\t "),
        ("cntrl", 33, "\x1f\x7f"),
        ("digit", 10, "09"),
        ("graph", 94, "!~"),
        ("lower", 26, "az"),
        ("print", 95, " ~"),
        ("punct", 32, "!/[`~\\"),
        ("space", 6, "\t\v "),
        ("upper", 26, "AZ"),
        ("word", 63, "_aZ9"),
        ("xdigit", 22, "fF9"),
    ],
)
def test_posix_classes_are_ascii(name: str, count: int, samples: str) -> None:
    inside, outside = Pattern(f"[[:{name}:]]"), Pattern(f"[[:^{name}:]]")
    found = {chr(code) for code in range(0x300) if inside.search(chr(code))}
    assert len(found) == count
    assert found >= set(samples)
    assert {chr(code) for code in range(0x300) if not outside.search(chr(code))} == found


@pytest.mark.parametrize(
    "pattern",
    [
        *("(", ")", "a)", "[", "[]", "[^]", "[a", "\\", "(?", "(?P<n", "[z-a]", "[a-\\d]"),
        *("*", "+a", "?", "{2}", "a|*", "(*a)", "(?:+)", "a**", "a*+", "a++", "a{2}{3}", "a???"),
        *("x{1001}", "x{1,1001}", "x{1001,}", "x{2,1}", "(x{100}){11}", "((a{11}){10}){10}"),
        *("(a{500}(b)){3}", "(a{500}b{2}){3}", "((a{10}){10}b{5}){11}", "((a{500}b)c){3}"),
        *("(?=a)", "(?!a)", "(?<=a)", "(?<!a)", "(?>a)", "(?#a)", "(?1)", "(?R)", "(?P=n)"),
        *("(?P>n)", "(?|a)", "(?(1)a)", "(?i:a)", "a(?i)b", "(?U)a", "(?x)a", "(?-i)a", "(?i-s)a"),
        *(r"(a)\1", r"\8", r"\g<1>", r"\k<n>", r"\Z", r"\C", r"\G", r"\K", r"\R", r"\X", r"\h"),
        *(r"\N", r"\L<x>", r"\m", r"\e", r"\c", r"\u0041", r"\é", r"\x4", r"\x{110000}", r"\x{}"),
        *(r"\p{", r"\pl", r"\p{Nonsense}", r"[\b]", r"[\z]", r"[\1]", r"[\q]", r"[\N{DASH}]"),
        *("[[:nonsense:]]", "[a-[:digit:]]", "x" * (patterns.MAX_PATTERN + 1), "(" * 1000),
    ],
)
def test_a_pattern_that_go_refuses_raises_value_error(pattern: str) -> None:
    with pytest.raises(ValueError):
        Pattern(pattern)


@pytest.mark.parametrize(
    "pattern",
    [
        "x" * patterns.MAX_PATTERN,
        "x{1000}",
        "(x{10}){100}",
        "(x{10}y{50}){20}",
        "((x{10}){10}){10}",
        "(x*z){1000}",
    ],
)
def test_a_pattern_at_the_size_limit_is_accepted(pattern: str) -> None:
    assert not Pattern(pattern).search("y")


@pytest.mark.parametrize("pattern", ["(a|aa)+$", "(a+)+$"])
def test_a_catastrophic_pattern_raises_invalid_argument(
    pattern: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(patterns, "SECONDS", 0.05)
    entry = info("a" * 4000 + "!")
    with pytest.raises(InvalidArgument, match="takes too long"):
        parse([f"name~={pattern}"]).matches(entry)


def test_the_time_limit_covers_all_searches_of_a_pattern(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(patterns, "SECONDS", 0.05)
    pattern = Pattern("(a|aa)+$")
    assert pattern.search("aa")
    for text in ("a" * 4000 + "!", "aa"):
        with pytest.raises(InvalidArgument, match="takes too long"):
            pattern.search(text)
