"""Declared forms of records, and what is said of a record that differs."""

from __future__ import annotations

import pytest

from utils.core.record_forms import Each, problem_of

FORM = {
    "name": str,
    "rows": Each({"n": int, "score?": float}),
    "ids?": Each(int, list),
    "limits?": Each({"low": float}, or_null=True),
    "mark": (str, type(None)),
    "size?": Each(int, list, count=2),
    "done?": bool,
}
GOOD = {"name": "a", "rows": {"x": {"n": 1, "score": 2}}, "ids": [1], "limits": {"x": None}, "mark": None, "more": {}}


def test_a_record_of_the_form_has_no_problem():
    assert problem_of(GOOD, FORM) is None
    assert problem_of({"name": "", "rows": {}, "mark": "x"}, FORM) is None


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"name": 3}, "'name' is a whole number; expected text"),
        ({"name": None}, "'name' is null; expected text"),
        ({"rows": []}, "'rows' is a list; expected an object"),
        ({"rows": {"x": 1}}, "'rows' / 'x' is a whole number; expected an object"),
        ({"rows": {"x": {}}}, "'rows' / 'x' has no 'n'"),
        ({"rows": {"x": {"n": True}}}, "'rows' / 'x' / 'n' is true or false; expected a whole number"),
        ({"rows": {"x": {"n": 1.5}}}, "'rows' / 'x' / 'n' is a number; expected a whole number"),
        ({"rows": {"x": {"n": 1, "score": "2"}}}, "'rows' / 'x' / 'score' is text; expected a number"),
        ({"ids": [1, None]}, "'ids' / 1 is null; expected a whole number"),
        ({"limits": {"x": {"low": []}}}, "'limits' / 'x' / 'low' is a list; expected a number"),
        ({"limits": {"x": {"low": None}}}, "'limits' / 'x' / 'low' is null; expected a number"),
        ({"mark": 1}, "'mark' is a whole number; expected text or null"),
        ({"size": [1, 2]}, None),
        ({"size": [1]}, "'size' has 1 values; expected 2"),
        ({"size": [1, 2, 3]}, "'size' has 3 values; expected 2"),
        ({"done": False}, None),
        ({"done": 0}, "'done' is a whole number; expected true or false"),
        ({"rows": {"x": {"n": 1, "score": False}}}, "'rows' / 'x' / 'score' is true or false; expected a number"),
        ({"mark": {1}}, "'mark' is set; expected text or null"),
        ({"rows": {"k" * 60: {}}}, f"'rows' / '{'k' * 60}' has no 'n'"),
        ({"rows": {"k" * 61: {}}}, f"'rows' / '{'k' * 57}'... has no 'n'"),
    ],
)
def test_the_first_difference_is_named_with_its_place(changes, problem):
    assert problem_of(GOOD | changes, FORM) == problem


def test_a_key_that_is_not_there_is_named():
    assert problem_of({"rows": {}, "mark": None}, FORM) == "it has no 'name'"
    assert problem_of([], FORM) == "it is a list; expected an object"
    assert problem_of({}, Each(int, count=1)) == "it has 0 values; expected 1"
    assert problem_of(None, {"a": int}) == "it is null; expected an object"
