"""containerd's filter language, for List.

A filter is a comma-joined AND of selectors: ``field``, ``field==value``, ``field!=value`` or
``field~=regex``. Field paths are dotted; parts and values may be quoted. Several filters are an
OR. Grammar and quirks are those of containerd's ``pkg/filters``, with two exceptions: a regular
expression that cannot be compiled is an error here, not a filter that matches nothing, and one
that takes too long is stopped.
"""

from __future__ import annotations

import time
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum

from snapd_native.errors import InvalidArgument
from snapd_native.model import Info, quote, shown
from snapd_native.patterns import Budget, Pattern

MAX_FILTER = 16384
"""Bytes of UTF-8 in one filter."""

MAX_FILTERS = 100
"""Filters in one call."""

MAX_FIELDS = 2000
"""Selectors in one call, each counted with the parts of its field path."""

MATCH_SECONDS = 5.0
"""Seconds of processor time for the comparisons of one call, without regular expressions."""

_QUOTES = '/|"'
_OPERATOR = "=!~"
_SPACE = frozenset(" \t\n\v\f\r\x85\u00a0\u1680\u2028\u2029\u202f\u205f\u3000") | frozenset(
    chr(code) for code in range(0x2000, 0x200B)
)
_ESCAPES = {"a": 7, "b": 8, "f": 12, "n": 10, "r": 13, "t": 9, "v": 11, "\\": 92}
_WIDTHS = {"x": 2, "u": 4, "U": 8}


class Operator(Enum):
    """The operator of a selector."""

    PRESENT = ""
    EQUAL = "=="
    NOT_EQUAL = "!="
    MATCHES = "~="


@dataclass(frozen=True, slots=True)
class Selector:
    """One condition on one field."""

    path: tuple[str, ...]
    operator: Operator = Operator.PRESENT
    value: str = ""
    pattern: Pattern | None = None

    def matches(self, info: Info) -> bool:
        """Tell whether the snapshot meets the condition; an absent field has the value ``""``."""
        value = _field(info, self.path)
        if self.pattern is not None:
            return self.pattern.search(value or "")
        if self.operator is Operator.PRESENT:
            return value is not None
        if self.operator is Operator.EQUAL:
            return value == self.value
        return (value or "") != self.value


@dataclass
class Filter:
    """A disjunction of conjunctions, for one call; without any, it matches everything."""

    alternatives: tuple[tuple[Selector, ...], ...] = ()
    left: float = MATCH_SECONDS
    """The seconds of processor time that are left for comparisons."""

    def matches(self, info: Info) -> bool:
        """Tell whether all selectors of one alternative match.

        Raises:
            InvalidArgument: a regular expression takes too long, or all comparisons so far do.
        """
        if not self.alternatives:
            return True
        if self.left < 0:
            raise InvalidArgument("the filters take too long: give fewer of them")
        begun = time.thread_time()
        try:
            return any(all(s.matches(info) for s in selectors) for selectors in self.alternatives)
        finally:
            self.left -= time.thread_time() - begun


def parse(filters: Sequence[str]) -> Filter:
    """Compile ``filters``; none, or an empty one among them, matches everything.

    Raises:
        InvalidArgument: the syntax is wrong; the message shows where.
    """
    if len(filters) > MAX_FILTERS:
        raise InvalidArgument(f"{len(filters)} filters are too many: give at most {MAX_FILTERS}")
    budget = Budget()
    alternatives = tuple(_Parser(text, budget).selectors() for text in filters)
    fields = sum(len(selector.path) for selectors in alternatives for selector in selectors)
    if fields > MAX_FIELDS:
        raise InvalidArgument(
            f"the filters have {fields} fields and parts of fields: give at most {MAX_FIELDS}"
        )
    return Filter(alternatives)


def _field(info: Info, path: tuple[str, ...]) -> str | None:
    # As in containerd's adaptSnapshot, parts after the name of a simple field are ignored.
    match path[0]:
        case "name":
            return info.name
        case "parent":
            return info.parent
        case "kind":
            return info.kind.value
        case "labels":
            return info.labels.get(".".join(path[1:]))
        case _:
            return None


class _Parser:
    def __init__(self, text: str, budget: Budget) -> None:
        if len(text.encode(errors="surrogatepass")) > MAX_FILTER:
            raise InvalidArgument(f"the filter {quote(text, 40)} is over {MAX_FILTER} bytes long")
        self._text = text
        self._budget = budget
        self._at = 0

    def selectors(self) -> tuple[Selector, ...]:
        if not self._text:
            return ()
        found = [self._selector()]
        while self._at < len(self._text):
            if self._text[self._at] != ",":
                raise self._error("expected a comma")
            self._at += 1
            found.append(self._selector())
        return tuple(found)

    def _selector(self) -> Selector:
        path = [self._part()]
        while self._peek() == ".":
            self._at += 1
            path.append(self._part())
        if self._peek() in ("", ","):
            return Selector(tuple(path))
        operator = self._operator()
        start = self._at
        value = self._value(operator)
        if operator is not Operator.MATCHES:
            return Selector(tuple(path), operator, value)
        try:
            return Selector(tuple(path), operator, value, Pattern(value, self._budget))
        except ValueError as error:
            self._at = start
            raise self._error(f"the regular expression is wrong: {shown(str(error))}") from None

    def _part(self) -> str:
        self._skip_space()
        if self._peek() and self._peek() in _QUOTES:
            if self._peek() != '"':
                raise self._error('a field is quoted with "')
            return self._quoted()
        start = self._at
        while self._at < len(self._text) and _is_field(self._text[self._at]):
            self._at += 1
        if start == self._at:
            raise self._error("expected a field")
        return self._text[start : self._at]

    def _operator(self) -> Operator:
        self._skip_space()
        start = self._at
        while self._peek() and self._peek() in _OPERATOR:
            self._at += 1
        found = self._text[start : self._at]
        if found not in ("==", "!=", "~="):
            self._at = start
            raise self._error("expected ==, != or ~=")
        return Operator(found)

    def _value(self, operator: Operator) -> str:
        self._skip_space()
        first = self._peek()
        if first and first in _QUOTES:
            if first != '"' and operator is not Operator.MATCHES:
                raise self._error('a value is quoted with ", only a regular expression with / or |')
            return self._quoted()
        if not first or first in ",." or first in _OPERATOR:
            raise self._error("expected a value")
        start = self._at
        self._at += 1
        while self._at < len(self._text) and _is_value(self._text[self._at]):
            self._at += 1
        return self._text[start : self._at]

    def _quoted(self) -> str:
        start, quote_mark = self._at, self._text[self._at]
        self._at += 1
        value = bytearray()
        while (char := self._peek()) != quote_mark:
            if char in ("", "\n"):
                self._at = start
                raise self._error("the quotation is not closed")
            self._at += 1
            if char == "\\":
                value += self._escape(quote_mark)
            else:
                value += char.encode(errors="surrogatepass")
        self._at += 1
        # Escapes can contain bytes that are not UTF-8; no name or label is equal to them.
        return value.decode(errors="surrogateescape")

    def _escape(self, quote_mark: str) -> bytes:
        char = self._peek()
        self._at += 1
        if char == quote_mark:
            return char.encode()
        if char in _ESCAPES:
            return bytes([_ESCAPES[char]])
        if char and char in "01234567":
            self._at -= 1
            code = self._digits(3, 8)
            if code > 255:
                raise self._error("an octal escape is at most \\377")
            return bytes([code])
        if char not in _WIDTHS:
            self._at -= 1
            raise self._error("unknown escape")
        code = self._digits(_WIDTHS[char], 16)
        if char == "x":
            return bytes([code])
        if code > 0x10FFFF:
            raise self._error("there is no such character")
        return ("\ufffd" if 0xD800 <= code < 0xE000 else chr(code)).encode()

    def _digits(self, count: int, base: int) -> int:
        digits = self._text[self._at : self._at + count]
        allowed = "0123456789abcdefABCDEF" if base == 16 else "01234567"
        if len(digits) < count or any(digit not in allowed for digit in digits):
            raise self._error(f"expected {count} digits")
        self._at += count
        return int(digits, base)

    def _peek(self) -> str:
        return self._text[self._at : self._at + 1]

    def _skip_space(self) -> None:
        while self._peek() in _SPACE:
            self._at += 1

    def _error(self, what: str) -> InvalidArgument:
        return InvalidArgument(
            f"the filter {quote(self._text, 200)} is wrong at character {self._at + 1}: {what}"
        )


def _is_field(char: str) -> bool:
    return char.isascii() and (char.isalnum() or char == "_")


def _is_value(char: str) -> bool:
    return char != "," and char not in _SPACE and unicodedata.category(char)[0] in "LMNPSZ"
