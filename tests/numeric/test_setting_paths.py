"""Searches along paths of settings: where a vote stops, that it reads its own rows alone, that no engine matters."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import numpy as np
import pytest

from utils.core import engines
from utils.numeric.metrics import log_loss, log_loss_per_row
from utils.numeric.nested_cv import _Scope, cross_validate
from utils.numeric.setting_paths import PATIENCE, Vote, path_predictions

N, C, K = 60, 3, 4
AMOUNTS = ((0.0, 2.0, 8.0, 32.0, 128.0, 512.0), (3.0, 5.0, 7.0, 1000.0, 2000.0, 4000.0))


@dataclass
class PriorPaths:
    """Class frequencies shrunk to equal ones along two paths of amounts; fits advance together, by parity of rows."""

    steps: list[tuple[int, int]] = field(default_factory=list)
    """(path, fit) of every step that was made"""
    thread_safe: ClassVar[bool] = True

    def settings(self) -> Sequence[Mapping[str, Any]]:
        return [{"amount": amount} for path in AMOUNTS for amount in path]

    def paths(self) -> Sequence[Sequence[int]]:
        return [range(6), range(6, 12)]

    def trainings(self, path, logits, labels, held_out_sets):
        groups = [list(range(first, len(held_out_sets), 2)) for first in range(min(2, len(held_out_sets)))]
        return [(fits, _Steps(self, path, labels, [held_out_sets[fit] for fit in fits], fits)) for fits in groups]

    def predictions(self, logits, labels, held_out):
        return path_predictions(self, logits, labels, held_out)


@dataclass
class _Steps:
    learner: PriorPaths
    path: int
    labels: np.ndarray
    held_out_sets: Sequence[np.ndarray]
    fits: Sequence[int]
    done: int = 0

    def advance(self, wanted):
        amount = AMOUNTS[self.path][self.done]
        self.done += 1
        self.learner.steps += [(self.path, self.fits[number]) for number in wanted]
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


def selected(answers, labels):
    """The literal rule: each path as far as it goes, then the least loss of what was looked at."""
    losses = np.full(12, np.inf)
    for path in PriorPaths().paths():
        for place, setting in enumerate(path):
            losses[setting] = log_loss_per_row(answers[setting], labels).mean()
            if place - int(losses[list(path[: place + 1])].argmin()) >= PATIENCE:
                break
    return int(losses.argmin())


def literal(labels, folds):
    """Unseen probabilities by nested loops that share nothing and make every fit whole.

    Second, those of copies without two folds, {(fold, other): (n, C)} of the rows outside of the first.
    """
    logits, unseen, without_two = np.zeros((2, N, C)), np.empty((N, C), dtype=np.float32), {}
    for outer in range(K):
        outside = folds != outer
        answers = np.empty((12, N, C), dtype=np.float32)
        for inner in set(range(K)) - {outer}:
            train, held_out = outside & (folds != inner), folds == inner
            answers[:, held_out] = PriorPaths().predictions(logits[:, train], labels[train], logits[:, held_out])
        for inner in set(range(K)) - {outer}:
            voting = outside & (folds != inner)
            without_two[outer, inner] = answers[selected(answers[:, voting], labels[voting]), outside]
        chosen = selected(answers[:, outside], labels[outside])
        unseen[~outside] = PriorPaths().predictions(logits[:, outside], labels[outside], logits[:, ~outside])[chosen]
    return unseen, without_two


def test_a_vote_stops_after_settings_that_are_no_better_than_its_best():
    vote = Vote(np.full(6, np.nan), [True])
    for place, loss in enumerate((3.0, 2.0, 2.0, 1.9, 1.9)):
        vote.count(0, range(place + 1), loss)
        assert vote.open_paths[0]
    vote.count(0, range(6), 1.9)
    assert not vote.open_paths[0]
    assert vote.selected == 3


@pytest.mark.parametrize("seed", range(6))
def test_unseen_predictions_are_those_of_the_literal_procedure(rows, seed):
    logits, _, folds = rows
    labels = np.random.default_rng(seed).choice(C, N, p=[0.7, 0.2, 0.1])
    found = cross_validate(PriorPaths(), logits, labels, folds)
    unseen, without_two = literal(labels, folds)
    np.testing.assert_array_equal(found.nested_crossfit, unseen)
    for (fold, other), expected in without_two.items():
        np.testing.assert_array_equal(found.inner_nested[fold][other], expected)
    assert found.setting == int(np.nanargmin(found.setting_losses))
    assert log_loss(found.held_out.probabilities, labels) == pytest.approx(np.nanmin(found.setting_losses))


def test_fits_go_no_further_than_a_vote_looks(rows):
    logits, _, folds = rows
    labels = np.where(np.arange(N) % 10 < 8, 0, 1 + np.arange(N) // 10 % 2)
    learner = PriorPaths()
    found = cross_validate(learner, logits, labels, folds)
    fits = K * (K + 1) // 2
    counts = [[learner.steps.count((path, fit)) for fit in range(fits)] for path in range(2)]
    assert all(0 < count <= 6 for of_path in counts for count in of_path)
    assert max(counts[1]) < 6  # equal shares are far from those of these classes
    assert np.isnan(found.setting_losses[11])
    assert np.isfinite(found.setting_losses).sum() <= max(counts[0]) + max(counts[1])


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
    _, labels, folds = rows
    scope = _Scope(labels, folds, np.zeros(N, dtype=bool), 6, 1)
    scope.add_votes_without()
    for place in range(1 + PATIENCE):
        assert scope.looks_at(0, is_first=False)
        scope.count(0, range(place + 1), np.where(folds == 0, 9.0 * place, -1.0 * place))
    assert not scope.vote.open_paths[0]
    assert [vote.open_paths[0] for vote in scope.votes_without.values()] == [True, False, False, False]
    assert scope.looks_at(0, is_first=False)
    scope.count(0, range(2 + PATIENCE), np.full(N, -9.0))
    assert np.isnan(scope.vote.losses[1 + PATIENCE])
    assert scope.votes_without[0].selected == 1 + PATIENCE
