"""Searches along paths of settings: where a vote stops, that it reads its own rows alone, that no engine matters."""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import numpy as np
import pytest

from utils.core import engines
from utils.numeric.metrics import log_loss, log_loss_per_row
from utils.numeric.nested_cv import cross_validate
from utils.numeric.setting_paths import PATIENCE, Vote, path_predictions
from utils.numeric.setting_search import Selection

N, C, K = 60, 3, 4
AMOUNTS = ((0.0, 2.0, 8.0, 32.0, 128.0, 512.0), (3.0, 5.0, 7.0, 1000.0, 2000.0, 4000.0))


@dataclass
class PriorPaths:
    """Class frequencies shrunk to equal ones along two paths of amounts; fits advance together, by parity of rows."""

    steps: list[tuple[int, bytes]] = field(default_factory=list)
    """(path, rows that are held out) of every step that was made"""
    thread_safe: ClassVar[bool] = True

    def settings(self) -> Sequence[Mapping[str, Any]]:
        return [{"amount": amount} for path in AMOUNTS for amount in path]

    def paths(self) -> Sequence[Sequence[int]]:
        return [range(6), range(6, 12)]

    def trainings(self, path, logits, labels, held_out_sets):
        groups = [list(range(first, len(held_out_sets), 2)) for first in range(min(2, len(held_out_sets)))]
        return [(fits, _Steps(self, path, labels, [held_out_sets[fit] for fit in fits])) for fits in groups]

    def predictions(self, logits, labels, held_out):
        return path_predictions(self, logits, labels, held_out)


@dataclass
class _Steps:
    learner: PriorPaths
    path: int
    labels: np.ndarray
    held_out_sets: Sequence[np.ndarray]
    done: int = 0

    def advance(self, wanted):
        amount = AMOUNTS[self.path][self.done]
        self.done += 1
        self.learner.steps += [(self.path, self.held_out_sets[number].tobytes()) for number in wanted]
        found = []
        for number in wanted:
            held_out = self.held_out_sets[number]
            counts = np.bincount(self.labels[~held_out], minlength=C) + amount
            found.append(np.tile(counts / counts.sum(), (held_out.sum(), 1)).astype(np.float32))
        return found


class Apart(engines.Local):
    """An engine whose jobs keep nothing."""

    shares_memory = False


@pytest.fixture
def rows():
    rng = np.random.default_rng(4)
    return np.zeros((2, N, C), dtype=np.float32), rng.choice(C, N, p=[0.5, 0.3, 0.2]), np.arange(N) % K


def read_settings(losses, allowed):
    """For each path, its allowed settings until two in a row are no better than the best before."""
    read = []
    for path in allowed:
        reached = []
        for setting in path:
            reached.append(setting)
            if len(reached) - 1 - int(losses[reached].argmin()) >= PATIENCE:
                break
        read.append(reached)
    return read


def selected(answers, labels, screening, first_answers=None):
    """The literal rule for answers (12, n, C): two rounds, the first on the rows `screening`, bool (n,).

    The first round reads `first_answers` (12, n, C) if given.
    """
    losses = np.stack([log_loss_per_row(one, labels) for one in answers])
    first_losses = losses
    if first_answers is not None:
        first_losses = np.stack([log_loss_per_row(one, labels) for one in first_answers])
    first = first_losses[:, screening].mean(axis=1)
    reached = read_settings(first, PriorPaths().paths())
    best = [settings[int(first[settings].argmin())] for settings in reached]
    least = best[int(first[best].argmin())]
    near = []
    for settings, setting in zip(reached, best, strict=True):
        differences = first_losses[setting, screening] - first_losses[least, screening]
        error = differences.std() / np.sqrt(len(differences))
        near.append(settings if differences.mean() <= 2 * error else [])
    second = losses.mean(axis=1)
    candidates = sorted(setting for settings in read_settings(second, near) for setting in settings)
    return candidates[int(second[candidates].argmin())]


def literal(labels, folds, n_folds=K):
    """Unseen probabilities by nested loops that share nothing and make every fit whole.

    Second, those of copies without two folds, {(fold, other): (n, C)} of the rows outside of the first.
    """
    logits, unseen, without_two = np.zeros((2, N, C)), np.empty((N, C), dtype=np.float32), {}
    for outer in range(n_folds):
        outside = folds != outer
        screening = np.isin(folds, [(outer + 1) % n_folds, (outer - 1) % n_folds])
        answers = np.empty((12, N, C), dtype=np.float32)
        for inner in set(range(n_folds)) - {outer}:
            train, held_out = outside & (folds != inner), folds == inner
            answers[:, held_out] = PriorPaths().predictions(logits[:, train], labels[train], logits[:, held_out])
        for inner in set(range(n_folds)) - {outer}:
            voting = outside & (folds != inner)
            chosen = selected(answers[:, voting], labels[voting], screening[voting])
            without_two[outer, inner] = answers[chosen, outside]
        chosen = selected(answers[:, outside], labels[outside], screening[outside])
        unseen[~outside] = PriorPaths().predictions(logits[:, outside], labels[outside], logits[:, ~outside])[chosen]
    return unseen, without_two


def literal_setting(labels, folds, n_folds):
    """The final setting: the first round by fits without a row's fold and the next, the second without its fold."""
    logits, answers = np.zeros((2, N, C)), np.empty((2, 12, N, C), dtype=np.float32)
    for fold in range(n_folds):
        inside = folds == fold
        for first, left_out in ((0, (fold, (fold + 1) % n_folds)), (1, (fold,))):
            train = ~np.isin(folds, left_out)
            predicted = PriorPaths().predictions(logits[:, train], labels[train], logits[:, inside])
            answers[first, :, inside] = predicted.transpose(1, 0, 2)
    return selected(answers[1], labels, np.ones(N, dtype=bool), answers[0])


def test_a_vote_stops_after_settings_that_are_no_better_than_its_best():
    vote = Vote.on([range(7)])
    for place, loss in enumerate((3.0, 2.0, 2.0, 1.9, 1.9)):
        vote.count(0, range(place + 1), loss)
        assert vote.remaining[0]
    vote.count(0, range(6), 1.9)
    assert not vote.remaining[0]
    assert vote.selected == 3


@pytest.mark.parametrize("seed", [*range(6), 25, 35, 54])  # the last three decide by the screening of the final fit
@pytest.mark.parametrize("n_folds", [3, K, 5])
def test_unseen_predictions_are_those_of_the_literal_procedure(rows, seed, n_folds):
    logits, folds = rows[0], np.arange(N) % n_folds
    labels = np.random.default_rng(seed).choice(C, N, p=[0.7, 0.2, 0.1])
    found = cross_validate(PriorPaths(), logits, labels, folds)
    unseen, without_two = literal(labels, folds, n_folds)
    np.testing.assert_array_equal(found.nested_crossfit, unseen)
    for (fold, other), expected in without_two.items():
        np.testing.assert_array_equal(found.inner_nested[fold][other], expected)
    assert found.setting == literal_setting(labels, folds, n_folds) == int(np.nanargmin(found.setting_losses))
    assert log_loss(found.held_out.probabilities, labels) == pytest.approx(np.nanmin(found.setting_losses))


def test_fits_go_no_further_than_a_vote_looks(rows):
    logits, _, folds = rows
    labels = np.where(np.arange(N) % 10 < 8, 0, 1 + np.arange(N) // 10 % 2)
    learner = PriorPaths()
    found = cross_validate(learner, logits, labels, folds)
    counts = [Counter(mask for of_path, mask in learner.steps if of_path == path) for path in range(2)]
    assert len(counts[0]) == K * (K + 1) // 2
    assert max(counts[0].values()) <= 6
    assert max(counts[1].values()) < 6  # equal shares are far from those of these classes
    assert np.isnan(found.setting_losses[11])
    assert np.isfinite(found.setting_losses).sum() <= max(counts[0].values()) + max(counts[1].values())


def test_the_second_round_leaves_out_paths_that_are_worse_by_more_than_chance(rows, monkeypatch):
    logits, _, folds = rows
    labels = np.where(np.arange(N) < K, 1, 0)
    monkeypatch.setattr(sys.modules[__name__], "AMOUNTS", (AMOUNTS[0], tuple(1e3 * amount for amount in AMOUNTS[1])))
    learner = PriorPaths()
    found = cross_validate(learner, logits, labels, folds)
    first_round = [np.isin(folds, [fold, (fold + 1) % K]) for fold in range(K)]
    assert {mask for path, mask in learner.steps if path == 1} == {mask.tobytes() for mask in first_round}
    assert np.isnan(found.setting_losses[6:]).all()
    assert found.n_tried > np.isfinite(found.setting_losses).sum()


@dataclass
class OnePath(PriorPaths):
    """The first path alone."""

    def settings(self) -> Sequence[Mapping[str, Any]]:
        return super().settings()[:6]

    def paths(self) -> Sequence[Sequence[int]]:
        return super().paths()[:1]


@pytest.mark.parametrize("seed", range(20))
def test_a_learner_with_one_path_is_searched_in_one_round_on_all_folds(rows, seed):
    logits, _, folds = rows
    labels = np.random.default_rng(seed).choice(C, N, p=[0.5, 0.3, 0.2])
    found = cross_validate(OnePath(), logits, labels, folds)
    answers = np.empty((6, N, C), dtype=np.float32)
    for fold in range(K):
        train, held_out = folds != fold, folds == fold
        answers[:, held_out] = OnePath().predictions(logits[:, train], labels[train], logits[:, held_out])
    losses = np.array([log_loss(one, labels) for one in answers])
    (reached,) = read_settings(losses, [range(6)])
    np.testing.assert_allclose(found.setting_losses[reached], losses[reached])
    assert np.isnan(np.delete(found.setting_losses, reached)).all()


@pytest.mark.parametrize("learner", [PriorPaths, OnePath])
def test_a_copy_fitted_on_one_row_takes_the_first_setting(rows, learner):
    logits, labels, folds = rows[0][:, :4], np.array([0, 1, 2, 1]), np.array([0, 1, 1, 1])
    found = cross_validate(learner(), logits, labels, folds)
    expected = learner().predictions(logits[:, :1], labels[:1], logits[:, 1:])[0]
    np.testing.assert_array_equal(found.nested_crossfit[1:], expected)
    assert list(found.inner_held_out) == [0]


def test_neither_setting_nor_stop_of_a_copy_depends_on_the_labels_of_its_fold(rows):
    logits, labels, folds = rows
    before = cross_validate(PriorPaths(), logits, labels, folds)
    for fold in range(K):
        changed = np.where(folds == fold, (labels + 1) % C, labels)
        after = cross_validate(PriorPaths(), logits, changed, folds)
        inside = folds == fold
        np.testing.assert_array_equal(after.nested_crossfit[inside], before.nested_crossfit[inside])
        np.testing.assert_array_equal(
            after.inner_held_out[fold].probabilities, before.inner_held_out[fold].probabilities
        )
        for other, probabilities in after.inner_nested[fold].items():
            np.testing.assert_array_equal(probabilities, before.inner_nested[fold][other])


@pytest.mark.parametrize("n_folds", [K, 2, 1])
def test_threads_and_an_engine_that_keeps_no_state_give_the_same_bytes(rows, n_folds, monkeypatch):
    logits, labels, folds = rows
    folds = folds % n_folds
    here = cross_validate(PriorPaths(), logits, labels, folds)
    beside = cross_validate(PriorPaths(), logits, labels, folds, n_jobs=3)
    monkeypatch.setattr(engines, "_current", Apart())
    apart = cross_validate(PriorPaths(), logits, labels, folds)
    for other in (beside, apart):
        for name in ("setting_losses", "nested_crossfit"):
            assert getattr(here, name).tobytes() == getattr(other, name).tobytes(), name
        assert here.held_out.probabilities.tobytes() == other.held_out.probabilities.tobytes()


def test_one_row_takes_the_first_setting(rows):
    logits, labels, _ = rows
    found = cross_validate(PriorPaths(), logits[:, :1], labels[:1], np.zeros(1, dtype=int))
    assert (found.setting, found.held_out) == (0, None)
    assert np.isnan(found.setting_losses).all()


def test_a_search_goes_on_for_a_copy_without_the_fold_that_stopped_the_others(rows):
    folds = rows[2]
    selection = Selection.without(np.zeros(N, dtype=bool), folds, [range(6)], are_nested=True)
    for place in range(1 + PATIENCE):
        assert selection.reads(0, is_first=False)
        selection.count(0, range(place + 1), np.where(folds == 0, 9.0 * place, -1.0 * place))
    assert not selection.vote.remaining[0]
    assert [bool(vote.remaining[0]) for vote in selection.votes_without.values()] == [True, False, False, False]
    assert selection.reads(0, is_first=False)
    selection.count(0, range(2 + PATIENCE), np.full(N, -9.0))
    assert np.isnan(selection.vote.losses[1 + PATIENCE])
    assert selection.votes_without[0].selected == 1 + PATIENCE
