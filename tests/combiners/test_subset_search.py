"""Subsets of members against literal searches, with limits, ties, hopeless members and members that err alike."""

from __future__ import annotations

import numpy as np
import pytest

from utils.combiners.subset_search import (
    SEARCHES,
    BudgetError,
    CostLimit,
    SubsetProblem,
    clustering,
    diversity_max,
    greedy_backward,
    greedy_forward,
)
from utils.numeric.metrics import METRICS, log_loss, softmax

UNLIMITED = float("inf")
LETTERS = "abcdefghij"


def zoo(members=6, rows=80, classes=3, seed=0):
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, classes, rows)
    logits = rng.normal(size=(members, rows, classes)) + rng.normal(size=(1, rows, classes))
    logits[:, np.arange(rows), labels] += rng.uniform(1, 2.5, members)[:, None]
    return softmax(logits).astype(np.float32), labels


def problem(probabilities, labels, metric="f1_macro", target=6, costs=None, most=UNLIMITED):
    names = tuple(LETTERS[: len(probabilities)])
    limits = () if costs is None else (CostLimit("ms", "budget.ms", most, np.array(costs, dtype=float)),)
    return SubsetProblem(names, probabilities, labels, metric, target, limits)


def logits_with_errors(labels, wrong):
    """Probabilities (N, 2) of a member that is 0.9 sure of the truth, but for the rows where it is wrong."""
    found = np.full((len(labels), 2), 0.1, dtype=np.float32)
    found[np.arange(len(labels)), labels] = 0.9
    found[wrong] = found[wrong][:, ::-1]
    return found


def rank(task, members):
    """What is to be small: the metric as a loss, then log-loss; rounded, so that equals are equal."""
    mean = task.probabilities[sorted(members)].astype(np.float64).mean(axis=0)
    score = METRICS[task.metric].function(mean, task.labels)
    loss = -score if METRICS[task.metric].higher_is_better else score
    return round(loss, 11), round(log_loss(mean, task.labels), 11)


def fits(task, members):
    return all(np.nansum(limit.costs[list(members)]) <= limit.maximum for limit in task.limits)


def literal_forward(task):
    chosen, found = [], []
    while len(chosen) < task.target_size:
        left = [m for m in range(len(task.names)) if m not in chosen and fits(task, [*chosen, m])]
        if not left:
            break
        chosen.append(min(left, key=lambda m: (rank(task, [*chosen, m]), m)))
        found.append(tuple(chosen))
    return found


def literal_backward(task):
    kept = [m for m in range(len(task.names)) if fits(task, [m])]
    found = []
    while kept:
        if len(kept) <= task.target_size and fits(task, kept):
            found.append(tuple(kept))
        if len(kept) == 1:
            break
        kept.remove(min(kept, key=lambda m: (rank(task, [k for k in kept if k != m]), -m)))
    return found[::-1]


METRIC_NAMES = ["f1_macro", "accuracy", "log_loss", "brier"]


@pytest.mark.parametrize("metric", METRIC_NAMES)
@pytest.mark.parametrize(
    ("search", "literal"), [(greedy_forward, literal_forward), (greedy_backward, literal_backward)]
)
def test_greedy_searches_take_the_literal_steps(metric, search, literal):
    for seed in range(8):
        probabilities, labels = zoo(seed=seed)
        costs = np.random.default_rng(seed).uniform(1, 9, 6)
        for target, most in ((6, UNLIMITED), (3, UNLIMITED), (4, 14.0), (6, 8.0)):
            task = problem(probabilities, labels, metric, target, costs, most)
            assert [subset.members for subset in search(task)] == literal(task), (seed, target, most)


@pytest.mark.parametrize("search", sorted(SEARCHES))
@pytest.mark.parametrize("metric", METRIC_NAMES)
def test_subsets_grow_are_within_the_limits_and_repeat(search, metric):
    for seed in range(4):
        probabilities, labels = zoo(seed=seed)
        costs = np.random.default_rng(seed).uniform(1, 9, 6)
        task = problem(probabilities, labels, metric, 4, costs, 15.0)
        found = SEARCHES[search](task)
        sizes = [len(subset.members) for subset in found]
        assert sizes[0] == 1
        assert sizes == sorted(sizes)
        assert max(sizes) <= 4
        assert all(fits(task, subset.members) for subset in found)
        assert all(len(set(subset.members)) == len(subset.members) for subset in found)
        assert SEARCHES[search](task) == found


@pytest.mark.parametrize("search", sorted(SEARCHES))
def test_one_member_is_all_there_is(search):
    probabilities, labels = zoo(members=1)
    assert [subset.members for subset in SEARCHES[search](problem(probabilities, labels))] == [(0,)]


@pytest.mark.parametrize("search", sorted(SEARCHES))
@pytest.mark.parametrize("metric", METRIC_NAMES)
def test_of_equal_members_the_first_by_name_is_kept(search, metric):
    probabilities, labels = zoo(members=1)
    found = SEARCHES[search](problem(np.repeat(probabilities, 4, axis=0), labels, metric, 3))
    assert [sorted(subset.members) for subset in found] == [[0], [0, 1], [0, 1, 2]]


@pytest.mark.parametrize("search", sorted(SEARCHES))
@pytest.mark.parametrize("metric", METRIC_NAMES)
def test_a_single_class_is_no_obstacle(search, metric):
    probabilities, _ = zoo()
    found = SEARCHES[search](problem(probabilities, np.zeros(80, dtype=np.int64), metric, 3))
    assert len(found[0].members) == 1


@pytest.mark.parametrize("search", sorted(SEARCHES))
def test_a_target_beyond_the_members_ends_with_all_of_them(search):
    labels = np.arange(60) % 2
    apart = np.stack([logits_with_errors(labels, [3 * n, 3 * n + 1]) for n in range(4)])
    found = SEARCHES[search](problem(apart, labels, target=9))
    assert [len(subset.members) for subset in found] == [1, 2, 3, 4]


# limits ---------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("search", sorted(SEARCHES))
def test_a_member_beyond_the_limit_is_never_kept(search):
    probabilities, labels = zoo()
    best = greedy_forward(problem(probabilities, labels))[0].members[0]
    costs = np.ones(6)
    costs[best] = 5
    found = SEARCHES[search](problem(probabilities, labels, costs=costs, most=4.0))
    assert all(best not in subset.members for subset in found)
    assert len(found[-1].members) <= 4


@pytest.mark.parametrize("search", sorted(SEARCHES))
def test_what_is_not_known_does_not_bind(search):
    labels = np.arange(60) % 2
    apart = np.stack([logits_with_errors(labels, [3 * n, 3 * n + 1]) for n in range(4)])
    found = SEARCHES[search](problem(apart, labels, costs=[np.nan, np.nan, 2, 3], most=4.0))
    assert len(found[-1].members) == 3
    limit = problem(apart, labels, costs=[np.nan, 1, 2, 3], most=4.0).limits[0]
    assert limit.total([0, 1]) == 1
    assert limit.known_total([0, 1]) is None
    assert limit.known_total([1, 2]) == 3


def test_a_sum_that_rounding_lifts_above_the_limit_is_within_it():
    labels = np.arange(60) % 2
    apart = np.stack([logits_with_errors(labels, [n]) for n in range(3)])
    assert sum([0.1, 0.1, 0.1]) > 0.3
    assert len(greedy_forward(problem(apart, labels, costs=[0.1] * 3, most=0.3))[-1].members) == 3


@pytest.mark.parametrize("search", sorted(SEARCHES))
def test_limits_that_no_member_is_within_name_the_cheapest_possible(search):
    probabilities, labels = zoo(members=3)
    limits = (
        CostLimit("ms", "pruning.cost_budget.max_latency_ms", 100, np.array([400.0, 130.0, 50.0])),
        CostLimit("MB", "pruning.cost_budget.max_size_mb", 20, np.array([10.0, 10.0, 60.0])),
    )
    task = SubsetProblem(("a", "b", "c"), probabilities, labels, "f1_macro", 2, limits)
    with pytest.raises(BudgetError) as caught:
        SEARCHES[search](task)
    assert str(caught.value) == (
        "no member is within the budget; the cheapest possible is b alone: 130 ms > 100 ms "
        "(pruning.cost_budget.max_latency_ms). Raise the limit, or set it to null"
    )


# diversity ------------------------------------------------------------------------------------------------------------
def test_the_member_that_errs_elsewhere_is_taken_before_the_one_that_errs_alike():
    labels = np.arange(100) % 2
    first, alike, elsewhere = [0, 1, 2], [0, 1, 2, 3], [10, 11, 12, 13]
    task = problem(
        np.stack([logits_with_errors(labels, wrong) for wrong in (first, alike, elsewhere)]), labels, target=2
    )
    assert diversity_max(task)[-1].members == (0, 2)


def test_a_hopeless_member_is_not_taken_though_it_disagrees_most():
    labels = np.arange(100) % 2
    wrong = [range(2), range(4, 8), range(10, 60)]
    task = problem(np.stack([logits_with_errors(labels, list(rows)) for rows in wrong]), labels, target=3)
    assert task.diversity.disagreement[0].argmax() == 2
    found = diversity_max(task)[-1]
    assert found.members == (0, 1)
    assert found.reasons == {2: "hopeless: accuracy 0.5000, half-way from guessing to the best is 0.7400"}


def test_a_member_that_makes_the_mean_worse_is_not_taken():
    labels = np.arange(200) % 2
    timid = logits_with_errors(labels, [])
    timid[:] = 0.45 + 0.1 * (timid > 0.5)  # right everywhere, and not sure: 0.55
    harmful = logits_with_errors(labels, list(range(0, 40)))  # right on four fifths, and sure of it
    task = problem(np.stack([timid, harmful, timid]), labels, "accuracy", target=2)
    assert [subset.members for subset in diversity_max(task)] == [(0,), (0, 2)]


def test_members_that_disagree_equally_come_from_the_better_to_the_worse():
    labels = np.arange(100) % 2
    wrong = ([], [0, 1], [2, 3])
    members = np.stack([logits_with_errors(labels, rows) for rows in wrong])
    members[1, 50:] = 0.3 + 0.4 * (members[1, 50:] > 0.5)  # as often right, and less sure
    assert diversity_max(problem(members, labels, "log_loss", target=2))[-1].members == (0, 2)


# clusters -------------------------------------------------------------------------------------------------------------
def families():
    """Two families that err alike: a and c on the first rows, b, d and e on others; a and b are the better ones."""
    labels = np.arange(100) % 2
    wrong = (range(5), range(50, 54), range(7), range(50, 58), range(50, 59))
    return np.stack([logits_with_errors(labels, list(rows)) for rows in wrong]), labels


def test_each_family_is_represented_by_its_best():
    one, two = clustering(problem(*families(), target=2))
    assert one.members == (1,)
    assert two.members == (1, 0)
    assert two.reasons[2].startswith("represented by a (error correlation 0.8")
    assert two.reasons[3].startswith("represented by b (error correlation 0.6")


def test_where_the_best_of_a_family_has_no_room_the_next_best_stands_for_it():
    two = clustering(problem(*families(), target=2, costs=[6, 5, 2, 2, 2], most=8.0))[1]
    assert two.members == (1, 2)
    assert 0 not in two.reasons
