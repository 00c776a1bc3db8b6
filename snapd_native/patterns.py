r"""Regular expressions from callers, in Go's syntax and with a bound on their time.

containerd's filters use Go's ``regexp``, which has the syntax of RE2: Perl's without backreferences
and look-around. This module accepts the same syntax, except for flags that begin in the middle of
an expression, ``U``, and ``\C``. The engine is a backtracking one, so a search that takes long is
stopped. The daemon serves other callers meanwhile.

RE2 itself would need no translation and no limit, but Debian 12 does not package its binding for
Python (Debian 13 does: python3-re2), and two engines would differ. So the translation stays until
Debian 12 is dropped.
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
_CHARACTER = (
    r"\\(?:[pP](?:\{\^?\w+\}|[A-Z])|x\{[0-9A-Fa-f]{1,6}\}|x[0-9A-Fa-f]{2}"
    r"|0[0-7]{0,2}|[1-7][0-7]{1,2}|[dDsSwWafnrtv]|[\x00-/:-@\[-`{-\x7f])"
)
_TOKEN = re.compile(
    r"(?P<quoted>\\Q(?P<literal>.*?)(?:\\E|\Z))"
    rf"|(?P<escape>{_CHARACTER}|\\[AbBz])"
    r"|(?P<set>\[\^?+\]?+(?:\[:\^?[a-z]+:\]|\\.|[^\]\\])*\])"
    r"|(?P<repeat>[*+?]\??|\{(?P<least>\d+)(?:,(?P<most>\d*))?\}\??)"
    r"|(?P<group>\((?:\?(?:P?<[A-Za-z_]\w*>|:)|(?!\?)))"
    r"|(?P<plain>[^\\\[(])",
    re.ASCII | re.DOTALL,
)
_ITEM = rf"({_CHARACTER}|\[:\^?[a-z]+:\]|[^\\])"
_RANGE = re.compile(rf"{_ITEM}(?:-{_ITEM})?", re.ASCII | re.DOTALL)

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
    """Translate Go's syntax to the engine's, and refuse what Go refuses.

    The counts of nested repetitions are multiplied, as in Go: the engine needs memory for each.
    """
    leading = _LEADING_FLAGS.match(text)
    out, at = ([leading[0]], leading.end()) if leading else ([], 0)
    end = "$" if leading and "m" in leading[1] else "\\Z"
    # The highest count in each open group, and the count in what was last; 0 cannot be repeated.
    counts, last = [1], 0
    while at < len(text):
        token = _TOKEN.match(text, at)
        if token is None:
            raise ValueError(f"{text[at : at + 3]} is not supported or not closed")
        part, at = token[0], token.end()
        match token.lastgroup:
            case "quoted":
                out.append(regex.escape(token["literal"]))
                last = 1 if token["literal"] else last
            case "escape" | "set":
                out.append(_escape(part) if part[0] == "\\" else _set(part))
                last = 1
            case "repeat":
                out.append(part)
                if not last:
                    raise ValueError(f"nothing to repeat before {part[0]}")
                counts[-1] = max(counts[-1], last * _count(token))
                if counts[-1] > MAX_REPEAT:
                    raise ValueError(f"a repetition is over {MAX_REPEAT}, with those inside it")
                last = 0
            case "group":
                out.append(part)
                counts.append(1)
                last = 0
            case _:
                out.append(end if part == "$" else "\\" + part if part in "{}" else part)
                last = int(part not in "|^")
                if part == ")" and len(counts) > 1:
                    last = counts.pop()
                    counts[-1] = max(counts[-1], last)
    return "".join(out)


def _count(repeat: re.Match[str]) -> int:
    return max([1, *(int(count) for count in (repeat["least"], repeat["most"]) if count)])


def _escape(part: str) -> str:
    """Translate an escape that is not in a set."""
    if part == "\\z":
        return "\\Z"
    if part in ("\\b", "\\B"):
        word = f"[{_ASCII['word']}]"
        edge = f"(?<={word})(?!{word})|(?<!{word})(?={word})"
        return f"(?:{edge})" if part == "\\b" else f"(?!{edge})"
    if part.lower() in _ASCII:
        return f"[{'' if part in _ASCII else '^'}{_ASCII[part.lower()]}]"
    return _character(part)


def _set(part: str) -> str:
    """Translate a set in brackets."""
    at = 2 if part[1] == "^" else 1
    out = [part[:at]]
    while at < len(part) - 1:
        found = _RANGE.match(part, at, len(part) - 1)
        if found is None:
            raise ValueError(f"{part[at : at + 2]} is not supported")
        first, last = found.groups()
        if members := _members(first):
            # What follows is no range.
            out.append(members)
            at = found.end(1)
            continue
        if last and _members(last):
            raise ValueError(f"{found[0]} is no range")
        out.append("-".join(_one(item) for item in (first, last) if item))
        at = found.end()
    return "".join(out) + "]"


def _members(item: str) -> str:
    """Return the members of an item of a set; empty if it is one character."""
    if item[:2] in ("\\p", "\\P"):
        return _character(item)
    is_posix = item.startswith("[:")
    name = item[2:-2].lstrip("^") if is_posix else item.lower()
    if name in _ASCII:
        negated = item[2] == "^" if is_posix else item[1].isupper()
        return _complement(_ASCII[name]) if negated else _ASCII[name]
    if is_posix:
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
