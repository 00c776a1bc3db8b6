"""Draw a text as the output of a command on a terminal.

usage: python -m tools.picture TITLE <TEXT >PICTURE
"""

from __future__ import annotations

import sys
from html import escape

_CHARACTER, _LINE = 7.5, 17
"""The size of a character, in pixels, at a font size of 12.5."""

_MARGIN, _BAR = 16, 30


def picture(title: str, text: str) -> str:
    """Return an SVG document that shows ``text`` in a window with a title."""
    rows = text.expandtabs().splitlines()
    width = round(max(map(len, [title, *rows])) * _CHARACTER) + 2 * _MARGIN
    height = _BAR + len(rows) * _LINE + _MARGIN
    lines = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" role="img"'
        f' aria-label="{escape(title)}" font-family="monospace" font-size="12.5" fill="#d8dee9">',
        f'<rect width="{width}" height="{height}" rx="8" fill="#20262e"/>',
        f'<text x="{_MARGIN}" y="20" fill="#8a94a3">{escape(title)}</text>',
    ]
    for number, row in enumerate(rows, 1):
        y = _BAR + number * _LINE - 4
        lines.append(f'<text x="{_MARGIN}" y="{y}" xml:space="preserve">{escape(row)}</text>')
    return "\n".join([*lines, "</svg>", ""])


if __name__ == "__main__":
    sys.stdout.write(picture(sys.argv[1], sys.stdin.read()))
