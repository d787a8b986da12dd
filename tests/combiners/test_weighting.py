"""The weighted ensemble as a whole: what it answers, what it says of itself, and what it does with little to go by."""

from __future__ import annotations

import json
from itertools import product

import numpy as np
import pytest
import torch

from utils.combiners.protocol import MemberFacts
from utils.combiners.weighting import UNTESTED_STRENGTH, WeightedPool
from utils.core.config import Config
from utils.core.errors import UserError
from utils.numeric import pools, weight_search
from utils.numeric.metrics import METRICS, log_loss, softmax
from utils.numeric.uniform_mixture import mixed_with_uniform

NAMES = ("ash", "birch", "cedar", "elm", "fir")


def rows_of(rows=400, classes=4, *, members=5, seed=0, skill=1.5, calibration=(1.0, 1.0)):
    """Logits (M, N, C) that are right up to a factor from `calibration`, labels and 5 folds (N,)."""
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, classes, rows)
    logits = rng.normal(size=(members, rows, classes)) + 0.7 * rng.normal(size=(rows, classes))
    logits[:, np.arange(rows), labels] += skill
    logits *= rng.uniform(*calibration, size=(members, 1, 1))
    return logits.astype(np.float32), labels, np.arange(rows) % 5


def facts(recorded=(0.5, 0.6, 0.7, 0.8, 0.9)):
    unknown = np.full(len(recorded), np.nan)
    return MemberFacts(NAMES[: len(recorded)], np.array(recorded), unknown, unknown)


def configured(members=None, **settings):
    return WeightedPool.configured(Config.model_validate({"runs": {"score_ensemble": settings}}), members or facts())


def test_a_linear_pool_mixes_probabilities_and_takes_the_temperature_after():
    logits, labels, folds = rows_of(calibration=(0.2, 0.4))
    fitted = configured(pool="linear", optimization_metric="log_loss").fit(logits, labels, folds)
    assert fitted.temperature < 1
    mixed = np.array([fitted.weights @ softmax(logits[:, n]) for n in range(len(labels))])
    expected = mixed_with_uniform(softmax(np.log(mixed) / fitted.temperature), fitted.uniform_weight)
    np.testing.assert_allclose(fitted.predict_proba(logits), expected, atol=1e-12)


def test_a_log_linear_pool_sums_log_probabilities_by_weights_of_least_log_loss():
    logits, labels, folds = rows_of(calibration=(0.2, 3))
    fitted = configured(pool="log_linear", optimization_metric="log_loss").fit(logits, labels, folds)
    weights = fitted.weights / fitted.temperature
    expected = np.array([softmax(weights @ np.log(softmax(logits[:, n]))) for n in range(len(labels))])
    expected = mixed_with_uniform(expected, fitted.uniform_weight)
    np.testing.assert_allclose(fitted.predict_proba(logits), expected, atol=1e-9)
    best = pools.fit_log_linear(np.log(softmax(logits)), labels, strength=fitted.facts["strength"])
    np.testing.assert_allclose(weights, best.weights, atol=1e-4)


def test_members_that_are_unequally_calibrated_are_pooled_log_linearly():
    logits, labels, folds = rows_of(1500, calibration=(0.1, 4), seed=2)
    scores = {}
    for pool in ("auto", "linear", "log_linear"):
        fitted = configured(pool=pool, optimization_metric="log_loss").fit(logits, labels, folds)
        scores[pool] = fitted.report(NAMES)["cross_validated_score"]
        assert fitted.pool.name == ("linear" if pool == "linear" else "log_linear")
    assert scores["auto"] == scores["log_linear"] < scores["linear"] - 0.01


def test_a_mixture_is_kept_where_the_truth_is_one():
    # Each row follows one of two members, which one nobody can know: the truth is the mean of their probabilities.
    rng = np.random.default_rng(0)
    logits = 3 * rng.normal(size=(2, 4000, 3))
    truth = softmax(logits).mean(axis=0)
    labels = (truth.cumsum(axis=1) > rng.uniform(size=(4000, 1))).argmax(axis=1)
    fitted = configured(facts((0.5, 0.5)), optimization_metric="log_loss").fit(logits, labels, np.arange(4000) % 5)
    assert fitted.pool.name == "linear"
    assert fitted.weights == pytest.approx([0.5, 0.5], abs=0.03)
    assert fitted.temperature == pytest.approx(1, abs=0.05)


@pytest.mark.parametrize("metric", sorted(METRICS))
@pytest.mark.parametrize("pool", ["linear", "log_linear"])
def test_one_good_member_among_guesses_gets_most_and_beats_equal_weights(metric, pool):
    logits, labels, folds = rows_of(skill=0)
    logits[3, np.arange(400), labels] += 2
    found = configured(pool=pool, optimization_metric=metric).fit(logits, labels, folds).report(NAMES)
    assert found["weights"]["elm"] > 0.5
    assert sum(found["weights"].values()) == pytest.approx(1)
    assert found["beats_equal_weights"]
    assert found["notes"] == []
    equal = METRICS[metric].function(softmax(logits).mean(axis=0), labels)
    assert found["equal_weights_score"] == equal


@pytest.mark.parametrize("metric", sorted(METRICS))
def test_both_scores_stand_side_by_side_and_the_unseen_one_is_what_copies_reach(metric):
    logits, labels, folds = rows_of(200)
    fitted = configured(optimization_metric=metric).fit(logits, labels, folds)
    found = fitted.report(NAMES)
    assert found["selection_score"] == METRICS[metric].function(fitted.predict_proba(logits), labels)
    better = 1 if METRICS[metric].higher_is_better else -1
    assert better * found["selection_score"] >= better * found["cross_validated_score"] - 0.01
    fresh = rows_of(20_000, seed=1)
    unseen = METRICS[metric].function(fitted.predict_proba(fresh[0]), fresh[1])
    assert found["cross_validated_score"] == pytest.approx(unseen, abs=0.06)


def test_labels_that_mean_nothing_leave_nothing_to_boast_of():
    logits, labels, folds = rows_of(600, skill=0)
    for metric in ("log_loss", "accuracy"):
        found = configured(optimization_metric=metric).fit(logits, labels, folds).report(NAMES)
        if metric == "accuracy":
            assert found["cross_validated_score"] == pytest.approx(0.25, abs=4 * np.sqrt(0.25 * 0.75 / 600))
        else:
            assert found["cross_validated_score"] > np.log(4) - 0.01


def test_it_says_so_where_equal_weights_are_not_beaten():
    logits, labels, folds = rows_of(300, members=1, calibration=(1, 1))
    found = configured(optimization_metric="accuracy").fit(np.repeat(logits, 5, axis=0), labels, folds).report(NAMES)
    assert len(set(found["weights"].values())) == 1
    assert found["beats_equal_weights"] is False
    score = found["equal_weights_score"]
    assert found["notes"] == [f"equal weights are not beaten: accuracy {score:.4f} with them, {score:.4f} with these"]


def test_its_report_is_for_json():
    logits, labels, folds = rows_of(100, skill=0.2)
    fitted = configured().fit(logits, labels, folds)
    found = json.loads(json.dumps(fitted.report(NAMES), allow_nan=False))
    assert tuple(found["weights"]) == NAMES
    assert found["duality_gap"] <= weight_search.TOLERANCE
    equal = configured(optimization_metric="log_loss").fit(np.repeat(logits[:1], 5, axis=0), labels, folds)
    assert equal.report(NAMES)["strength"] == "infinite"


def test_the_temperature_can_be_switched_off():
    logits, labels, folds = rows_of(calibration=(0.2, 0.3))
    options = {"pool": "linear", "optimization_metric": "log_loss"}
    found = {kind: configured(**options, temperature=kind).fit(logits, labels, folds) for kind in ("auto", "off")}
    assert found["off"].temperature == 1
    assert log_loss(found["auto"].predict_proba(logits), labels) < log_loss(found["off"].predict_proba(logits), labels)


@pytest.mark.parametrize("pool", ["linear", "log_linear"])
def test_members_are_calibrated_one_by_one_on_request(pool):
    logits, labels, folds = rows_of(1500)
    logits[1] *= 5
    logits[2] /= 4
    fitted = configured(pool=pool, temperature="per_member", optimization_metric="log_loss").fit(logits, labels, folds)
    found = fitted.report(NAMES)["member_temperatures"]
    assert found["birch"] / found["ash"] == pytest.approx(5, rel=0.2)
    assert found["cedar"] / found["ash"] == pytest.approx(1 / 4, rel=0.2)
    logits[1] /= 5
    logits[2] *= 4
    again = configured(pool=pool, temperature="per_member", optimization_metric="log_loss").fit(logits, labels, folds)
    np.testing.assert_allclose(fitted.weights, again.weights, atol=0.01)


@pytest.mark.parametrize("pool", ["auto", "log_linear"])
def test_weights_follow_the_recorded_accuracies_where_they_are_not_optimised(pool):
    logits, labels, folds = rows_of(calibration=(0.2, 0.3))
    fitted = configured(optimize_weights=False, pool=pool).fit(logits, labels, folds)
    np.testing.assert_allclose(fitted.weights, np.array([0.5, 0.6, 0.7, 0.8, 0.9]) / 3.5)
    assert fitted.pool.name == ("linear" if pool == "auto" else "log_linear")
    assert fitted.temperature < 0.6  # fitted all the same
    assert fitted.report(NAMES)["strength"] is None


def test_a_member_without_a_recorded_accuracy_is_named_with_the_remedy():
    recipe = configured(facts((0.5, np.nan, 0.7, 0.0, 0.9)), optimize_weights=False)
    with pytest.raises(UserError, match=r"birch, elm has none above 0.*discover --verify"):
        recipe.fit(*rows_of(40))
    configured(facts((np.nan,) * 5)).fit(*rows_of(40))


def test_one_fold_leaves_nothing_to_choose_and_this_is_said():
    logits, labels, folds = rows_of(calibration=(0.2, 0.3))
    fitted = configured().fit(logits, labels, np.zeros_like(folds))
    found = fitted.report(NAMES)
    assert (found["pool"], found["temperature"], found["strength"]) == ("linear", 1, UNTESTED_STRENGTH)
    assert found["cross_validated_score"] is found["beats_equal_weights"] is None
    assert found["notes"] == ["one fold only: penalty 0.01, no temperature, no comparison of pools"]
    asked = configured(pool="log_linear", temperature="per_member").fit(logits, labels, np.zeros_like(folds))
    assert asked.pool.name == "log_linear"
    np.testing.assert_array_equal(asked.member_temperatures, 1)


@pytest.mark.parametrize("pool", ["auto", "log_linear"])
def test_one_class_alone_gives_equal_weights_and_this_is_said(pool):
    logits, _, folds = rows_of(30)
    fitted = configured(pool=pool).fit(logits, np.full(30, 2), folds)
    np.testing.assert_allclose(fitted.weights, 0.2)
    assert fitted.temperature == pytest.approx(1)
    assert fitted.report(NAMES)["notes"] == ["all 30 rows are of one class: nothing was fitted"]


@pytest.mark.parametrize("metric", sorted(METRICS))
@pytest.mark.parametrize("pool", ["auto", "linear", "log_linear"])
@pytest.mark.parametrize("shape", [(1, 60, 3), (5, 4, 6), (3, 2, 2), (5, 6, 2)])
def test_it_manages_with_little(metric, pool, shape):
    members, rows, classes = shape
    logits, labels, folds = rows_of(rows, classes, members=members)
    labels[:2] = 0, 1
    names = NAMES[:members]
    fitted = configured(facts((0.5,) * members), pool=pool, optimization_metric=metric).fit(logits, labels, folds)
    found = fitted.predict_proba(logits)
    assert np.isfinite(found).all()
    np.testing.assert_allclose(found.sum(axis=1), 1)
    json.dumps(fitted.report(names), allow_nan=False)


def test_a_class_that_a_fold_has_alone_is_no_trouble():
    logits, labels, folds = rows_of(60, 3)
    labels[:] = np.where(folds == 2, 1, 0)
    labels[0] = 2
    found = configured().fit(logits, labels, folds).predict_proba(logits)
    assert np.isfinite(found).all()


@pytest.mark.parametrize("metric", ["log_loss", "accuracy", "brier"])
def test_weights_follow_the_members_when_these_change_places(metric):
    logits, labels, folds = rows_of(150)
    order = [3, 0, 4, 2, 1]
    first = configured(optimization_metric=metric).fit(logits, labels, folds)
    other = configured(optimization_metric=metric).fit(logits[order], labels, folds)
    np.testing.assert_allclose(other.weights, first.weights[order], atol=1e-4)


@pytest.mark.parametrize("temperature", ["auto", "off", "per_member"])
@pytest.mark.parametrize("pool", ["linear", "log_linear"])
def test_the_module_answers_as_the_pool_does(pool, temperature):
    logits, labels, folds = rows_of(calibration=(0.3, 3))
    logits[2, :40] *= 20  # saturated here and there
    fitted = configured(pool=pool, temperature=temperature, optimization_metric="log_loss").fit(logits, labels, folds)
    if temperature == "per_member":
        assert (fitted.member_temperatures != 1).any()
    elif pool == "linear":
        assert (fitted.temperature != 1) == (temperature == "auto")
    tensors = torch.from_numpy(logits.transpose(1, 0, 2).copy())
    traced = torch.jit.trace(fitted.to_module().eval(), tensors[:2])
    for batch, start in product((1, 3, 17), range(0, 380, 61)):
        found = traced(tensors[start : start + batch]).numpy()
        expected = fitted.predict_proba(logits[:, start : start + batch])
        np.testing.assert_allclose(found, expected, rtol=0, atol=1e-6)


def test_members_without_a_share_are_not_needed():
    logits, labels, folds = rows_of(1000, calibration=(0.5, 2))
    logits[1] = -logits[1]
    logits[4] = -logits[4]
    fitted = configured(temperature="per_member", optimization_metric="log_loss").fit(logits, labels, folds)
    used = fitted.used(5)
    np.testing.assert_array_equal(used, [True, False, True, True, False])
    alone = fitted.restricted(used)
    np.testing.assert_allclose(alone.predict_proba(logits[used]), fitted.predict_proba(logits), atol=1e-12)
    assert alone.used(3).all()
