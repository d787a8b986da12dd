"""Which models are evaluated, and how one that fails is left out."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest

from utils.core.errors import UserError
from utils.evaluation import scoring


def members(*names):
    return [SimpleNamespace(name=name, views=()) for name in names]


def failing(*names):
    """An action that fails for these members, and notes for whom it ran."""
    calls = []

    def action(some):
        calls.append([member.name for member in some])
        bad = [member.name for member in some if member.name in names]
        if bad:
            raise UserError(f"member {bad[0]}: broken")

    return action, calls


def test_an_action_runs_once_for_all_members():
    action, calls = failing()
    assert scoring.for_each_member(members("a", "b"), action) == {}
    assert calls == [["a", "b"]]


def test_a_member_that_fails_is_left_out_alone():
    action, calls = failing("b")
    assert scoring.for_each_member(members("a", "b", "c"), action) == {"b": "broken"}
    assert calls == [["a", "b", "c"], ["a"], ["b"], ["c"]]


def test_the_first_error_is_raised_where_all_fail():
    action, _ = failing("a", "b")
    with pytest.raises(UserError, match="member a"):
        scoring.for_each_member(members("a", "b"), action)
    with pytest.raises(UserError, match="member a"):
        scoring.for_each_member(members("a"), action)


def test_logits_that_are_not_finite_name_the_member_the_split_and_the_first_row():
    logits = np.zeros((3, 2), dtype=np.float32)
    scoring.require_finite("a", "test", logits, np.array(["x", "y", "z"]))
    logits[1, 0] = np.inf
    with pytest.raises(UserError) as raised:
        scoring.require_finite("a", "test", logits, np.array(["x", "y", "z"]))
    assert {"a", "test", "y."} <= {word.strip(":,") for word in str(raised.value).split()}


def test_members_of_ensembles_are_scored_beside_the_selected_ones():
    catalog = SimpleNamespace(members={member.name: member for member in members("a", "b", "c", "d")})
    saved = {"votes": SimpleNamespace(members=("c", "b", "removed"))}
    assert list(scoring.members_to_score(catalog, members("a"), saved)) == ["a", "b", "c"]
