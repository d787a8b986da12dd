"""Pruned ensembles: what is picked and why, what is said of the others, and what held-out folds decide."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest

from utils.combiners import pruning
from utils.combiners.protocol import MemberFacts
from utils.combiners.pruning import (
    COMBINERS,
    PICKS,
    Clustering,
    DiversityMax,
    GreedyBackward,
    GreedyForward,
    ScoredSubset,
)
from utils.combiners.subset_search import BudgetError, Subset, SubsetProblem, greedy_forward
from utils.core.config import Config
from utils.core.config_sections import CostBudget
from utils.numeric.metrics import accuracy, log_loss, softmax
from utils.numeric.uniform_mixture import mixed_with_uniform

NO_LIMIT = CostBudget(max_latency_ms=None, max_size_mb=None)
LETTERS = "abcdefghij"


def facts(members, latency=None, size=None):
    return MemberFacts(
        tuple(LETTERS[:members]),
        np.full(members, 0.9),
        np.full(members, 10.0) if latency is None else np.array(latency, dtype=float),
        np.full(members, 2.0) if size is None else np.array(size, dtype=float),
    )


def zoo(members=5, rows=200, classes=3, seed=0, sharpness=1.0):
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, classes, rows)
    logits = rng.normal(size=(members, rows, classes)) + rng.normal(size=(1, rows, classes))
    logits[:, np.arange(rows), labels] += rng.uniform(1, 2.5, members)[:, None]
    return (sharpness * logits).astype(np.float32), labels, np.arange(rows) % 5


def logits_with_errors(labels, wrong, sure=3.0):
    """Logits (N, 2) of a member that is right but on some rows."""
    found = np.zeros((len(labels), 2), dtype=np.float32)
    found[np.arange(len(labels)), labels] = sure
    found[wrong] = found[wrong][:, ::-1]
    return found


def trio(rows=200):
    """a and b err on other rows, and c on the rows of both."""
    labels = np.arange(rows) % 2
    one, other = list(range(0, 10)), list(range(50, 60))
    return (
        np.stack(
            [
                logits_with_errors(labels, one),
                logits_with_errors(labels, other, 2.0),
                logits_with_errors(labels, one + other),
            ]
        ),
        labels,
        np.arange(rows) % 5,
    )


def task(logits, labels, metric):
    return SubsetProblem(tuple(LETTERS[: len(logits)]), softmax(logits).astype(np.float32), labels, metric, 10)


# what is picked -------------------------------------------------------------------------------------------------------
def point(members, hits, latency, size=1.0):
    losses = np.ones(100)
    losses[:hits] = 0
    subset = Subset(tuple(range(members)))
    return ScoredSubset(subset, 1.0, np.zeros((100, 2)), losses, hits / 100, 1 - hits / 100, latency, size)


CURVE = [point(1, 60, 10), point(2, 85, 20), point(3, 87, 60), point(4, 90, 110)]


def test_best_takes_the_best_score_and_fastest_the_cheapest_within_one_standard_error():
    assert PICKS["best"](CURVE) == 3
    # 90 and 87 hits of 100: the paired difference of 3 rows has an error of 1.7; one row less is within it.
    assert PICKS["fastest"](CURVE) == 3
    assert PICKS["fastest"]([*CURVE[:2], point(3, 89, 60), CURVE[3]]) == 2


def test_the_knee_is_where_score_outruns_latency_the_most():
    assert PICKS["knee"](CURVE) == 1  # (85 - 60) / 30 - 10 / 100 = 0.73; the third: 0.9 - 0.5


def test_without_a_bend_the_knee_is_the_best():
    straight = [point(1, 60, 10), point(2, 70, 20), point(3, 80, 30)]
    assert PICKS["knee"](straight) == 2
    assert PICKS["knee"](straight[:2]) == 1
    assert PICKS["knee"](straight[:1]) == 0
    assert PICKS["knee"]([point(1, 80, 10), point(2, 80, 20)]) == 0


def test_without_latencies_numbers_of_members_stand_for_them():
    curve = [point(1, 60, None), point(2, 85, None), point(6, 87, None), point(11, 90, None)]
    assert PICKS["knee"](curve) == 1
    assert PICKS["fastest"]([*curve, point(2, 90, None)]) == 4


def test_equal_scores_go_to_the_lower_log_loss_and_then_to_fewer_members():
    sharper = replace(CURVE[3], log_loss=0.01)
    assert PICKS["best"]([*CURVE, sharper]) == 4
    assert PICKS["best"]([CURVE[3], point(5, 90, 110)]) == 0


def test_the_front_holds_what_no_other_beats_in_score_latency_and_size():
    points = [
        point(1, 80, 10, 5.0),
        point(2, 80, 12, 5.0),  # slower than the first and nothing else
        point(3, 80, 12, 4.0),  # slower, and smaller
        point(4, 79, 12, 4.0),  # worse than the one before and nothing else
        point(5, 90, 30, 9.0),
        point(5, 90, 30, 9.0),  # the same again
    ]
    assert pruning._front(points) == [0, 2, 4, 5]


def test_pick_decides_what_a_fit_keeps():
    rows, latency = zoo(members=8, rows=600, seed=1), [40, 35, 30, 25, 20, 15, 10, 5]
    found = {}
    for pick in PICKS:
        fitted = GreedyForward(members=facts(8, latency), metric="brier", budget=NO_LIMIT, pick=pick).fit(*rows)
        expected = fitted.points[PICKS[pick](fitted.points)].subset.members
        assert np.flatnonzero(fitted.used(8)).tolist() == sorted(expected)
        found[pick] = fitted.report(facts(8).names)
    assert found["knee"]["latency_ms"] < found["fastest"]["latency_ms"] < found["best"]["latency_ms"]
    (missing,) = set(found["best"]["path"]) - set(found["fastest"]["path"])
    few, all_ = (found[pick]["cross_validated_score"] for pick in ("fastest", "best"))
    words = f"Brier score {few:.4f} -> {all_:.4f} with 1 more, 90 ms -> 120 ms"
    assert found["fastest"]["dropped"][missing] == f"not worth its cost (pick: fastest): {words}"


# what is fitted -------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("name", sorted(COMBINERS))
def test_the_answer_is_the_plain_mean_of_the_kept_with_one_temperature(name):
    logits, labels, folds = zoo(sharpness=0.4)
    fitted = COMBINERS[name](members=facts(5), metric="accuracy", target_size=3).fit(logits, labels, folds)
    kept = fitted.used(5)
    assert 1 <= kept.sum() <= 3
    mean = softmax(logits[kept]).mean(axis=0)
    assert fitted.temperature < 1  # the members are too timid
    expected = mixed_with_uniform(softmax(np.log(mean) / fitted.temperature), fitted.uniform_weight)
    np.testing.assert_allclose(fitted.predict_proba(logits), expected, atol=1e-9)
    assert log_loss(expected, labels) < log_loss(mean, labels)


def test_temperature_may_be_off_or_each_members_own():
    logits, labels, folds = zoo(sharpness=0.4)
    off = GreedyForward(members=facts(5), calibration="off").fit(logits, labels, folds)
    assert off.temperature == 1
    own = GreedyForward(members=facts(5), calibration="per_member").fit(logits, labels, folds)
    assert (own.member_temperatures < 1).all()
    report = own.report(facts(5).names)
    assert report["member_temperatures"].keys() == set("abcde")


def test_the_size_is_chosen_by_folds_left_out():
    chosen = []
    for seed in range(6):
        logits, labels, folds = zoo(members=6, rows=100, seed=seed)
        probabilities = softmax(logits)
        crossfit = np.empty((6, 100, 3))
        for fold in range(5):
            inside = folds == fold
            others = task(logits[:, ~inside], labels[~inside], "accuracy")
            for place, subset in enumerate(greedy_forward(others)):
                crossfit[place, inside] = probabilities[list(subset.members)][:, inside].mean(axis=0)
        scores = [(-accuracy(own, labels), log_loss(own, labels)) for own in crossfit]
        size = min(range(6), key=lambda place: (round(scores[place][0], 9), scores[place][1])) + 1
        options = {"metric": "accuracy", "target_size": 6, "budget": NO_LIMIT}
        fitted = GreedyForward(members=facts(6), **options).fit(logits, labels, folds)
        assert fitted.used(6).sum() == size
        assert fitted.report(facts(6).names)["cross_validated_score"] == pytest.approx(-scores[size - 1][0])
        by_the_rows_themselves = GreedyForward(members=facts(6), **options).fit(logits, labels, np.zeros_like(folds))
        assert by_the_rows_themselves.report(facts(6).names)["cross_validated_score"] is None
        chosen.append((size, by_the_rows_themselves.used(6).sum()))
    assert any(size != other for size, other in chosen)


def test_held_out_scores_read_no_label_of_their_fold():
    logits, labels, folds = zoo(rows=100)
    same = task(logits, labels, "log_loss")
    other = labels.copy()
    other[folds == 2] = (other[folds == 2] + 1) % 3
    changed = task(logits, other, "log_loss")
    subsets = [Subset((0,)), Subset((0, 1)), Subset((0, 1, 2))]
    found = [pruning._of_folds(each, subsets, folds, "greedy_forward") for each in (same, changed)]
    assert (found[0][:, folds == 2] == found[1][:, folds == 2]).all()
    assert (found[0] != found[1]).any()


def test_a_fold_whose_search_ends_early_repeats_its_last_subset():
    labels = np.arange(40) % 2
    logits = np.stack([logits_with_errors(labels, []), logits_with_errors(labels, range(0, 40, 3))])
    both = task(logits, labels, "f1_macro")
    found = pruning._of_folds(both, [Subset((0,)), Subset((0, 1)), Subset((1,))], labels % 2, "greedy_forward")
    assert found.shape == (3, 40, 2)
    assert (found[1] == found[2]).all()


@pytest.mark.parametrize("name", sorted(COMBINERS))
def test_little_data_and_a_single_class_are_fitted_without_a_choice(name):
    logits, labels, folds = zoo()
    for these, of_fold in ((np.zeros_like(labels), folds), (labels, np.zeros_like(folds))):
        fitted = COMBINERS[name](members=facts(5)).fit(logits, these, of_fold)
        assert fitted.temperature == 1
        report = fitted.report(facts(5).names)
        assert report["notes"] == [
            "one fold or one class only: scores are those of the rows that chose, no temperature"
        ]
        json.dumps(report, allow_nan=False)


@pytest.mark.parametrize("name", sorted(COMBINERS))
def test_equal_members_leave_one(name):
    logits, labels, folds = zoo(members=1)
    fitted = COMBINERS[name](members=facts(4)).fit(np.repeat(logits, 4, axis=0), labels, folds)
    assert fitted.used(4).tolist() == [True, False, False, False]


@pytest.mark.parametrize("name", sorted(COMBINERS))
def test_one_member_is_kept(name):
    logits, labels, folds = zoo(members=1)
    fitted = COMBINERS[name](members=facts(1)).fit(logits, labels, folds)
    report = fitted.report(("a",))
    assert report["weights"] == {"a": 1.0}
    assert report["diversity"] is None
    assert report["dropped"] == {}


def test_a_pool_of_good_members_is_better_than_the_best_of_them():
    logits, labels, folds = zoo(members=8, rows=600)
    single = max(accuracy(softmax(own), labels) for own in logits)
    for name in COMBINERS:
        fitted = COMBINERS[name](members=facts(8), metric="accuracy", budget=NO_LIMIT).fit(logits, labels, folds)
        assert accuracy(fitted.predict_proba(logits), labels) >= single, name


# settings -------------------------------------------------------------------------------------------------------------
def test_settings_are_read_from_the_configuration():
    config = Config(
        pruning={"target_size": 3, "pick": "knee", "cost_budget": {"max_latency_ms": None, "max_size_mb": 7}},
        runs={"score_ensemble": {"optimization_metric": "brier", "temperature": "off"}},
    )
    found = Clustering.configured(config, facts(2))
    assert (found.target_size, found.pick, found.metric, found.calibration) == (3, "knee", "brier", "off")
    assert [limit.maximum for limit in found.limits] == [float("inf"), 7.0]


def test_the_budget_binds_members_and_the_whole():
    logits, labels, folds = zoo()
    budget = CostBudget(max_latency_ms=25, max_size_mb=None)
    for name in COMBINERS:
        fitted = COMBINERS[name](members=facts(5, [10, 10, 10, 26, 5]), budget=budget).fit(logits, labels, folds)
        kept = fitted.used(5)
        assert not kept[3]
        assert np.array([10, 10, 10, 26, 5])[kept].sum() <= 25
    with pytest.raises(BudgetError, match="e alone: 5 ms > 2 ms"):
        GreedyForward(members=facts(5, [10, 10, 10, 26, 5]), budget=CostBudget(max_latency_ms=2)).fit(
            logits, labels, folds
        )


# output ------------------------------------------------------------------------------------------------
def report(combiner, rows, **options):
    logits, labels, folds = rows
    names = tuple(LETTERS[: len(logits)])
    settings = {"metric": "accuracy", "budget": NO_LIMIT} | options
    return (
        combiner(members=settings.pop("facts", facts(len(logits))), **settings).fit(logits, labels, folds).report(names)
    )


def test_a_member_that_adds_nothing_is_told_by_what_it_would_change():
    found = report(GreedyForward, trio(), metric="log_loss", target_size=3)
    assert found["path"] == ["a", "b"]
    mean = softmax(trio()[0])
    before, after = (log_loss(members.mean(axis=0), trio()[1]) for members in (mean[:2], mean))
    assert found["dropped"] == {"c": f"adds nothing beyond a, b: log-loss {before:.4f} -> {after:.4f}"}


def test_a_gain_beyond_the_target_size_is_told_as_one():
    found = report(GreedyForward, trio(), target_size=1)
    assert found["dropped"]["b"].startswith("beyond the target size of 1: accuracy 0.9500 -> ")


def test_a_gain_that_is_not_taken_says_why():
    rows = zoo(members=8, rows=600, seed=1)
    latency = facts(8, [40, 35, 30, 25, 20, 15, 10, 5])
    knee = report(GreedyForward, rows, pick="knee", facts=latency)
    best = report(GreedyForward, rows, facts=latency)
    others = set(knee["dropped"]) - set(best["path"])
    assert any(knee["dropped"][member].startswith("not worth its cost (pick: knee): accuracy 0.") for member in others)
    best = report(GreedyForward, zoo(members=6, rows=100), target_size=6)
    words = "a gain on these rows, but larger subsets score no better: accuracy 0."
    assert any(reason.startswith(words) for reason in best["dropped"].values())


def test_budgets_are_told_with_value_and_limit():
    budget = CostBudget(max_latency_ms=100, max_size_mb=None)
    found = report(GreedyForward, trio(), budget=budget, facts=facts(3, [60, 50, 130]))
    assert found["path"] == ["a"]
    assert found["dropped"] == {
        "b": "no room in the budget beside a: 110 ms > 100 ms",
        "c": "over the budget: 130 ms > 100 ms",
    }
    both = CostBudget(max_latency_ms=100, max_size_mb=1)
    found = report(GreedyForward, trio(), budget=both, facts=facts(3, [60, 150, 130], [1, 2.5, 0.5]))
    assert found["dropped"]["b"] == "over the budget: 150 ms > 100 ms and 2.5 MB > 1 MB"


def test_families_and_hopeless_members_are_told_in_their_own_words():
    labels = np.arange(100) % 2
    wrong = (range(5), range(50, 54), range(7), range(10, 60))
    rows = np.stack([logits_with_errors(labels, list(each)) for each in wrong]), labels, np.arange(100) % 5
    found = report(Clustering, rows, target_size=3)
    assert found["dropped"]["c"].startswith("represented by a (error correlation 0.8")
    found = report(DiversityMax, rows, target_size=3)
    assert found["dropped"]["d"].startswith("hopeless: accuracy 0.5000")


@pytest.mark.parametrize("name", sorted(COMBINERS))
@pytest.mark.parametrize("pick", sorted(PICKS))
def test_everyone_is_kept_or_has_a_reason(name, pick):
    rows = zoo(members=8)
    found = report(COMBINERS[name], rows, pick=pick, target_size=4, facts=facts(8, range(1, 9)))
    kept = {member for member, weight in found["weights"].items() if weight}
    assert kept == set(found["path"])
    assert kept | set(found["dropped"]) == set("abcdefgh")
    assert not kept & set(found["dropped"])
    assert all(found["dropped"].values())


def test_the_report_holds_costs_subsets_front_and_diversity():
    found = report(GreedyForward, trio(), metric="log_loss", facts=facts(3, [10, 20, 40], [1, 2, 4]))
    assert found["path"] == ["a", "b"]
    assert (found["latency_ms"], found["size_mb"]) == (30.0, 3.0)
    assert found["weights"] == {"a": 0.5, "b": 0.5, "c": 0.0}
    assert found["cost_budget"] == {"max_latency_ms": None, "max_size_mb": None}
    assert [entry["members"] for entry in found["subsets"]] == [["a"], ["a", "b"], ["a", "b", "c"]]
    assert [entry["latency_ms"] for entry in found["subsets"]] == [10.0, 30.0, 70.0]
    assert [entry["on_pareto_front"] for entry in found["subsets"]] == [True, True, False]
    assert [entry["picked"] for entry in found["subsets"]] == [False, True, False]
    assert found["subsets"][1]["log_loss"] == found["cross_validated_score"]
    assert found["diversity"]["disagreement"] == pytest.approx(0.1)
    json.dumps(found, allow_nan=False)


def test_unknown_costs_are_null():
    found = report(GreedyForward, trio(), facts=facts(3, [10, np.nan, 40], [np.nan] * 3))
    assert (found["latency_ms"], found["size_mb"]) == (None, None)
    assert found["subsets"][0]["latency_ms"] == 10.0
    json.dumps(found, allow_nan=False)


def test_what_is_restored_answers_and_is_not_fitted_again():
    logits, labels, folds = zoo()
    fitted = GreedyBackward(members=facts(5), target_size=2).fit(logits, labels, folds)
    again = GreedyBackward.from_state(fitted.state())
    assert (again.predict_proba(logits) == fitted.predict_proba(logits)).all()
    with pytest.raises(AssertionError, match="not fitted again"):
        again.fit(logits, labels, folds)
