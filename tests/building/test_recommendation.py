"""Which candidate is recommended, on hand-made losses."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from utils.building.recommendation import Candidate, recommend, recommend_among
from utils.building.selection_rule import RowUnits
from utils.core.errors import LeakageError, UserError
from utils.numeric.means import mean_interval, paired_interval
from utils.predictions.catalog import Catalog, Member, is_chosen_on_val

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


def test_the_lowest_wins_however_near_a_simpler_one_is():
    """The rule of one standard error took soft voting here, and was worse on test wherever it differed."""
    noise = RNG.normal(0, 0.5, 200)
    found = [
        candidate("soft_voting_ensemble", BASE + noise - noise.mean() + 0.01, method="soft_voting"),
        candidate("stacking_mlp", BASE, method="stacking_mlp"),
        candidate("a", BASE + noise - noise.mean() + 0.02, kind="member"),
    ]
    assert recommend(found)["name"] == "stacking_mlp"
    found.append(candidate("b", BASE - 0.01, kind="member"))
    assert recommend(found)["name"] == "b"


def test_the_fast_one_is_the_cheapest_within_one_standard_error():
    noise = RNG.normal(0, 0.5, 200)
    near = noise - noise.mean() + 0.01
    found = [
        candidate("dear", BASE),
        candidate("near", BASE + near),
        candidate("single", BASE + near * 0.9, kind="member"),
        candidate("far", BASE + 0.2, kind="member"),
    ]
    latencies = {"dear": 90.0, "near": 30.0, "single": 10.0, "far": 1.0}
    chosen = recommend(found, latencies=latencies)
    assert (chosen["name"], chosen["latency_ms"]) == ("dear", 90.0)
    assert (chosen["fast"]["name"], chosen["fast"]["latency_ms"]) == ("single", 10.0)
    assert chosen["fast"]["evidence"]["log_loss"] == pytest.approx((BASE + near * 0.9).mean())
    del latencies["single"]
    assert recommend(found, latencies=latencies)["fast"]["name"] == "near"
    unmeasured = recommend(found)["fast"]
    assert unmeasured == {"name": None, "reason": "no latency is measured", "evidence": None, "latency_ms": None}


def test_rows_of_a_group_count_once_for_the_fast_one():
    """All of the difference lies in 3 of 40 groups: within a standard error of groups, and beyond one of rows."""
    groups = np.arange(200) // 5
    found = [candidate("dear", BASE), candidate("cheap", BASE + np.where(groups < 3, 1.0, -0.045))]
    latencies = {"dear": 9.0, "cheap": 1.0}
    keys = found[0].keys
    alone = recommend(found, latencies=latencies)
    grouped = recommend(found, RowUnits({}, dict(zip(keys, groups.tolist(), strict=True))), latencies)
    assert (alone["fast"]["name"], grouped["fast"]["name"]) == ("dear", "cheap")


def test_the_score_after_selection_is_unbiased_where_the_lowest_is_too_good():
    """20 equal candidates: the lowest of them looks better than any is, and the rule's own score does not."""
    rng = np.random.default_rng(3)
    own, after, held = [], [], 0
    keys = tuple(("train", f"{n:03d}") for n in range(100))
    fold_of = {key: row % 5 for row, key in enumerate(keys)}
    for _ in range(100):
        drawn = rng.gamma(1.0, 0.5, (20, 100))
        found = [Candidate(f"{k:02d}", "ensemble", None, keys, losses, losses < 1) for k, losses in enumerate(drawn)]
        evidence = recommend(found, RowUnits(fold_of, {}))["evidence"]
        own.append(evidence["log_loss"])
        after.append(evidence["after_selection"]["log_loss"])
        low, high = evidence["after_selection"]["log_loss_ci95"]
        held += low <= 0.5 <= high
    standard_error = np.std(after) / 10
    assert abs(np.mean(after) - 0.5) < 2.5 * standard_error
    assert np.mean(own) < 0.5 - 10 * standard_error
    assert held >= 92


def test_what_val_has_chosen_is_not_recommended_without_out_of_fold_rows_either():
    soup = replace(candidate("wise_ft_a", BASE - 0.1, split="val"), chosen_on_val=True)
    voting = candidate("soft_voting_ensemble", BASE, split="val")
    chosen = recommend([soup, voting])
    assert chosen["name"] == "soft_voting_ensemble"
    assert chosen["note"] == "no out-of-fold rows: compared on val rows alone"
    alone = recommend([soup])
    assert alone["name"] == "wise_ft_a"
    assert "val rows have chosen it" in alone["note"]
    with_train = recommend([replace(candidate("b", BASE - 0.1), chosen_on_val=True), candidate("a", BASE)])
    assert (with_train["name"], with_train["note"]) == ("a", None)
    assert with_train["not_compared"] == {"b": "selected on val rows"}


def test_soups_students_and_ensembles_over_them_are_chosen_on_val():
    def member(name, stage):
        checkpoint = {"path": f"{name}.pth", "stage": stage, "sha256": "0"}
        return Member(name, "x", "full", 32, ("a", "b"), (checkpoint,), (), None, None, None, name)

    stages = {"base": "final", "soup": "uniform_soup", "ft": "wise_ft", "student": "distilled", "s1": "snapshot1"}
    found = Catalog({}, ("a", "b"), {}, {name: member(name, stage) for name, stage in stages.items()})
    assert [name for name in stages if is_chosen_on_val(found, [name])] == ["soup", "ft", "student"]
    assert is_chosen_on_val(found, ["base", "soup"])
    assert not is_chosen_on_val(found, ["base", "s1", "gone"])


def test_equals_are_told_apart_by_name_in_whatever_order_they_come():
    twins = [candidate(name, BASE, kind="member") for name in "ba"]
    for found in (twins, twins[::-1]):
        assert (recommend(found)["name"], recommend(found)["best_single"]) == ("a", "a")


def test_the_evidence_is_that_of_the_chosen_one():
    hits = np.arange(200) % 4 > 0
    chosen = recommend([replace(candidate("a", BASE, kind="member"), hits=hits)])
    assert chosen["evidence"]["accuracy"] == 0.75
    assert tuple(chosen["evidence"]["log_loss_ci95"]) == mean_interval(BASE)
    assert chosen["evidence"]["after_selection"] == {
        key: chosen["evidence"][key] for key in ("log_loss", "log_loss_ci95", "accuracy")
    }


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
    assert chosen["not_compared"] == {"b": "100 val rows only"}
    drawn = np.random.default_rng(5).normal(0, 1.1, (20, 100))
    many = [
        Candidate(f"b{n}", "ensemble", "fusion", keys, BASE[100:] + 0.2 - gain, np.ones(100, bool))
        for n, gain in enumerate(drawn)
    ]
    assert any(paired_interval(gain)[0] > 0 for gain in drawn)  # by chance one of 20 looks clearly better
    assert recommend([voting, *many])["name"] == "soft_voting_ensemble"
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
