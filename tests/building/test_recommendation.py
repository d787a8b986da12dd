"""Which candidate is recommended, on hand-made losses."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from conftest import PROJECT
from given_predictions import CONFIG, NAMES, empty_workspace, take_in, write

from utils.building import build_commands, ensembles
from utils.building.ensembles import Crossfit, Ensemble, Provenance
from utils.building.recommendation import Candidate, recommend, recommend_among, recommended
from utils.building.selection_rule import RowUnits
from utils.core.config_file import load_config
from utils.core.errors import LeakageError, UserError
from utils.numeric.means import mean_interval, paired_interval
from utils.numeric.metrics import log_loss_per_row, softmax
from utils.predictions import catalog
from utils.predictions.catalog import Catalog, Member, is_chosen_on_val
from utils.predictions.rows import MemberRows
from utils.predictions.store import Store

RNG = np.random.default_rng(0)
BASE = RNG.gamma(1.0, 0.3, 200)


def candidate(name, losses, *, kind="ensemble", split="train", count=200):
    keys = tuple((split if n < count // 2 else "val", f"a/{n}.png") for n in range(count))
    return Candidate(name, kind, keys, losses[:count], np.ones(count, dtype=bool))


def test_the_lowest_loss_wins_when_it_stands_apart():
    found = [
        candidate("soft_voting_ensemble", BASE + 0.1),
        candidate("logit_averaging_ensemble", BASE),
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
        candidate("soft_voting_ensemble", BASE + noise - noise.mean() + 0.01),
        candidate("stacking_mlp", BASE),
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
        found = [Candidate(f"{k:02d}", "ensemble", keys, losses, losses < 1) for k, losses in enumerate(drawn)]
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


def member(name, stage="final", statement="train", **more):
    checkpoint = {"path": f"{name}.pth", "stage": stage, "sha256": "0"}
    values = (name, "x", "full", 32, ("a", "b"), (checkpoint,), (), None, None, None, name)
    return Member(*values, trained_on=statement, **more)


def catalog_of(*members):
    return Catalog({}, ("a", "b"), {}, {each.name: each for each in members})


def test_soups_students_and_ensembles_over_them_are_chosen_on_val():
    stages = {"base": "final", "soup": "uniform_soup", "ft": "wise_ft", "student": "distilled", "s1": "snapshot1"}
    found = catalog_of(*(member(name, stage) for name, stage in stages.items()))
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
    voting = candidate("soft_voting_ensemble", BASE + 0.2)
    val = np.concatenate([np.full(100, 9.0), BASE[100:] + 0.1])  # its train rows do not exist
    keys = tuple(("val", f"a/{n}.png") for n in range(100, 200))
    clear = Candidate("b", "ensemble", keys, val[100:], np.ones(100, dtype=bool))
    chosen = recommend([voting, clear])
    assert chosen["name"] == "b"
    assert (chosen["evidence"]["rows"], chosen["evidence"]["n"]) == ("val", 100)
    unclear = Candidate("b", "ensemble", keys, BASE[100:] + 0.2 + RNG.normal(0, 1, 100), np.ones(100, bool))
    chosen = recommend([voting, unclear])
    assert chosen["name"] == "soft_voting_ensemble"
    assert (chosen["evidence"]["rows"], chosen["evidence"]["n"]) == ("oof+val", 200)
    assert chosen["not_compared"] == {"b": "100 val rows only"}
    drawn = np.random.default_rng(5).normal(0, 1.1, (20, 100))
    many = [
        Candidate(f"b{n}", "ensemble", keys, BASE[100:] + 0.2 - gain, np.ones(100, bool))
        for n, gain in enumerate(drawn)
    ]
    assert any(paired_interval(gain)[0] > 0 for gain in drawn)  # by chance one of 20 looks clearly better
    assert recommend([voting, *many])["name"] == "soft_voting_ensemble"
    single = Candidate("b", "ensemble", keys[:1], np.zeros(1), np.ones(1, dtype=bool))
    assert recommend([voting, single])["name"] == "soft_voting_ensemble"  # one row shows no spread


def test_without_oof_all_are_compared_on_val():
    found = [candidate(name, BASE + k, split="val") for k, name in enumerate("xy")]
    assert recommend(found)["evidence"]["rows"] == "val"
    assert recommend(found)["name"] == "x"


def test_nothing_in_common_is_said():
    keys = (("train", "z"),)
    stranger = Candidate("z", "ensemble", keys, np.ones(1), np.ones(1, dtype=bool))
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


@pytest.mark.parametrize(("kind", "rows"), [("member", "oof+val"), ("ensemble", "val")])
def test_train_rows_decide_unless_members_alone_have_some_beside_ensembles(kind, rows):
    other = replace(on_val("b", BASE[100:] + 0.1), kind=kind)
    assert recommend([candidate("a", BASE, kind="member"), other])["evidence"]["rows"] == rows
    assert recommend([other])["evidence"]["rows"] == "val"


LABELS = np.arange(60) % 2
KEYS = [("train", f"{n:02d}") for n in range(60)]
TRUE_CLASS = (np.arange(60), LABELS)


def rows_of(margin, split="train"):
    """A member's rows with this log-odds of the true class."""
    logits = np.outer(margin * np.ones(60), [0.5, -0.5]) * np.where(LABELS == 0, 1, -1)[:, None]
    ids = np.array([sample_id for _, sample_id in KEYS])
    return [MemberRows(split, ("a", "b"), ids, LABELS, logits, np.ones(60, dtype=bool))]


def crossfitted(name, margin, *, members=("m",), candidates=None, unknown=()):
    """An ensemble and its cross-fitted predictions on three folds of 20 successive rows."""
    provenance = Provenance((), (), unknown)
    ensemble = Ensemble(name, "stacking_mlp", members, candidates or members, ("a", "b"), None, provenance, "", {}, 0)
    (rows,) = rows_of(margin)
    split, fold = np.full(60, "train"), np.arange(60) // 20
    return ensemble, Crossfit(softmax(rows.logits), LABELS, rows.sample_ids, split, fold)


def candidate_of(name, kind, margin):
    probabilities = softmax(rows_of(margin)[0].logits)
    return Candidate(name, kind, tuple(KEYS), log_loss_per_row(probabilities, LABELS), probabilities[TRUE_CLASS] > 0.5)


def test_members_and_ensembles_are_compared_on_their_folds_and_groups():
    first, second, third = np.random.default_rng(2).normal(1, 2, (3, 60))
    groups = dict(zip(KEYS, (np.arange(60) // 3).tolist(), strict=True))
    fold_of = dict(zip(KEYS, (np.arange(60) // 20).tolist(), strict=True))
    found = recommend_among(
        catalog_of(member("m")),
        {"m": rows_of(first)},
        [crossfitted("x", second), crossfitted("y", third)],
        groups,
        {"m": 2.0},
    )
    candidates = [
        candidate_of(name, kind, margin)
        for name, kind, margin in (("m", "member", first), ("x", "ensemble", second), ("y", "ensemble", third))
    ]
    assert found == recommend(candidates, RowUnits(fold_of, groups), {"m": 2.0})
    assert found["best_single"] == "m"
    for units in (RowUnits({}, groups), RowUnits(fold_of, {})):
        assert found["evidence"] != recommend(candidates, units)["evidence"]


def test_what_may_have_been_trained_on_the_rows_is_never_recommended():
    """Each of the other candidates is far better on its rows, and is left out."""
    known = catalog_of(member("m"), member("leak", statement="unknown"), member("soup", "uniform_soup"), member("none"))
    parts = {"m": rows_of(1.0), "leak": rows_of(9.0), "soup": rows_of(9.0), "none": []}
    crossfits = [
        crossfitted("of_leak", 9.0, unknown=("leak",)),
        crossfitted("of_soup", 9.0, members=("m", "soup")),
        crossfitted("selected_among_soups", 9.0, members=("m",), candidates=("m", "soup")),
        crossfitted("good", 2.0),
    ]
    found = recommend_among(known, parts, crossfits)
    assert (found["name"], found["best_single"]) == ("good", "m")
    selected = dict.fromkeys(("soup", "of_soup", "selected_among_soups"), "selected on val rows")
    assert found["not_compared"] == selected
    with pytest.raises(LeakageError, match="the training data of leak is not stated"):
        recommend_among(known, {"leak": rows_of(9.0)}, crossfits[:1])


def test_of_equals_the_member_is_recommended():
    found = [candidate("a", BASE), candidate("z", BASE, kind="member")]
    assert recommend(found)["name"] == "z"


@pytest.mark.parametrize(("errors", "has_interval"), [(2, False), (3, True)])
def test_the_interval_of_a_loss_needs_three_errors(errors, has_interval):
    only = replace(candidate("a", BASE), hits=np.arange(200) >= errors)
    assert (recommend([only])["evidence"]["log_loss_ci95"] is not None) == has_interval


def on_val(name, losses, rows=range(100, 200)):
    """A candidate with val rows alone."""
    return Candidate(name, "ensemble", tuple(("val", f"a/{n}.png") for n in rows), losses, np.ones(len(losses), bool))


def test_of_clearly_better_ones_on_val_the_best_is_recommended_and_an_equal_one_is_not():
    winner = candidate("a", BASE + 0.2)
    clear = [on_val(name, BASE[100:] + loss) for name, loss in (("b", 0.1), ("c", 0.05), ("d", 0.15))]
    chosen = recommend([winner, *clear])
    assert (chosen["name"], chosen["evidence"]["rows"]) == ("c", "val")
    assert chosen["reason"] == "clearly lower log-loss than a on the val rows"
    elsewhere = on_val("f", np.zeros(100), range(200, 300))  # no row of the winner's
    assert recommend([winner, on_val("e", BASE[100:] + 0.2), elsewhere])["name"] == "a"


@pytest.mark.parametrize(("kind", "best_single"), [("member", "c"), ("ensemble", "m")])
def test_a_member_that_is_clearly_better_on_val_is_the_best_single(kind, best_single):
    clear = replace(on_val("c", BASE[100:] + 0.1), kind=kind)
    chosen = recommend([candidate("a", BASE + 0.2), candidate("m", BASE + 0.3, kind="member"), clear])
    assert (chosen["name"], chosen["best_single"]) == ("c", best_single)


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """A workspace of three members, which err together on eight rows of each file, and their ensembles."""
    folder = tmp_path_factory.mktemp("recommendation")
    workspace = empty_workspace(folder / "w")

    def with_errors(name, stem, given):
        wrong = np.arange(len(given["labels"]))[:, None] < 8
        return given | {"logits": np.where(wrong, np.roll(given["logits"], 1, axis=1), given["logits"])}

    take_in(workspace, write(folder / "given", change=with_errors))
    build_commands.build_ensemble(CONFIG, workspace)
    return workspace


def of_workspace(workspace, *overrides, changed=None):
    config = load_config(PROJECT / "configs" / "votes.yaml", overrides=overrides)
    store = Store(config, workspace, catalog.read(workspace))
    saved = {name: ensembles.load(workspace, name) for name in ensembles.names(workspace)}
    return recommended(store, {name: store.catalog.members[name] for name in NAMES}, saved | (changed or {}))


def test_a_workspace_recommends_by_all_rows_and_groups(built):
    found = of_workspace(built)
    assert found["name"] in ensembles.names(built)
    assert (found["evidence"]["rows"], found["evidence"]["n"]) == ("oof+val", 90)
    assert set(found["not_compared"]) <= set(NAMES)
    grouped = of_workspace(built, r"dataset.group_regex=^\d\d(\d\d)\.png$")  # 3 rows of train, val and test
    assert grouped["name"] == found["name"]
    assert grouped["evidence"]["log_loss"] == found["evidence"]["log_loss"]
    assert grouped["evidence"]["log_loss_ci95"] != found["evidence"]["log_loss_ci95"]


def test_an_ensemble_of_other_statements_is_not_recommended(built):
    best = of_workspace(built)["name"]
    other = replace(ensembles.load(built, best), training_data={"bayes": ["all", "none", ""]})
    assert of_workspace(built, changed={best: other})["name"] != best
