"""Nested cross-validation against the literal procedure, and what its copies may not read."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import numpy as np
import pytest

from utils.numeric.metrics import log_loss
from utils.numeric.nested_cv import cross_validate

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


def literal(logits, labels, folds):
    """Unseen probabilities by nested loops that share nothing."""
    unseen = np.empty((N, C), dtype=np.float32)
    for outer in np.unique(folds):
        outside = folds != outer
        answers = np.empty((len(Prior.amounts), N, C), dtype=np.float32)
        for inner in np.unique(folds[outside]):
            train, held_out = outside & (folds != inner), folds == inner
            answers[:, held_out] = Prior().predictions(logits[:, train], labels[train], logits[:, held_out])
        losses = [log_loss(one[outside], labels[outside]) for one in answers]
        fitted = Prior().predictions(logits[:, outside], labels[outside], logits[:, ~outside])
        unseen[~outside] = fitted[int(np.argmin(losses))]
    return unseen


def test_unseen_predictions_are_those_of_the_literal_procedure(rows):
    np.testing.assert_array_equal(cross_validate(Prior(), *rows).nested_crossfit, literal(*rows))


def test_every_fit_is_made_once(rows):
    learner = Prior()
    cross_validate(learner, *rows)
    assert len(learner.fits) == 4 * 5 / 2


def test_rows_of_a_fold_are_answered_without_its_labels(rows):
    logits, labels, folds = rows
    before = cross_validate(Prior(), logits, labels, folds)
    for fold in range(4):
        changed = np.where(folds == fold, (labels + 1) % C, labels)
        after = cross_validate(Prior(), logits, changed, folds)
        np.testing.assert_array_equal(after.nested_crossfit[folds == fold], before.nested_crossfit[folds == fold])
        places, answers = after.inner_crossfit[fold]
        np.testing.assert_array_equal(places, np.flatnonzero(folds != fold))
        np.testing.assert_array_equal(answers, before.inner_crossfit[fold][1])


def test_the_setting_of_the_final_fit_has_the_least_cross_validated_loss(rows):
    labels = rows[1]
    found = cross_validate(Prior(), *rows)
    assert found.setting == int(np.argmin(found.setting_losses))
    assert log_loss(found.crossfit, labels) == pytest.approx(found.setting_losses.min(), abs=1e-9)


def test_side_by_side_gives_the_same_bytes(rows):
    assert (
        cross_validate(Prior(), *rows, n_jobs=3).nested_crossfit.tobytes()
        == cross_validate(Prior(), *rows).nested_crossfit.tobytes()
    )


def test_with_two_folds_a_copy_takes_the_first_setting(rows):
    logits, labels, folds = rows
    found = cross_validate(Prior(), logits, labels, folds % 2)
    outside = folds % 2 == 1
    counts = np.bincount(labels[outside], minlength=C)
    np.testing.assert_allclose(found.nested_crossfit[~outside][0], counts / counts.sum(), rtol=1e-6)
    assert found.inner_crossfit == {}
    assert np.isfinite(found.setting_losses).all()


def test_inner_rows_come_from_fits_without_two_folds_under_a_setting_that_neither_chose(rows):
    logits, labels, folds = rows
    result = cross_validate(Prior(), logits, labels, folds)
    for fold in range(4):
        places = result.inner_crossfit[fold][0]
        answers = np.empty((len(Prior.amounts), N, C), dtype=np.float32)
        for other in (name for name in range(4) if name != fold):
            train, held_out = ~np.isin(folds, (fold, other)), folds == other
            answers[:, held_out] = Prior().predictions(logits[:, train], labels[train], logits[:, held_out])
        for other, found in result.inner_nested[fold].items():
            voting = ~np.isin(folds, (fold, other))
            chosen = int(np.argmin([log_loss(one[voting], labels[voting]) for one in answers]))
            np.testing.assert_array_equal(found, answers[chosen, places])


def test_with_one_fold_nothing_is_known(rows):
    logits, labels, _ = rows
    found = cross_validate(Prior(), logits, labels, np.zeros(N, dtype=int))
    assert found.setting == 0
    assert np.isnan(found.nested_crossfit).all()
    assert np.isnan(found.setting_losses).all()
