"""Regular expressions are searched in a process of their own, whose time is limited."""

from __future__ import annotations

import re

import pytest

from utils import patterns
from utils.patterns import PatternError, captured

NAMES = ["p1_a.png", "p22_b.png", "x.png", "caf\udce9_p3_.png", "new\nline_p4_", "\u65e5_p5_", ""]


def test_it_captures_what_re_captures():
    for pattern in ("^p([0-9]+)_", "(p)?[0-9]", "_(.*)$", "([^_]*)", "(\udce9)"):
        matches = [re.search(pattern, name) for name in NAMES]
        assert captured(pattern, NAMES) == [match and match.group(1) for match in matches]


def test_a_search_that_does_not_end_is_an_error_with_an_example(monkeypatch):
    monkeypatch.setattr(patterns, "SECONDS", 0.5)
    with pytest.raises(PatternError, match=r"does not end within .* on 1 file names; .* such as"):
        captured("^(?:a+)+(x)$", ["a" * 60 + "!"])


def test_an_expression_that_fails_in_the_process_is_an_error():
    with pytest.raises(PatternError, match="cannot be searched for"):
        captured("(", ["a"])
