r"""Regular expressions from callers, in Go's syntax and with a bound on their time.

containerd's filters are matched by Go's ``regexp``, which is RE2's syntax: Perl's without
backreferences and look-around. The same syntax is accepted here, except for flags that begin in
the middle of an expression, ``U``, and ``\C``. A backtracking engine runs it, so a search that
takes long is stopped: the daemon answers everybody else meanwhile.
"""

from __future__ import annotations

import re
import time

import regex

from snapd_native.errors import InvalidArgument
from snapd_native.model import quote

MAX_PATTERN = 1000
"""Characters in a regular expression."""

MAX_REPEAT = 1000
"""The highest count in a repetition, as in Go."""

SECONDS = 1.0
"""How long all searches for one pattern may take together."""

_LEADING_FLAGS = re.compile(r"\(\?([ims]+)\)")
_GROUP = re.compile(r"\((?:\?(?:P?<[A-Za-z_]\w*>|:))?", re.ASCII)
_REPEAT = re.compile(r"[*+?]\??|\{(\d+)(?:,(\d*))?\}\??", re.ASCII)
_ESCAPE = re.compile(
    r"\\(?:[pP](?:\{\^?\w+\}|[A-Z])|x\{[0-9A-Fa-f]{1,6}\}|x[0-9A-Fa-f]{2}|[0-7]{3}"
    r"|[AbBzdDsSwWafnrtv]|[^A-Za-z0-9])",
    re.ASCII,
)
_CLASS = re.compile(r"\[\^?\]?(?:\[:\^?[a-z]+:\]|\\.|[^\]\\])*\]", re.DOTALL)


class Pattern:
    """A compiled regular expression, matched anywhere in a text."""

    def __init__(self, text: str) -> None:
        """Compile ``text``.

        Raises:
            ValueError: it is not in the syntax; the message says what is wrong.
        """
        if len(text) > MAX_PATTERN:
            raise ValueError(f"it has over {MAX_PATTERN} characters")
        self._text = text
        self._left = SECONDS
        try:
            self._compiled = regex.compile(_translate(text), regex.VERSION0 | regex.ASCII)
        except (regex.error, OverflowError, RecursionError) as error:
            raise ValueError(str(error)) from None

    def search(self, text: str) -> bool:
        """Tell whether the expression matches somewhere in ``text``.

        Raises:
            InvalidArgument: the searches took over `SECONDS` so far.
        """
        start = time.monotonic()
        try:
            return self._compiled.search(text, timeout=self._left, concurrent=True) is not None
        except TimeoutError:
            raise InvalidArgument(
                f"the regular expression {quote(self._text)} takes too long: make it simpler"
            ) from None
        finally:
            self._left = max(0.0, self._left - (time.monotonic() - start))


def _translate(text: str) -> str:
    """Turn Go's syntax into the engine's, refusing what Go refuses."""
    flags, at = "", 0
    if leading := _LEADING_FLAGS.match(text):
        flags, at = leading[1], leading.end()
    out = [f"(?{flags})"] if flags else []
    repeatable = False
    while at < len(text):
        char = text[at]
        found: re.Match[str] | None
        if char == "(":
            found = _GROUP.match(text, at)
            if text.startswith("(?", at) and (found is None or found.end() == at + 1):
                raise ValueError(f"{text[at : at + 3]} is not supported")
        elif char == "\\":
            if text.startswith("\\Q", at):
                end = text.find("\\E", at)
                end = len(text) if end < 0 else end
                out.append(regex.escape(text[at + 2 : end]))
                at, repeatable = end + 2, True
                continue
            found = _ESCAPE.match(text, at)
        elif char == "[":
            found = _CLASS.match(text, at)
        elif char in "*+?" or (char == "{" and _REPEAT.match(text, at)):
            found = _REPEAT.match(text, at)
            if not repeatable:
                raise ValueError(f"nothing to repeat before {char}")
            if found and any(int(count) > MAX_REPEAT for count in found.groups() if count):
                raise ValueError(f"a repetition is over {MAX_REPEAT}")
        else:
            out.append(("\\Z" if "m" not in flags else "$") if char == "$" else _plain(char))
            at, repeatable = at + 1, char not in "|^"
            continue
        if found is None:
            raise ValueError(f"{text[at : at + 2]} is not supported or not closed")
        repeatable = char not in "(*+?{"
        out.append(_rewrite(found[0]))
        at = found.end()
    return "".join(out)


def _plain(char: str) -> str:
    return "\\" + char if char in "{}" else char


def _rewrite(part: str) -> str:
    if part == "\\z":
        return "\\Z"
    if part[:2] in ("\\p", "\\P") and len(part) == 3:
        return f"{part[:2]}{{{part[2]}}}"
    if part.startswith("\\x{"):
        code = int(part[3:-1], 16)
        if code > 0x10FFFF:
            raise ValueError(f"{part} is no character")
        return regex.escape(chr(code))
    return part
