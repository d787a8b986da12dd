"""Losses with each member added are those of the metrics' own functions on the mixtures."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from utils.core.errors import UserError
from utils.numeric.candidate_losses import SCORERS, candidate_losses, make_scorer, weighted_sum
from utils.numeric.metrics import METRICS, softmax

RULES = sorted(METRICS)
M, N, C = 6, 157, 5


@pytest.fixture
def rows():
    rng = np.random.default_rng(4)
    labels = rng.integers(0, C, N)
    logits = rng.normal(size=(M, N, C)) * np.array([0.2, 1, 1, 5, 60, 200])[:, None, None]
    logits[:, np.arange(N), labels] += 1
    return softmax(logits).astype(np.float32), labels


def literal(total, size, probabilities, labels, metric):
    function, higher_is_better = METRICS[metric]
    found = np.array([function((total + member) / (size + 1), labels) for member in probabilities.astype(np.float64)])
    return 1 - found if higher_is_better else found


def test_every_metric_of_the_configuration_can_be_scored():
    assert SCORERS.keys() == METRICS.keys()


@pytest.mark.parametrize("metric", RULES)
def test_a_pool_that_grows_is_scored_exactly(metric, rows):
    probabilities, labels = rows
    total, growing = np.zeros((N, C)), make_scorer(*rows, metric)
    for size, member in enumerate((4, 1, 1, 5, 0, 2)):
        expected = literal(total, size, probabilities, labels, metric)
        np.testing.assert_allclose(growing.losses(all_exact=True), expected, rtol=0, atol=1e-13)
        rough = growing.losses()
        near = expected < expected.min() + 5e-7
        np.testing.assert_allclose(rough, expected, rtol=0, atol=1e-6)
        np.testing.assert_allclose(rough[near], expected[near], rtol=0, atol=1e-13)
        growing.add(member)
        total += probabilities[member]
        assert growing.loss() == pytest.approx(expected[member], abs=1e-13)


@pytest.mark.parametrize("metric", ["accuracy", "f1_macro"])
@pytest.mark.parametrize("has_start", [False, True])
def test_rows_in_which_few_or_hundreds_of_classes_can_win(metric, has_start, monkeypatch):
    monkeypatch.setattr("utils.numeric.vote_losses.CHUNK", 2000)
    rng = np.random.default_rng(7)
    labels = rng.integers(0, 300, 400)
    logits = rng.normal(size=(5, 400, 300)) * np.linspace(0.001, 4, 400)[:, None]
    logits[:, np.arange(400), labels] += np.linspace(0, 8, 400)
    logits[:, :40] = np.round(logits[0, :40])  # equal members and equal classes
    probabilities = softmax(logits).astype(np.float32)
    scorer = make_scorer(probabilities, labels, metric)
    total, size = np.zeros((400, 300)), 0.0
    if has_start:
        total, size = 20 * softmax(rng.normal(size=(400, 300)) + 4 * np.eye(300)[labels]), 20.0
        scorer.reset(total, size)
    for member in (3, 1, 1, 4, 0):
        expected = literal(total, size, probabilities, labels, metric)
        np.testing.assert_allclose(scorer.losses(), expected, rtol=0, atol=1e-13)
        scorer.add(member)
        total, size = total + probabilities[member], size + 1
        assert scorer.loss() == pytest.approx(expected[member], abs=1e-13)


@pytest.mark.parametrize("metric", RULES)
def test_candidates_join_a_mixture_that_is_none_of_theirs(metric, rows):
    probabilities, labels = rows
    current = softmax(np.random.default_rng(0).normal(size=(N, C)))
    for weight in (1e-9, 0.1, 0.5, 1):
        found = candidate_losses(current, probabilities, labels, weight=weight, metric=metric)
        total, size = current * ((1 - weight) / weight), (1 - weight) / weight
        np.testing.assert_allclose(found, literal(total, size, probabilities, labels, metric), rtol=0, atol=1e-12)


@pytest.mark.parametrize("metric", RULES)
def test_candidates_that_all_agree_need_not_turn_a_mixture_that_is_none_of_theirs(metric):
    members = np.full((2, 4, 2), (0.9, 0.1), dtype=np.float32)
    current, labels = np.full((4, 2), (0.2, 0.8)), np.array([1, 1, 1, 0])
    for weight in (0.1, 0.9):
        found = candidate_losses(current, members, labels, weight=weight, metric=metric)
        total, size = current * ((1 - weight) / weight), (1 - weight) / weight
        np.testing.assert_allclose(found, literal(total, size, members, labels, metric), rtol=0, atol=1e-12)


@pytest.mark.skipif(not Path("/proc/self/status").is_file(), reason="memory is told by Linux alone")
@pytest.mark.parametrize("metric", RULES)
def test_a_memory_map_does_not_stay_in_memory(metric, tmp_path, monkeypatch):
    def of_files():
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) for line in lines if line.startswith("RssFile:")) / 1000

    monkeypatch.setattr("utils.numeric.member_blocks.MAX_MAPPED_BYTES", 2**20)
    np.save(tmp_path / "probabilities.npy", np.full((40, 20_000, 10), 0.1, dtype=np.float32))
    mapped = np.load(tmp_path / "probabilities.npy", mmap_mode="r")
    before = of_files()
    growing = make_scorer(mapped, np.zeros(20_000, dtype=int), metric)
    growing.losses()
    growing.add(0)
    growing.losses()
    assert of_files() - before < 10  # of 32 MB


@pytest.mark.parametrize("metric", RULES)
def test_a_scorer_can_begin_anew(metric, rows):
    used = make_scorer(*rows, metric)
    fresh = used.losses()
    used.add(2)
    total = weighted_sum(rows[0], np.array([0, 0.5, 0, 0, 2, 0]))
    used.reset(total, 2.5)
    new = make_scorer(*rows, metric)
    new.reset(total, 2.5)
    assert used.losses().tolist() == new.losses().tolist() != fresh.tolist()


@pytest.mark.parametrize("metric", RULES)
def test_many_members_are_scored_in_blocks(metric, rows, monkeypatch):
    whole = make_scorer(*rows, metric).losses()
    for module in ("member_blocks", "candidate_losses"):
        monkeypatch.setattr(f"utils.numeric.{module}.BLOCK", 200)
    np.testing.assert_allclose(make_scorer(*rows, metric).losses(), whole, rtol=0, atol=1e-15)


@pytest.mark.parametrize("metric", RULES)
@pytest.mark.parametrize("wrong", [np.nan, np.inf, -0.1, 1.1])
def test_a_member_with_numbers_that_are_no_probabilities_is_named(metric, wrong, rows):
    probabilities, labels = rows
    probabilities[3, 7] = wrong
    with pytest.raises(UserError, match="member 3 range from"):
        make_scorer(probabilities, labels, metric)


@pytest.mark.parametrize(
    ("shape", "labels", "words"),
    [
        ((2, 3), [0, 0, 0], r"found shape \(2, 3\)"),
        ((0, 3, 2), [0, 0, 0], r"found shape \(0, 3, 2\)"),
        ((2, 3, 2), [0, 0], r"expected integers of shape \(3,\)"),
        ((2, 3, 2), [0.0, 0, 1], "found float64"),
        ((2, 3, 2), [0, -1, 1], r"found -1..1; expected 0..1"),
        ((2, 3, 2), [0, 2, 1], r"found 0..2; expected 0..1"),
    ],
)
def test_shapes_and_labels_that_do_not_fit_are_told(shape, labels, words):
    with pytest.raises(UserError, match=words):
        make_scorer(np.full(shape, 0.5, dtype=np.float32), np.array(labels), "log_loss")


def test_a_weight_that_is_none_is_told(rows):
    with pytest.raises(UserError, match=r"found 0; expected a number from 1e-9 to 1"):
        candidate_losses(rows[0][0], *rows, weight=0, metric="log_loss")
