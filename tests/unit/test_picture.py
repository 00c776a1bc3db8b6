"""The picture of a terminal in the README."""

from __future__ import annotations

import xml.etree.ElementTree as ET

from tools.picture import picture


def test_a_picture_shows_its_title_and_each_line_of_the_text() -> None:
    root = ET.fromstring(picture("make <demo>", "a & b\n\n  \u2514 c\n"))  # noqa: S314
    shown = [text.text or "" for text in root.iter("{http://www.w3.org/2000/svg}text")]
    assert shown == ["make <demo>", "a & b", "", "  \u2514 c"]


def test_a_picture_is_as_wide_as_its_longest_line() -> None:
    short, long = (ET.fromstring(picture("", "x" * length)) for length in (10, 90))  # noqa: S314
    width = [int(root.attrib["viewBox"].split()[2]) for root in (short, long)]
    assert width[1] - width[0] == 80 * 7.5
