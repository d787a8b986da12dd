"""Which candidate is recommended, on hand-made losses."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from utils.building.recommendation import Candidate, recommend, recommend_among
from utils.core.errors import LeakageError, UserError
from utils.predictions.catalog import Catalog, Member

RNG = np.random.default_rng(0)
BASE = RNG.gamma(1.0, 0.3, 200)


def candidate(name, losses, *, kind="ensemble", method=None, split="train", count=200):
    keys = tuple((split if n < count // 2 else "val", f"a/{n}.png") for n in range(count))
    return Candidate(name, kind, method, keys, losses[:count], np.ones(count, dtype=bool))


def test_the_lowest_loss_wins_when_it_stands_apart():
    found = [
        candidate("soft_voting_ensemble", BASE + 0.1, method="soft_voting"),
        candidate("logit_averaging_ensemble", BASE, method="logit_averaging"),
        candidate("a", BASE + 0.2, kind="member"),
    ]
    chosen = recommend(found)
    assert chosen["name"] == "logit_averaging_ensemble"
    assert chosen["best_single"] == "a"
    assert chosen["evidence"]["log_loss"] == pytest.approx(BASE.mean())
    assert chosen["evidence"] | {"rows": "oof+val", "n": 200} == chosen["evidence"]


def test_the_simplest_within_one_standard_error_is_preferred():
    noise = RNG.normal(0, 0.5, 200)
    found = [
        candidate("soft_voting_ensemble", BASE + noise - noise.mean() + 0.01, method="soft_voting"),
        candidate("logit_averaging_ensemble", BASE, method="logit_averaging"),
    ]
    chosen = recommend(found)
    assert chosen["name"] == "soft_voting_ensemble"
    assert "simplest within one standard error" in chosen["reason"]
    # Of the mean of the difference, not of a single row: 0.1 is three of these and a fifth of those.
    found[0] = candidate("soft_voting_ensemble", BASE + noise - noise.mean() + 0.1, method="soft_voting")
    assert recommend(found)["name"] == "logit_averaging_ensemble"


def test_a_single_member_wins_only_by_being_lowest():
    near = candidate("a", BASE + RNG.normal(0, 0.5, 200) * 0.01, kind="member")
    voting = candidate("soft_voting_ensemble", BASE + 0.1, method="soft_voting")
    assert recommend([near, voting])["name"] == "a"
    better = candidate("soft_voting_ensemble", BASE - 0.05, method="soft_voting")
    assert recommend([near, better])["name"] == "soft_voting_ensemble"


def test_a_member_is_never_the_simpler_ensemble():
    noise = RNG.normal(0, 0.5, 200)
    near = candidate("a", BASE + noise - noise.mean() + 0.01, kind="member")
    assert recommend([near, candidate("fusion_x", BASE, method="fusion")])["name"] == "fusion_x"


def test_equals_are_told_apart_by_name_in_whatever_order_they_come():
    twins = [candidate(name, BASE, kind="member") for name in "ba"]
    for found in (twins, twins[::-1]):
        assert (recommend(found)["name"], recommend(found)["best_single"]) == ("a", "a")


def test_the_evidence_is_that_of_the_chosen_one():
    hits = np.arange(200) % 4 > 0
    chosen = recommend([replace(candidate("a", BASE, kind="member"), hits=hits)])
    error = 1.96 * BASE.std(ddof=1) / np.sqrt(200)
    assert chosen["evidence"]["accuracy"] == 0.75
    assert chosen["evidence"]["log_loss_ci95"] == pytest.approx([BASE.mean() - error, BASE.mean() + error])


def test_val_only_candidates_must_be_clearly_better():
    voting = candidate("soft_voting_ensemble", BASE + 0.2, method="soft_voting")
    val = np.concatenate([np.full(100, 9.0), BASE[100:] + 0.1])  # its train rows do not exist
    keys = tuple(("val", f"a/{n}.png") for n in range(100, 200))
    clear = Candidate("b", "ensemble", "fusion", keys, val[100:], np.ones(100, dtype=bool))
    chosen = recommend([voting, clear])
    assert chosen["name"] == "b"
    assert (chosen["evidence"]["rows"], chosen["evidence"]["n"]) == ("val", 100)
    unclear = Candidate("b", "ensemble", "fusion", keys, BASE[100:] + 0.2 + RNG.normal(0, 1, 100), np.ones(100, bool))
    chosen = recommend([voting, unclear])
    assert chosen["name"] == "soft_voting_ensemble"
    assert (chosen["evidence"]["rows"], chosen["evidence"]["n"]) == ("oof+val", 200)
    single = Candidate("b", "ensemble", "fusion", keys[:1], np.zeros(1), np.ones(1, dtype=bool))
    assert recommend([voting, single])["name"] == "soft_voting_ensemble"  # one row shows no spread


def test_without_oof_all_are_compared_on_val():
    found = [candidate(name, BASE + k, split="val", method="soft_voting") for k, name in enumerate("xy")]
    assert recommend(found)["evidence"]["rows"] == "val"
    assert recommend(found)["name"] == "x"


def test_nothing_in_common_is_said():
    keys = (("train", "z"),)
    stranger = Candidate("z", "ensemble", None, keys, np.ones(1), np.ones(1, dtype=bool))
    with pytest.raises(UserError, match="no row on which all"):
        recommend([candidate("x", BASE), stranger])


@pytest.mark.parametrize(
    ("statements", "words", "command"),
    [
        ({}, "no member is selected. Name some in backbones.include", False),
        ({"base": "train"}, ": base. Give a member out-of-fold predictions", False),
        ({"base": "train", "far": "all"}, "discover --trained-on far=STATEMENT", True),
    ],
)
def test_without_rows_a_statement_is_proposed_for_declared_members_alone(statements, words, command):
    members = {
        name: Member(name, "timm:x", "full", 32, ("a", "b"), (), (), None, None, None, name, trained_on=statement)
        for name, statement in statements.items()
    }
    with pytest.raises(LeakageError) as error:
        recommend_among(Catalog({}, ("a", "b"), {}, members), {name: [] for name in members}, [])
    assert words in str(error.value)
    assert ("--trained-on" in str(error.value)) == command
