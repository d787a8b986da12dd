"""Nested cross-validation against the literal procedure, and what its copies may not read."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import numpy as np
import pytest

from utils.numeric import nested_cv
from utils.numeric.metrics import log_loss
from utils.numeric.nested_cv import (
    cross_validate,
    evenly_spaced_epochs,
    inner_folds,
    n_fits,
    selecting_folds,
    selects_by_row,
)

N, C = 40, 3


@dataclass
class Prior:
    """Class frequencies of the rows it was fitted on, shrunk to equal ones by each of several amounts."""

    fits: list[int] = field(default_factory=list)
    thread_safe: ClassVar[bool] = True
    amounts: ClassVar[tuple[float, ...]] = (0.0, 5.0, 100.0)

    def settings(self) -> Sequence[Mapping[str, Any]]:
        return [{"amount": amount} for amount in self.amounts]

    def predictions(self, logits: np.ndarray, labels: np.ndarray, held_out: np.ndarray) -> np.ndarray:
        self.fits.append(len(labels))
        counts = np.bincount(labels, minlength=logits.shape[2])
        found = [(counts + amount) / (counts + amount).sum() for amount in self.amounts]
        return np.stack([np.tile(one, (held_out.shape[1], 1)) for one in found]).astype(np.float32)


@pytest.fixture
def rows():
    rng = np.random.default_rng(3)
    labels = rng.choice(C, N, p=[0.6, 0.3, 0.1])
    return np.zeros((2, N, C), dtype=np.float32), labels, rng.integers(0, 4, N)


@pytest.fixture(params=["all", "neighbours"])
def others(request, monkeypatch):
    """The folds that select for the copy without each of four folds: all others, or its neighbours."""
    if request.param == "all":
        return {fold: {0, 1, 2, 3} - {fold} for fold in range(4)}
    monkeypatch.setattr(nested_cv, "ENOUGH_ROWS", 1)
    return {0: {1, 3}, 1: {0, 2}, 2: {1, 3}, 3: {2, 0}}


def literal(logits, labels, folds, others):
    """Unseen probabilities by nested loops that share nothing; `others` are {fold: folds that select}."""
    unseen = np.empty((N, C), dtype=np.float32)
    for outer in np.unique(folds):
        outside, selecting = folds != outer, np.isin(folds, list(others[outer]))
        answers = np.empty((len(Prior.amounts), N, C), dtype=np.float32)
        for inner in others[outer]:
            train, held_out = outside & (folds != inner), folds == inner
            answers[:, held_out] = Prior().predictions(logits[:, train], labels[train], logits[:, held_out])
        losses = [log_loss(one[selecting], labels[selecting]) for one in answers]
        fitted = Prior().predictions(logits[:, outside], labels[outside], logits[:, ~outside])
        unseen[~outside] = fitted[int(np.argmin(losses))]
    return unseen


def test_unseen_predictions_are_those_of_the_literal_procedure(rows, others):
    np.testing.assert_array_equal(cross_validate(Prior(), *rows).nested_crossfit, literal(*rows, others))


def test_neighbours_select_where_they_have_enough_rows_for_every_copy(monkeypatch):
    monkeypatch.setattr(nested_cv, "ENOUGH_ROWS", 20)
    every = {fold: set(range(5)) - {fold} for fold in range(5)}
    assert selecting_folds(np.repeat(range(5), [9, 10, 10, 10, 10])) == every
    circle = {0: {1, 4}, 1: {0, 2}, 2: {1, 3}, 3: {2, 4}, 4: {3, 0}}
    assert selecting_folds(np.repeat(range(5), 10)) == circle
    assert selecting_folds(np.repeat([2, 5, 7], 10)) == {2: {5, 7}, 5: {2, 7}, 7: {2, 5}}


@pytest.mark.parametrize(("enough", "n_folds", "expected"), [(1, 5, 10), (1000, 5, 15), (1, 3, 6), (1, 4, 8)])
def test_neighbours_take_two_fits_per_fold(monkeypatch, enough, n_folds, expected):
    monkeypatch.setattr(nested_cv, "ENOUGH_ROWS", enough)
    labels, folds, learner = np.arange(N) % C, np.arange(N) % n_folds, Prior()
    cross_validate(learner, np.zeros((2, N, C), dtype=np.float32), labels, folds)
    assert len(learner.fits) == n_fits(folds) == expected


@dataclass
class Nearest(Prior):
    """Class of the nearest row of the fit, softened by the amounts: reads logits."""

    def predictions(self, logits: np.ndarray, labels: np.ndarray, held_out: np.ndarray) -> np.ndarray:
        distances = np.abs(logits[0, :, 0][None] - held_out[0, :, 0][:, None])
        truth = np.eye(C)[labels[distances.argmin(axis=1)]]
        return np.stack([(truth + amount) / (truth + amount).sum(axis=1, keepdims=True) for amount in self.amounts])


def test_fits_read_the_logits_of_the_other_rows_alone(rows):
    _, labels, folds = rows
    logits = np.random.default_rng(0).normal(size=(2, N, C)).astype(np.float32)
    found = cross_validate(Nearest(), logits, labels, folds)
    for fold in range(4):
        inside = folds == fold
        values = Nearest().predictions(logits[:, ~inside], labels[~inside], logits[:, inside]).astype(np.float32)
        assert any(np.array_equal(found.nested_crossfit[inside], one) for one in values)


@pytest.mark.parametrize(("epochs", "expected"), [(50, [8, 17, 25, 33, 42, 50]), (3, [1, 2, 3]), (1, [1])])
def test_epochs_are_evenly_spaced_up_to_the_last(epochs, expected):
    assert evenly_spaced_epochs(epochs, 6) == expected


def test_every_fit_is_made_once(rows):
    learner = Prior()
    cross_validate(learner, *rows)
    assert len(learner.fits) == 4 * 5 / 2


def test_rows_of_a_fold_are_answered_without_its_labels(rows, others):
    logits, labels, folds = rows
    before = cross_validate(Prior(), logits, labels, folds)
    for fold in range(4):
        changed = np.where(folds == fold, (labels + 1) % C, labels)
        after = cross_validate(Prior(), logits, changed, folds)
        np.testing.assert_array_equal(after.nested_crossfit[folds == fold], before.nested_crossfit[folds == fold])
        inner = after.inner_held_out[fold]
        np.testing.assert_array_equal(inner.rows, np.flatnonzero(np.isin(folds, list(others[fold]))))
        np.testing.assert_array_equal(inner.folds, folds[inner.rows])
        np.testing.assert_array_equal(inner.probabilities, before.inner_held_out[fold].probabilities)


def test_the_setting_of_the_final_fit_has_the_least_cross_validated_loss(rows):
    labels = rows[1]
    found = cross_validate(Prior(), *rows)
    assert found.setting == int(np.argmin(found.setting_losses))
    assert log_loss(found.held_out.probabilities, labels) == pytest.approx(found.setting_losses.min(), abs=1e-9)


def test_side_by_side_gives_the_same_bytes(rows):
    assert (
        cross_validate(Prior(), *rows, n_jobs=3).nested_crossfit.tobytes()
        == cross_validate(Prior(), *rows).nested_crossfit.tobytes()
    )


def test_inner_rows_come_from_fits_without_two_folds_under_a_setting_that_neither_chose(rows, others):
    logits, labels, folds = rows
    result = cross_validate(Prior(), logits, labels, folds)
    for fold in range(4):
        places = result.inner_held_out[fold].rows
        answers = np.empty((len(Prior.amounts), N, C), dtype=np.float32)
        for other in others[fold]:
            train, held_out = ~np.isin(folds, (fold, other)), folds == other
            answers[:, held_out] = Prior().predictions(logits[:, train], labels[train], logits[:, held_out])
        assert result.inner_nested[fold].keys() == others[fold]
        for other, found in result.inner_nested[fold].items():
            voting = np.isin(folds, list(others[fold] - {other}))
            chosen = int(np.argmin([log_loss(one[voting], labels[voting]) for one in answers]))
            np.testing.assert_array_equal(found, answers[chosen, places])


@pytest.mark.parametrize("n_folds", [1, 2])
def test_with_few_folds_copies_and_the_final_fit_select_by_rows_alike(rows, n_folds):
    logits, labels, folds = rows
    folds = folds % n_folds
    found = cross_validate(Prior(), logits, labels, folds)
    everything = np.ones(N, dtype=bool)
    fits = [(everything, found.held_out)]
    fits += [(folds != fold, found.inner_held_out[fold]) for fold in range(n_folds) if n_folds > 1]
    for inside, held_out in fits:
        inner = inner_folds(labels, folds, inside)
        assert np.unique(inner).tolist() == [0, 1, 2, 3, 4]
        for label in range(C):  # each class is spread over the folds
            assert np.ptp(np.bincount(inner[labels[inside] == label], minlength=5)) <= 1
        assert np.ptp(np.bincount(inner)) <= 1
        np.testing.assert_array_equal(held_out.folds, inner)
        np.testing.assert_array_equal(held_out.rows, np.flatnonzero(inside))
        losses = literal_losses(labels[inside], inner)
        assert log_loss(held_out.probabilities, labels[inside]) == pytest.approx(min(losses))
        if inside.all():
            assert found.setting == int(np.argmin(losses))
        else:
            copy = Prior().predictions(logits[:, inside], labels[inside], logits[:, ~inside])
            np.testing.assert_array_equal(found.nested_crossfit[~inside], copy[int(np.argmin(losses))])
    assert np.isnan(found.nested_crossfit).all() == (n_folds == 1)


def literal_losses(labels, inner):
    """Of each setting, with the inner folds left out one by one."""
    answers = np.empty((len(Prior.amounts), len(labels), C), dtype=np.float32)
    for fold in np.unique(inner):
        outside = inner != fold
        logits = np.zeros((1, len(labels), C))
        answers[:, ~outside] = Prior().predictions(logits[:, outside], labels[outside], logits[:, ~outside])
    return [log_loss(one, labels) for one in answers]


def test_from_three_folds_on_the_inner_folds_are_those_of_cross_fitting(rows):
    _, labels, folds = rows
    np.testing.assert_array_equal(inner_folds(labels, folds % 3, folds != 0), folds[folds != 0] % 3)
    assert not selects_by_row(folds % 3)
    assert selects_by_row(folds % 2)


def test_a_copy_without_a_class_and_one_row_alone_are_fitted(rows):
    logits, labels, _ = rows
    order = np.argsort(labels, kind="stable")
    folds = np.empty(N, dtype=int)
    folds[order] = np.arange(N) * 3 // N  # folds of one or two classes
    assert np.isfinite(cross_validate(Prior(), logits, labels, folds).nested_crossfit).all()
    one = cross_validate(Prior(), logits[:, :1], labels[:1], np.zeros(1, dtype=int))
    assert (one.setting, one.held_out) == (0, None)


class ChangesFilters(Prior):
    """Leaves the process's warning filters empty, as threads of scikit-learn can that end in another order."""

    def predictions(self, logits: np.ndarray, labels: np.ndarray, held_out: np.ndarray) -> np.ndarray:
        warnings.resetwarnings()
        return super().predictions(logits, labels, held_out)


def test_warning_filters_are_kept(rows):
    before = list(warnings.filters)
    assert before
    cross_validate(ChangesFilters(), *rows, n_jobs=2)
    assert warnings.filters == before
