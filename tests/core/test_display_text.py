"""Text and numbers as a page shows them."""

from __future__ import annotations

import pytest

from utils.core.display_text import (
    first_names,
    format_count,
    format_interval,
    format_number,
    format_percent,
    join_names,
    printable,
)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("plain ü 漢", "plain ü 漢"),
        ("a\nb\tc", "a\\nb\\tc"),
        ("caf\udce9", "caf\\xe9"),
        ("\ud800", "\\ud800"),
        ("a\u202eb", "a\\u202eb"),
        ("\x00\x1b[1m", "\\x00\\x1b[1m"),
        ("<b>&", "<b>&"),
        (3, "3"),
    ],
)
def test_what_cannot_be_seen_is_written_out(text, expected):
    assert printable(text) == expected
    printable(text).encode("utf-8")


def test_numbers_and_lists():
    assert (format_number(0.12345), format_number(None), format_number(2, 1)) == ("0.1235", "not measured", "2.0")
    assert (format_percent(0.1234), format_percent(None)) == ("12.3%", "not measured")
    assert (format_interval([0.1, 0.25], 2), format_interval(None)) == ("[0.10, 0.25]", "")
    assert join_names([]) == ""
    assert join_names(["a"]) == "a"
    assert join_names(["a", "b", "c"]) == "a, b and c"
    assert join_names(["a", "b", "c"], 1) == "a and 2 more"


def test_of_many_names_the_first_are_listed_and_the_others_counted():
    assert first_names(["a", "b", "c"], 3) == "a, b, c"
    assert first_names(["a", "b", "c", "d", "e"], 3) == "a, b, c and 2 more"
    assert (format_count(1, "row"), format_count(1200, "row")) == ("1 row", "1,200 rows")
