"""Which scores speak against a statement on training data, on counts and losses made by hand."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from scipy.stats import binomtest, fisher_exact, mannwhitneyu

from utils.predictions.training_evidence import Scores, problems

RNG = np.random.default_rng(0)
ALPHA = 0.001  # as docs/contract.md states


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


def test_accuracies_are_suspected_from_the_p_value_of_fishers_test_on():
    for other_hits in (20, 30, 40):
        table = [(hits, [[hits, 60 - hits], [other_hits, 50 - other_hits]]) for hits in range(61)]
        expected = {
            hits: f"{p:.1g}"
            for hits, counts in table
            if (p := fisher_exact(counts, alternative="greater").pvalue) < ALPHA / 2
        }
        found = {}
        for hits in range(61):
            for problem in problems("m", {"val": Scores(60, hits), "test": Scores(50, other_hits)}):
                if "it may have been trained on images of val" in problem.message:
                    found[hits] = problem.message.partition("Fisher's exact p = ")[2].partition(")")[0]
        assert found == expected
        assert expected


def test_losses_are_suspected_from_the_p_value_of_the_mann_whitney_test_on():
    val, test = (np.random.default_rng(seed).gamma(1.0, 1.0, 50) for seed in (1, 2))
    found, expected = [], []
    for shift in np.linspace(0, 1, 41):
        unseen = {"val": Scores(50, 30, val), "test": Scores(50, 30, test + shift)}
        found.append(suspected(unseen) == ["val"])
        expected.append(mannwhitneyu(val, test + shift, alternative="less").pvalue < ALPHA / 2)
    assert found == expected
    assert 0 < sum(expected) < 41


def test_losses_of_a_higher_mean_are_never_suspected():
    """Most rows have lower losses, and a few far higher ones, so that the mean is 3, or 1 as that of the others."""
    val, test = np.linspace(0.1, 0.2, 50), np.linspace(0.3, 0.4, 50)
    assert suspected({"val": Scores(50, 30, val), "test": Scores(50, 30, test)}) == ["val"]
    for n, high in ((3, 50.0), (1, 50.0)):
        few = np.where(np.arange(50) < n, high, 0.0)
        assert suspected({"val": Scores(50, 30, few), "test": Scores(50, 30, np.ones(50))}) == []


@pytest.mark.parametrize("missing", ["val", "test"])
def test_losses_that_only_one_split_has_say_nothing(missing):
    unseen = {"val": scores(60, 0.8, 0.1), "test": scores(60, 0.8, 5.0)}
    assert suspected(unseen) == ["val"]
    assert suspected(unseen | {missing: replace(unseen[missing], losses=None)}) == []


def test_half_of_the_errors_are_told_by_the_ends_of_exact_intervals():
    """The levels of both one-sided bounds are ALPHA / 2, so those of the two-sided intervals 1 - ALPHA."""

    def error_interval(rows, hits):
        return binomtest(rows - hits, rows).proportion_ci(confidence_level=1 - ALPHA, method="exact")

    highest = [error_interval(60, hits).high for hits in range(61)]
    numbers = set()
    for other_hits in range(40):
        found = [bool(suspected({"val": Scores(60, hits)}, Scores(40, other_hits))) for hits in range(61)]
        lowest = error_interval(40, other_hits).low
        assert found == [bound < lowest / 2 for bound in highest]
        numbers.add(sum(found))
    assert len(numbers) > 10  # the smallest number of hits depends on those of the fold networks


@pytest.mark.parametrize("hits", [0, 990, 1000])
def test_no_split_halves_the_errors_of_fold_networks_without_any(hits):
    assert suspected({"test": Scores(1000, hits)}, Scores(1000, 1000)) == []
