r"""Regular expressions from callers, in Go's syntax and with a bound on their time.

containerd's filters use Go's ``regexp``, which has the syntax of RE2: Perl's without backreferences
and look-around. This module accepts the same syntax, except for flags that begin in the middle of
an expression, ``U``, and ``\C``. The engine is a backtracking one, so a search that takes long is
stopped. The daemon serves other callers meanwhile.
"""

from __future__ import annotations

import re
import time
from dataclasses import dataclass

import regex

from snapd_native.errors import InvalidArgument
from snapd_native.model import quote

MAX_PATTERN = 1000
"""Characters in a regular expression at most."""

MAX_REPEAT = 1000
"""The highest count of a repetition, as in Go."""

SECONDS = 1.0
"""Seconds for all searches of one budget together."""

_LEADING_FLAGS = re.compile(r"\(\?([ims]+)\)")
_GROUP = re.compile(r"\((?:\?(?:P?<[A-Za-z_]\w*>|:))?", re.ASCII)
_REPEAT = re.compile(r"[*+?]\??|\{(\d+)(?:,(\d*))?\}\??", re.ASCII)
_CHARACTER = (
    r"\\(?:[pP](?:\{\^?\w+\}|[A-Z])|x\{[0-9A-Fa-f]{1,6}\}|x[0-9A-Fa-f]{2}"
    r"|0[0-7]{0,2}|[1-7][0-7]{1,2}|[dDsSwWafnrtv]|[\x00-/:-@\[-`{-\x7f])"
)
_ESCAPE = re.compile(rf"{_CHARACTER}|\\[AbBz]", re.ASCII)
_CLASS = re.compile(r"\[\^?+\]?+(?:\[:\^?[a-z]+:\]|\\.|[^\]\\])*\]", re.DOTALL)
_ITEM = re.compile(rf"{_CHARACTER}|\[:\^?[a-z]+:\]|[^\\]", re.ASCII | re.DOTALL)

_ASCII = {
    "alnum": "0-9A-Za-z",
    "alpha": "A-Za-z",
    "ascii": r"\x00-\x7f",
    "blank": r"\t ",
    "cntrl": r"\x00-\x1f\x7f",
    "digit": "0-9",
    "graph": "!-~",
    "lower": "a-z",
    "print": " -~",
    "punct": r"!-/:-@\[-`{-~",
    "space": r"\t-\r ",
    "upper": "A-Z",
    "word": "0-9A-Z_a-z",
    "xdigit": "0-9A-Fa-f",
    r"\d": "0-9",
    r"\s": r"\t\n\f\r ",
    r"\w": "0-9A-Z_a-z",
}
"""What a class of Go's contains: ASCII only, while ``\\p`` and case folding are Unicode's."""


@dataclass
class Budget:
    """The seconds that are left for searches, shared by all patterns of a call."""

    left: float = SECONDS


class Pattern:
    """A compiled regular expression, which is searched anywhere in a text."""

    def __init__(self, text: str, budget: Budget | None = None) -> None:
        """Compile ``text``. Searches use ``budget``, or one of their own.

        Raises:
            ValueError: the syntax is wrong; the message says what.
        """
        if len(text) > MAX_PATTERN:
            raise ValueError(f"it has over {MAX_PATTERN} characters")
        self._text = text
        self._budget = budget or Budget()
        try:
            self._compiled = regex.compile(_translate(text), regex.VERSION0)
        except (regex.error, OverflowError, RecursionError) as error:
            raise ValueError(str(error)) from None

    def search(self, text: str) -> bool:
        """Tell whether the expression matches somewhere in ``text``.

        Raises:
            InvalidArgument: the budget is used up.
        """
        start = time.monotonic()
        try:
            return (
                self._compiled.search(text, timeout=self._budget.left, concurrent=True) is not None
            )
        except TimeoutError:
            raise InvalidArgument(
                f"the regular expression {quote(self._text)} takes too long: make it simpler"
            ) from None
        finally:
            self._budget.left = max(0.0, self._budget.left - (time.monotonic() - start))


def _translate(text: str) -> str:
    """Translate Go's syntax to the engine's, and refuse what Go refuses."""
    flags, at = "", 0
    if leading := _LEADING_FLAGS.match(text):
        flags, at = leading[1], leading.end()
    out = [f"(?{flags})"] if flags else []
    repeats = _Repeats()
    while at < len(text):
        char = text[at]
        found: re.Match[str] | None
        if char == "(":
            found = _GROUP.match(text, at)
            if text.startswith("(?", at) and (found is None or found.end() == at + 1):
                raise ValueError(f"{text[at : at + 3]} is not supported")
            repeats.open()
        elif char == "\\":
            if text.startswith("\\Q", at):
                literal = text[at + 2 :].partition("\\E")[0]
                out.append(regex.escape(literal))
                at += len(literal) + 4
                if literal:
                    repeats.atom()
                continue
            found = _ESCAPE.match(text, at)
            repeats.atom()
        elif char == "[":
            found = _CLASS.match(text, at)
            repeats.atom()
        elif char in "*+?" or (char == "{" and _REPEAT.match(text, at)):
            found = _REPEAT.match(text, at)
            repeats.repeat(char, [int(count) for count in found.groups() if count] if found else [])
        else:
            out.append(("\\Z" if "m" not in flags else "$") if char == "$" else _plain(char))
            repeats.plain(char)
            at += 1
            continue
        if found is None:
            raise ValueError(f"{text[at : at + 2]} is not supported or not closed")
        out.append(_class(found[0]) if char == "[" else _rewrite(found[0]))
        at = found.end()
    return "".join(out)


class _Repeats:
    """Counts the repetitions in an expression, and refuses too many.

    The counts of nested repetitions are multiplied, as in Go: the engine needs memory for each.
    """

    def __init__(self) -> None:
        self._most = [1]
        self._last = 0

    def open(self) -> None:
        self._most.append(1)
        self._last = 0

    def atom(self) -> None:
        self._last = 1

    def plain(self, char: str) -> None:
        if char == ")" and len(self._most) > 1:
            self._last = self._most.pop()
            self._most[-1] = max(self._most[-1], self._last)
        else:
            self._last = int(char not in "|^")

    def repeat(self, char: str, counts: list[int]) -> None:
        if not self._last:
            raise ValueError(f"nothing to repeat before {char}")
        total = self._last * max(1, *counts, 1)
        if total > MAX_REPEAT:
            raise ValueError(f"a repetition is over {MAX_REPEAT}, with those inside it")
        self._most[-1] = max(self._most[-1], total)
        self._last = 0


def _plain(char: str) -> str:
    return "\\" + char if char in "{}" else char


def _rewrite(part: str) -> str:
    """Translate a part of an expression that is not a set."""
    if part == "\\z":
        return "\\Z"
    if part in ("\\b", "\\B"):
        word = f"[{_ASCII['word']}]"
        edge = f"(?<={word})(?!{word})|(?<!{word})(?={word})"
        return f"(?:{edge})" if part == "\\b" else f"(?!{edge})"
    if part[0] != "\\":
        return part
    if part.lower() in _ASCII:
        return f"[{'' if part in _ASCII else '^'}{_ASCII[part.lower()]}]"
    return _character(part)


def _class(part: str) -> str:
    """Translate a set in brackets."""
    at = 2 if part[1] == "^" else 1
    out = [part[:at]]
    while at < len(part) - 1:
        item = _item(part, at)
        at += len(item)
        if part[at] != "-" or at == len(part) - 2 or _members(item):
            out.append(_members(item) or _one(item))
            continue
        last = _item(part, at + 1)
        at += 1 + len(last)
        if _members(last):
            raise ValueError(f"{item}-{last} is no range")
        out.append(f"{_one(item)}-{_one(last)}")
    return "".join(out) + "]"


def _item(part: str, at: int) -> str:
    found = _ITEM.match(part, at, len(part) - 1)
    if found is None:
        raise ValueError(f"{part[at : at + 2]} is not supported")
    return found[0]


def _members(item: str) -> str:
    """Return the members of an item of a set; empty if it is one character."""
    if item[:2] in ("\\p", "\\P"):
        return _character(item)
    negated = item.startswith("[:^") or (item[0] == "\\" and item[1].isupper())
    name = (
        item[3:-2] if item.startswith("[:^") else item[2:-2] if item[:2] == "[:" else item.lower()
    )
    if name in _ASCII:
        return _complement(_ASCII[name]) if negated else _ASCII[name]
    if item.startswith("[:"):
        raise ValueError(f"there is no class {item}")
    return ""


def _one(item: str) -> str:
    return _character(item) if item[0] == "\\" else regex.escape(item)


def _complement(members: str) -> str:
    """Return the ranges of all characters that are not in an ASCII class."""
    inside = regex.compile(f"[{members}]")
    ascii_only = "".join(f"\\x{code:02x}" for code in range(128) if not inside.fullmatch(chr(code)))
    return ascii_only + "\\x80-\\U0010ffff"


def _character(part: str) -> str:
    r"""Turn an escape that stands for one character, or ``\p``, into the engine's."""
    kind, rest = part[1], part[2:]
    if kind in "pP":
        return part if len(rest) > 1 else f"\\{kind}{{{rest}}}"
    if kind == "x" or kind.isdigit():
        code = int(rest.strip("{}"), 16) if kind == "x" else int(part[1:], 8)
        if code > 0x10FFFF:
            raise ValueError(f"{part} is no character")
        return f"\\U{code:08x}"
    return part
