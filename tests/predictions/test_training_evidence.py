"""Which scores speak against a statement on training data, on counts and losses made by hand."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from utils.predictions.training_evidence import ALPHA, Scores, problems

RNG = np.random.default_rng(0)


def scores(n, accuracy, mean_loss=None, seed=0):
    losses = None if mean_loss is None else np.random.default_rng(seed).gamma(0.5, 2 * mean_loss, n)
    return Scores(n, round(accuracy * n), losses)


def suspected(unseen, out_of_fold=None):
    return [problem.message.rpartition(" of ")[2] for problem in problems("m", unseen, out_of_fold)]


def test_equal_splits_are_not_suspected():
    assert suspected({"val": scores(100, 0.8, 0.5, 1), "test": scores(300, 0.82, 0.5, 2)}) == []


@pytest.mark.parametrize("better", ["val", "test"])
def test_a_split_that_is_known_by_heart_is_suspected(better):
    other = {"val": "test", "test": "val"}[better]
    assert suspected({better: scores(60, 1.0), other: scores(60, 0.7)}) == [better]
    (problem,) = problems("m", {better: scores(60, 1.0), other: scores(60, 0.7)})
    statement = {"val": "train+val", "test": "all"}[better]
    assert f"discover --trained-on m={statement}" in problem.remedy
    assert problem.severity == "warning"


def test_losses_tell_more_than_accuracies():
    """Both right on most rows, and far more certain on one split."""
    unseen = {"val": scores(200, 0.97, 0.3, 1), "test": scores(200, 0.98, 0.02, 2)}
    assert suspected(unseen) == ["test"]
    (problem,) = problems("m", unseen)
    assert "Mann-Whitney p" in problem.message


def test_few_rows_prove_nothing():
    assert suspected({"val": scores(8, 0.6), "test": scores(8, 1.0)}) == []


def test_a_full_network_may_be_better_than_its_fold_networks_but_not_by_far():
    out_of_fold = scores(1000, 0.80)
    assert suspected({"test": scores(5000, 0.87)}, scores(5000, 0.80)) == []  # beyond chance, and not by far
    assert suspected({"test": scores(1000, 0.97)}, out_of_fold) == ["test"]
    assert suspected({"train": scores(1000, 1.0)}, out_of_fold) == []
    assert suspected({"test": scores(20, 1.0)}, out_of_fold) == []  # 20 rows: up to 32% of errors


def test_chance_is_reported_no_more_often_than_stated():
    """Two splits of one network, many times: the two tests share the level."""
    runs, reported = 2000, 0
    for _ in range(runs):
        probabilities = RNG.beta(2, 1, 80)
        hits = RNG.random(80) < probabilities
        parts = [Scores(40, int(hits[rows].sum()), -np.log(probabilities[rows])) for rows in (slice(40), slice(40, 80))]
        reported += bool(problems("m", {"val": parts[0], "test": parts[1]}))
    # Either split may be the better one: twice the level, and four standard errors.
    assert reported / runs < 2 * ALPHA + 4 * np.sqrt(2 * ALPHA / runs)


def test_a_group_counts_as_one_row():
    known, other = scores(400, 0.93), scores(400, 0.80)
    assert suspected({"val": known, "test": other}) == ["val"]
    of_groups = [replace(each, units=40) for each in (known, other)]
    assert suspected(dict(zip(("val", "test"), of_groups, strict=True))) == []
    assert of_groups[0].independent() == (40, 37)
    assert suspected({"test": scores(1000, 0.97)}, scores(1000, 0.80)) == ["test"]
    assert suspected({"test": replace(scores(1000, 0.97), units=40)}, scores(1000, 0.80)) == []
