"""The greedy ensemble: what folds left out decide, what it reports, and what it does where nothing can be held out."""

from __future__ import annotations

import json

import numpy as np
import pytest

from utils.combiners import greedy, pooling
from utils.combiners.greedy import GreedySelection, fewest_within_one_error, row_losses
from utils.combiners.protocol import MemberFacts
from utils.core.config import Config
from utils.numeric.metrics import METRICS, log_loss, softmax
from utils.numeric.selection import select_members
from utils.numeric.uniform_mixture import mixed_with_uniform

RULES = sorted(METRICS)
M, N, C = 6, 240, 4
NAMES = ("ash", "birch", "cedar", "elm", "fir", "oak")


@pytest.fixture
def rows():
    return drawn(5)


def drawn(seed):
    """Two good members that err differently, two of less use, two that know nothing."""
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, C, N)
    logits = rng.normal(size=(M, N, C)) * 1.5
    for member, skill in enumerate((3, 3, 1.5, 1, 0, 0)):
        logits[member, np.arange(N), labels] += skill
    return logits.astype(np.float32), labels, np.arange(N) % 5


def literal_f1_loss(winners, labels):
    return 1 - METRICS["f1_macro"].function(np.eye(C)[winners], labels)


@pytest.mark.parametrize("metric", RULES)
def test_losses_of_rows_have_the_metric_as_their_mean(metric, rows):
    probabilities = softmax(rows[0][2])
    found = METRICS[metric].function(probabilities, rows[1])
    expected = 1 - found if METRICS[metric].higher_is_better else found
    assert row_losses(probabilities, rows[1], metric).mean() == pytest.approx(expected, abs=1e-12)


def test_the_spread_of_macro_f1_is_that_of_the_metric(rows):
    probabilities, labels = softmax(rows[0][2]), rows[1]
    winners = probabilities.argmax(axis=1)
    told = row_losses(probabilities, labels, "f1_macro").std() / np.sqrt(N)
    rng = np.random.default_rng(0)
    samples = (rng.integers(N, size=N) for _ in range(2000))
    seen = np.std([literal_f1_loss(winners[sample], labels[sample]) for sample in samples])
    assert told == pytest.approx(seen, rel=0.1)


def test_the_fewest_within_one_paired_error_are_taken():
    shared = np.random.default_rng(0).normal(size=100)  # what rows have in common is no error of a difference
    swing = np.tile([1.0, -1.0], 50)
    losses = np.stack([shared + 0.3 + swing, shared + 0.11 + swing, shared + 0.09 + swing, shared])
    assert fewest_within_one_error(losses) == 3
    assert fewest_within_one_error(losses[::-1]) == 1
    assert fewest_within_one_error(np.zeros((3, 1))) == 1


def literally(metric, rows, *, seed):
    """(members taken, bags, size) by the parts alone: every fold, with and without three bags, six steps at most."""
    logits, labels, folds = rows
    probabilities = softmax(logits).astype(np.float32)
    options = {"metric": metric, "steps": 6, "sorted_start": True, "seed": seed}
    if metric in ("accuracy", "f1_macro"):
        options["tie_breaker"] = "log_loss"
    ways = []
    for bags in (0, 3):
        mixtures = np.zeros((6, N, C))
        for fold in range(5):
            paths = select_members(probabilities[:, folds != fold], labels[folds != fold], bags=bags, **options).paths
            for size in range(1, 7):
                taken = [member for path in paths for member in path.members[:size]]
                mixtures[size - 1, folds == fold] = probabilities[taken][:, folds == fold].mean(axis=0, dtype=float)
        losses = np.stack([row_losses(mixture, labels, metric) for mixture in mixtures])
        size = fewest_within_one_error(losses)
        ways.append((losses[size - 1].mean(), bags, size))
    _, bags, size = min(ways, key=lambda way: way[0])
    paths = select_members(probabilities, labels, bags=bags, **options).paths
    return [member for path in paths for member in path.members[:size]], bags, size


@pytest.mark.parametrize("metric", RULES)
def test_it_is_what_its_parts_say_step_by_step(metric, monkeypatch):
    monkeypatch.setattr(greedy, "STEPS", 6)
    monkeypatch.setattr(greedy, "BAGS", 3)
    seen = set()
    for seed in range(6):
        rows = drawn(seed)
        taken, bags, size = literally(metric, rows, seed=seed)
        found = GreedySelection(metric=metric, seed=seed, calibration="off").fit(*rows)
        np.testing.assert_allclose(found.weights, np.bincount(taken, minlength=M) / len(taken), atol=1e-12)
        assert found.report(NAMES)["size"] == size
        expected = mixed_with_uniform(softmax(rows[0])[taken].mean(axis=0), found.uniform_weight)
        np.testing.assert_allclose(found.predict_proba(rows[0]), expected, atol=1e-6)
        seen.add(bags)
    if metric in ("accuracy", "f1_macro"):
        assert seen == {0, 3}  # both happen, so that the choice was looked at


def test_members_that_know_nothing_are_left_out(rows):
    found = GreedySelection(metric="log_loss").fit(*rows)
    assert found.used(M).tolist()[:2] == [True, True]
    assert not found.used(M)[4:].any()
    assert log_loss(found.predict_proba(rows[0]), rows[1]) < log_loss(softmax(rows[0]).mean(axis=0), rows[1])


def test_no_copy_reads_the_labels_of_the_fold_left_out(rows, monkeypatch):
    logits, labels, folds = rows
    monkeypatch.setattr(greedy, "fewest_within_one_error", lambda losses: 4)
    probabilities = softmax(logits).astype(np.float32)
    crossfit = []
    for truth in (labels, np.where(folds == 3, (labels + 1) % C, labels)):
        found = GreedySelection(metric="log_loss")._tried(probabilities, truth, folds, bags=2)
        crossfit.append(found.crossfit)
    assert (crossfit[0] == crossfit[1])[folds == 3].all()
    assert (crossfit[0] != crossfit[1]).any()


def test_a_temperature_is_taken_where_held_out_rows_gain_by_it(rows):
    logits, labels, folds = rows
    timid = (logits * 0.2).astype(np.float32)
    found = GreedySelection(metric="log_loss").fit(timid, labels, folds)
    off = GreedySelection(metric="log_loss", calibration="off").fit(timid, labels, folds)
    assert found.temperature < 0.9
    assert off.temperature == 1
    assert (found.weights == off.weights).all()
    assert log_loss(found.predict_proba(timid), labels) < log_loss(off.predict_proba(timid), labels) - 0.1
    each = GreedySelection(metric="log_loss", calibration="per_member").fit(timid, labels, folds)
    assert each.member_temperatures[0] < 0.9


def test_the_report_tells_paths_scores_and_temperature(rows):
    found = json.loads(json.dumps(GreedySelection(metric="accuracy").fit(*rows).report(NAMES), allow_nan=False))
    assert tuple(found["weights"]) == NAMES
    assert sum(found["weights"].values()) == pytest.approx(1)
    for bag in found["bags"]:
        assert len(bag["path"]) == len(bag["scores"]) == found["size"]
        assert set(bag["path"]) <= set(NAMES)
        assert all(0.25 < score <= 1 for score in bag["scores"])
    taken = {name for bag in found["bags"] for name in bag["path"]}
    assert taken == {name for name, weight in found["weights"].items() if weight}
    assert len(found["held_out_scores"]) == greedy.STEPS
    assert found["selection_score"] >= found["equal_weights_score"]
    assert found["cross_validated_score"] == pytest.approx(found["held_out_scores"][found["size"] - 1])
    assert found["temperature"] > 0
    assert found["notes"] == []


def test_of_many_rows_some_select_the_number_and_all_select_the_members(rows, monkeypatch):
    logits, labels, folds = rows
    monkeypatch.setattr(pooling, "MAX_TUNING_ROWS", N // 3)
    sample = pooling.tuning_rows(labels, folds, 1)
    found = GreedySelection(metric="log_loss").fit(logits, labels, folds)
    on_sample = GreedySelection(metric="log_loss").fit(logits[:, sample], labels[sample], folds[sample])
    for fact in ("size", "held_out_scores", "cross_validated_score"):
        assert found.facts[fact] == on_sample.facts[fact], fact
    assert found.temperature == on_sample.temperature
    n_bags = len(found.facts["bags"])
    assert n_bags == len(on_sample.facts["bags"])
    members = found._select(softmax(logits).astype(np.float32), labels, bags=greedy.BAGS if n_bags > 1 else 0)
    np.testing.assert_array_equal(found.weights, members.weights_by_size()[found.facts["size"] - 1])
    assert f"by {len(sample)} of {N} rows" in found.report(NAMES)["notes"][-1]


def test_with_one_fold_nothing_is_held_out_and_it_says_so(rows):
    logits, labels, _ = rows
    found = GreedySelection(metric="log_loss").fit(logits, labels, np.zeros(N, dtype=np.int64))
    probabilities = softmax(logits).astype(np.float32)
    path = select_members(probabilities, labels, metric="log_loss", steps=greedy.STEPS, sorted_start=True).paths[0]
    np.testing.assert_allclose(found.weights, np.bincount(path.members[: path.size], minlength=M) / path.size)
    report = found.report(NAMES)
    assert (report["cross_validated_score"], report["temperature"]) == (None, 1)
    assert "one fold only" in report["notes"][0]


def test_members_that_are_all_equal_are_one(rows):
    logits, labels, folds = rows
    same = np.repeat(logits[:1], M, axis=0)
    found = GreedySelection(metric="f1_macro").fit(same, labels, folds)
    np.testing.assert_allclose(found.predict_proba(same).argmax(axis=1), same[0].argmax(axis=1))


def test_the_configuration_sets_metric_temperature_and_seed():
    settings = {"runs": {"score_ensemble": {"optimization_metric": "brier", "temperature": "off"}}, "seed": 3}
    facts = MemberFacts(NAMES, np.ones(M), np.ones(M), np.ones(M))
    found = GreedySelection.configured(Config.model_validate(settings), facts)
    assert (found.metric, found.calibration, found.seed) == ("brier", "off", 3)
