"""Greedy selection is, step by step, what a slow and literal reading of the papers chooses."""

from __future__ import annotations

import numpy as np
import pytest

from utils.core.errors import UserError
from utils.numeric.candidate_losses import TIE_TOLERANCE
from utils.numeric.metrics import METRICS, softmax
from utils.numeric.selection import select_members

RULES = sorted(METRICS)


def loss_of(members, probabilities, labels, metric, start=None):
    """Loss of the mean of these members, by the metric's own function."""
    counts = np.zeros(len(probabilities)) if start is None else start
    total = np.einsum("m,mnc->nc", counts, probabilities.astype(np.float64))
    for member in members:
        total = total + probabilities[member]
    found = METRICS[metric].function(total / (counts.sum() + len(members)), labels)
    return 1 - found if METRICS[metric].higher_is_better else found


def first_best(losses, seconds=None, random=None):
    """Place of the least loss; of equals the one of least second loss; of those the first, or one drawn."""
    best = [place for place, loss in enumerate(losses) if loss <= min(losses) + TIE_TOLERANCE]
    if seconds is not None:
        least = min(seconds[place] for place in best)
        best = [place for place in best if seconds[place] <= least + TIE_TOLERANCE]
    return best[0] if random is None else int(random.choice(best))


def shortest_best(losses, lowest=np.inf):
    kept = 0
    for count, loss in enumerate(losses, start=1):
        if loss < lowest - TIE_TOLERANCE:
            lowest, kept = loss, count
    return kept


def reference(probabilities, labels, metric, steps, *, sorted_start=False, start=None, tie_breaker=None, random=None):
    """Members taken, losses and how many are kept: one candidate and one whole mixture at a time."""
    everyone = range(len(probabilities))
    members, losses = [], []
    if sorted_start:
        alone = [loss_of([member], probabilities, labels, metric) for member in everyone]
        order = []
        while len(order) < min(steps, len(alone)):
            order.append(first_best([np.inf if member in order else alone[member] for member in everyone]))
        losses = [loss_of(order[:count], probabilities, labels, metric) for count in range(1, len(order) + 1)]
        count = shortest_best(losses)
        members, losses = order[:count], losses[:count]
    while len(members) < steps:
        tried = [loss_of([*members, member], probabilities, labels, metric, start) for member in everyone]
        second = None
        if tie_breaker:
            second = [loss_of([*members, member], probabilities, labels, tie_breaker, start) for member in everyone]
        best = first_best(tried, second, random)
        members.append(best)
        losses.append(tried[best])
    before = np.inf if start is None else loss_of([], probabilities, labels, metric, start)
    return members, losses, shortest_best(losses, before)


def draw(seed):
    """Small problems of every kind: sharp, flat, rounded to quarters, with twins, with members that all agree."""
    rng = np.random.default_rng(seed)
    members, rows, classes = int(rng.integers(1, 8)), int(rng.integers(1, 60)), int(rng.integers(1, 6))
    labels = rng.integers(0, classes, rows)
    logits = rng.normal(size=(members, rows, classes)) * rng.choice([0.3, 2, 60])
    logits[:, np.arange(rows), labels] += rng.choice([0, 1, 4])
    if seed % 3 == 0:
        logits[:, ::2] = logits[:1, ::2] * rng.uniform(0.5, 2, size=(members, 1, 1))  # all agree on every other row
    probabilities = softmax(logits).astype(np.float32)
    if seed % 4 == 1:
        probabilities = np.floor(probabilities * 4) / 4  # many exact ties
        probabilities[..., 0] += 1 - probabilities.sum(axis=2)
    if seed % 5 == 2:
        probabilities[-1] = probabilities[0]
    return probabilities.astype(np.float32), labels


def assert_equal(found, expected):
    members, losses, kept = expected
    assert found.members == tuple(members)
    np.testing.assert_allclose(found.losses, losses, rtol=0, atol=TIE_TOLERANCE)
    assert found.size == kept


@pytest.mark.parametrize("metric", RULES)
def test_it_equals_the_reference_step_by_step(metric):
    for seed in range(60):
        probabilities, labels = draw(seed)
        for sorted_start in (False, True):
            found = select_members(probabilities, labels, metric=metric, steps=7, sorted_start=sorted_start)
            expected = reference(probabilities, labels, metric, 7, sorted_start=sorted_start)
            assert_equal(found.paths[0], expected)
            kept = expected[0][: expected[2]]
            assert found.counts.tolist() == np.bincount(kept, minlength=len(probabilities)).tolist()
            assert found.weights.sum() == pytest.approx(1)


@pytest.mark.parametrize("metric", RULES)
def test_it_goes_on_from_a_weighted_pool(metric):
    for seed in range(30):
        probabilities, labels = draw(seed)
        start = np.random.default_rng(seed).dirichlet(np.ones(len(probabilities))) * 4
        found = select_members(probabilities, labels, metric=metric, steps=5, start=start)
        assert_equal(found.paths[0], reference(probabilities, labels, metric, 5, start=start))
        taken = found.paths[0].members[: found.paths[0].size]
        np.testing.assert_allclose(found.counts, start + np.bincount(taken, minlength=len(start)))


@pytest.mark.parametrize("metric", ["accuracy", "f1_macro"])
def test_log_loss_decides_between_equals_where_it_is_asked_to(metric):
    differs = 0
    for seed in range(40):
        probabilities, labels = draw(seed)
        found = select_members(probabilities, labels, metric=metric, steps=5, tie_breaker="log_loss")
        assert_equal(found.paths[0], reference(probabilities, labels, metric, 5, tie_breaker="log_loss"))
        differs += (
            found.paths[0].members != select_members(probabilities, labels, metric=metric, steps=5).paths[0].members
        )
    assert differs > 10


@pytest.mark.parametrize("metric", ["accuracy", "f1_macro"])
def test_later_tries_draw_among_equals_and_the_best_is_taken(metric):
    gains = 0
    for seed in range(40):
        probabilities, labels = draw(seed)
        ways = [reference(probabilities, labels, metric, 6)]
        for number in (1, 2, 3):
            random = np.random.default_rng([seed, 0, number])
            ways.append(reference(probabilities, labels, metric, 6, random=random))
        best = ways[0]
        for way in ways[1:]:
            best = way if min(way[1]) < min(best[1]) - TIE_TOLERANCE else best
        found = select_members(probabilities, labels, metric=metric, steps=6, n_tries=4, seed=seed).paths[0]
        assert_equal(found, best)
        gains += best is not ways[0]
    assert gains


@pytest.fixture(scope="module")
def digits():
    """What four models say of digits that they did not see."""
    from sklearn.datasets import load_digits
    from sklearn.discriminant_analysis import LinearDiscriminantAnalysis
    from sklearn.model_selection import cross_val_predict
    from sklearn.naive_bayes import GaussianNB
    from sklearn.neighbors import KNeighborsClassifier
    from sklearn.tree import DecisionTreeClassifier

    images, labels = load_digits(return_X_y=True)
    models = (
        GaussianNB(var_smoothing=1e-3),
        KNeighborsClassifier(5),
        LinearDiscriminantAnalysis(),
        DecisionTreeClassifier(max_depth=9, random_state=0),
    )
    found = [cross_val_predict(model, images[:900], labels[:900], cv=3, method="predict_proba") for model in models]
    return np.array(found, dtype=np.float32), labels[:900]


@pytest.mark.parametrize("metric", RULES)
def test_it_equals_the_reference_on_models_of_digits(metric, digits):
    assert_equal(select_members(*digits, metric=metric, steps=10).paths[0], reference(*digits, metric, 10))


@pytest.mark.parametrize("metric", RULES)
def test_the_order_of_rows_does_not_matter(metric, digits):
    probabilities, labels = digits
    order = np.random.default_rng(0).permutation(len(labels))
    found = select_members(probabilities[:, order], labels[order], metric=metric, steps=12)
    assert found.paths[0].members == select_members(probabilities, labels, metric=metric, steps=12).paths[0].members


@pytest.mark.parametrize("metric", RULES)
def test_no_more_members_are_kept_than_have_the_lowest_loss(metric, digits):
    path = select_members(*digits, metric=metric, steps=20).paths[0]
    assert len(path.members) == len(path.losses) == 20
    assert path.losses[path.size - 1] == pytest.approx(min(path.losses), abs=TIE_TOLERANCE)
    assert min(path.losses[: path.size - 1], default=np.inf) > min(path.losses) + TIE_TOLERANCE


@pytest.mark.parametrize("metric", RULES)
def test_a_start_that_nothing_improves_stays_as_it_is(metric):
    sure = np.array([[[1, 0], [0, 1]], [[0.2, 0.8], [0.9, 0.1]]], dtype=np.float32)
    found = select_members(sure, np.array([0, 1]), metric=metric, steps=3, start=np.array([2.0, 0.0]))
    assert found.paths[0].size == 0
    assert found.counts.tolist() == [2, 0]


def test_of_twins_the_first_is_taken(digits):
    probabilities, labels = digits
    doubled = np.repeat(probabilities, 2, axis=0)
    for metric in RULES:
        assert not set(select_members(doubled, labels, metric=metric).paths[0].members) & {1, 3, 5, 7}


def test_a_compromise_wins_that_no_member_votes_for():
    probabilities = np.array([[[0.5, 0.1, 0.4]], [[0.1, 0.5, 0.4]]], dtype=np.float32)
    path = select_members(probabilities, np.array([2]), metric="accuracy", steps=3).paths[0]
    assert path.members == (0, 1, 0)
    assert path.losses == (1, 0, 0)
    assert path.size == 2


def test_bags_draw_their_members_by_the_seed(digits):
    probabilities, labels = digits
    probabilities = np.concatenate([probabilities, probabilities[:, ::-1]])  # four that know nothing
    found = select_members(probabilities, labels, metric="log_loss", steps=6, bags=8, seed=3)
    again = select_members(probabilities, labels, metric="log_loss", steps=6, bags=8, seed=3)
    assert found.paths == again.paths
    assert found.paths != select_members(probabilities, labels, metric="log_loss", steps=6, bags=8, seed=4).paths
    assert len({path.members for path in found.paths}) > 1
    assert all(len(set(path.members)) <= 4 for path in found.paths)
    kept = [member for path in found.paths for member in path.members[: path.size]]
    assert found.counts.tolist() == np.bincount(kept, minlength=8).tolist()
    whole = select_members(probabilities, labels, metric="log_loss", steps=6, bags=1, bag_fraction=1)
    assert whole.paths == select_members(probabilities, labels, metric="log_loss", steps=6).paths


@pytest.mark.parametrize("metric", RULES)
def test_a_memory_map_gives_the_same_and_is_left_alone(metric, digits, tmp_path):
    probabilities, labels = digits
    np.save(tmp_path / "probabilities.npy", probabilities)
    before = (tmp_path / "probabilities.npy").read_bytes()
    mapped = np.load(tmp_path / "probabilities.npy", mmap_mode="r")
    found = select_members(mapped, labels, metric=metric, steps=6, start=np.array([1, 0, 1, 0]))
    assert (
        found.paths == select_members(probabilities, labels, metric=metric, steps=6, start=np.array([1, 0, 1, 0])).paths
    )
    assert (tmp_path / "probabilities.npy").read_bytes() == before
    changed = np.load(tmp_path / "probabilities.npy", mmap_mode="c")
    changed[1] = changed[0]  # in this process's memory alone
    twins = probabilities.copy()
    twins[1] = twins[0]
    assert select_members(changed, labels, metric=metric).paths == select_members(twins, labels, metric=metric).paths


@pytest.mark.parametrize("metric", RULES)
def test_what_is_in_memory_is_not_written(metric, digits):
    probabilities, labels = digits
    copy = probabilities.copy()
    copy.setflags(write=False)
    select_members(copy, labels, metric=metric, steps=4, sorted_start=True, bags=2)
    assert (copy == probabilities).all()


@pytest.mark.parametrize("metric", RULES)
def test_one_member_and_one_class_are_no_special_cases(metric):
    path = select_members(np.ones((1, 5, 1), dtype=np.float32), np.zeros(5, dtype=int), metric=metric, steps=3).paths[0]
    assert path.members == (0, 0, 0)
    np.testing.assert_allclose(path.losses, 0, atol=TIE_TOLERANCE)
    assert path.size == 1


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"metric": "auc"}, "auc; expected one of log_loss"),
        ({"steps": 0}, "steps 0"),
        ({"bags": -1}, "bags -1"),
        ({"n_tries": 0}, "n_tries 0"),
        ({"bag_fraction": 0.0}, "bag_fraction 0.0"),
        ({"start": np.array([1.0])}, "expected 4 finite numbers"),
        ({"start": np.array([1, 0, 0, -1])}, "expected 4 finite numbers"),
        ({"start": np.array([1, 0, 0, np.nan])}, "expected 4 finite numbers"),
    ],
)
def test_settings_that_cannot_be_are_told(settings, words, digits):
    with pytest.raises(UserError, match=words):
        select_members(*digits, **{"metric": "log_loss", **settings})
