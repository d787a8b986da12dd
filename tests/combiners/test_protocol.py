"""The base class of combiners: what is saved by itself, what is refused, and cross-fitting."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any, ClassVar

import numpy as np
import pytest
from combiner_cases import FACTS, QUICK
from torch import nn

from utils import meta_methods
from utils.combiners.protocol import (
    Combiner,
    combiner_inputs,
    fit_crossfitted,
    fit_nested,
    saved_fields,
    sub_state,
    unsaved,
)
from utils.ensemble_methods import SoftVoting, Voting
from utils.numeric import nested_cv
from utils.numeric.metrics import softmax
from utils.numeric.uniform_mixture import mixed_with_uniform, uniform_weight
from utils.predictions.rows import MemberOutputs

ROWS = np.random.default_rng(5).normal(size=(3, 20, 4)).astype(np.float32)


@dataclass
class Weighed(Voting):
    """A combiner with settings of several types."""

    power: float = 1.0
    mode: str = "mean"
    limits: tuple[float | None, ...] = (None, 0.5)
    prior: np.ndarray = unsaved()
    offsets: Any = None
    seed: int = unsaved(1)

    def _predict_proba(self, logits):
        return softmax(softmax(logits).mean(axis=0) * self.power)

    def _to_module(self) -> nn.Module:
        raise NotImplementedError


@dataclass
class MajorityClass(Combiner):
    """A combiner that learns: the frequencies of the classes."""

    learns: ClassVar[bool] = True
    frequencies: Any = unsaved()

    @classmethod
    def configured(cls, config, members):
        return cls()

    def _fit(self, logits, labels, folds):
        self.frequencies = np.bincount(labels, minlength=logits.shape[2]) / len(labels)

    def _predict_proba(self, logits):
        return np.tile(self.frequencies, (logits.shape[1], 1))

    def _to_module(self) -> nn.Module:
        raise NotImplementedError

    def fitted_arrays(self):
        return {"frequencies": self.frequencies}

    def set_fitted_arrays(self, arrays):
        self.frequencies = arrays["frequencies"]

    def restricted(self, used):
        return self

    def report(self, names):
        return {}


def test_every_field_comes_back_by_itself():
    made = Weighed(power=0.1 + 0.2, mode="späť", limits=(0.25, None, (3.0,)), offsets=np.arange(3), seed=7)
    again = Weighed.from_state(made.state())
    assert (again.power, again.mode, again.limits) == (made.power, made.mode, made.limits)
    np.testing.assert_array_equal(again.offsets, made.offsets)
    assert again.predict_proba(ROWS).tobytes() == made.predict_proba(ROWS).tobytes()
    assert saved_fields(Weighed) == ("power", "mode", "limits", "offsets")


def test_what_is_unsaved_has_its_default_again():
    state = Weighed(seed=7).state()
    assert all(values.dtype.kind in "uif" for values in state.values())
    assert Weighed.from_state(state).seed == 1


def test_a_field_added_since_has_its_default_and_an_unknown_one_is_refused():
    assert Weighed.from_state({}).power == 1.0
    state = {"settings": np.frombuffer(b'{"exponent": 2}', dtype=np.uint8)}
    with pytest.raises(TypeError, match="exponent"):
        Weighed.from_state(state)
    with pytest.raises(ValueError, match="weights"):
        Weighed.from_state({"weights": np.ones(3)})


def test_a_combiner_without_settings_saves_nothing():
    assert SoftVoting().state() == {}


@pytest.mark.parametrize("name", ["state", "from_state"])
def test_saving_cannot_be_overridden(name):
    with pytest.raises(TypeError, match=f"overrides {name}"):
        type("Forgetful", (SoftVoting,), {name: lambda self: {}})


@pytest.mark.parametrize("name", ["fit", "predict_proba", "to_module"])
def test_the_mixture_cannot_be_left_out(name):
    with pytest.raises(TypeError, match=f"Define _{name}"):
        type("Certain", (SoftVoting,), {name: lambda self: {}})


def test_an_attribute_that_is_no_field_is_refused():
    made = SoftVoting()
    made.trim = 0.4
    with pytest.raises(TypeError, match=r"SoftVoting\.trim"):
        made.state()


def test_a_cached_property_is_no_setting():
    class Cached(SoftVoting):
        @cached_property
        def table(self):
            return {1: 2}

    made = Cached()
    assert made.table == {1: 2}
    assert made.state() == {}


def test_a_field_that_cannot_be_saved_is_named():
    with pytest.raises(TypeError, match="Weighed"):
        Weighed(offsets=object()).state()


def test_settings_of_an_input_survive_in_a_fuser(monkeypatch):
    monkeypatch.setitem(meta_methods.INPUT_METHODS, "weighed", Weighed)
    inputs = [meta_methods.FuserInput("weighed", Weighed(power=5.0), np.arange(3))]
    fuser = meta_methods.MetaFuserCombiner.over(QUICK, FACTS, inputs)
    rng = np.random.default_rng(1)
    labels = rng.integers(0, 4, 20)
    fuser.fit(ROWS, labels, np.arange(20) % 3)
    again = meta_methods.MetaFuserCombiner.from_state(fuser.state())
    assert again.inputs[0].combiner.power == 5.0
    assert again.predict_proba(ROWS).tobytes() == fuser.predict_proba(ROWS).tobytes()


def test_cross_fitted_rows_come_from_copies_without_their_fold():
    labels, folds = np.repeat([0, 1, 2, 3], 5), np.repeat([0, 1, 2, 3], 5)
    found = fit_crossfitted(MajorityClass(), ROWS, labels, folds)
    assert found.dtype == np.float32
    # The copies that answer have never seen the class: what is left is the mixture with the uniform distribution.
    np.testing.assert_allclose(found[np.arange(20), labels], 1 / (10 * 3 * (15 + 2)), rtol=1e-6)


def test_copies_without_two_folds_have_read_the_labels_of_neither():
    labels, folds = np.repeat([0, 1, 2, 3], 5), np.repeat([0, 1, 2, 3], 5)
    nested = fit_nested(MajorityClass(), ROWS, labels, folds)
    np.testing.assert_array_equal(nested.crossfit, fit_crossfitted(MajorityClass(), ROWS, labels, folds))
    assert list(nested.inner) == [0, 1, 2, 3]
    for fold, predictions in nested.inner.items():
        assert predictions.dtype == np.float32
        others = np.unique(labels[folds != fold])
        for other in others:
            expected = [0.0 if name in (fold, other) else 0.5 for name in range(4)]
            mixed = mixed_with_uniform(np.tile(expected, (5, 1)), uniform_weight(10, 4))
            np.testing.assert_allclose(predictions[folds == other], mixed, rtol=1e-6)
        np.testing.assert_array_equal(predictions[folds == fold], nested.crossfit[folds == fold])


def test_with_enough_rows_copies_without_two_folds_are_made_for_neighbours(monkeypatch):
    monkeypatch.setattr(nested_cv, "ENOUGH_ROWS", 10)
    labels, folds, fits = np.arange(20) % 4, np.repeat([0, 1, 2, 3], 5), []

    class Counted(MajorityClass):
        def _fit(self, logits, labels, folds):
            fits.append(len(labels))
            super()._fit(logits, labels, folds)

    nested = fit_nested(Counted(), ROWS, labels, folds)
    assert sorted(fits) == [*4 * [10], *4 * [15], 20]
    for fold, known in {0: (0, 1, 3), 1: (0, 1, 2), 2: (1, 2, 3), 3: (0, 2, 3)}.items():
        assert nested.inner[fold].dtype == np.float32
        np.testing.assert_array_equal(np.isfinite(nested.inner[fold]), np.isin(folds, known)[:, None].repeat(4, 1))
        np.testing.assert_array_equal(nested.inner[fold][folds == fold], nested.crossfit[folds == fold])


def test_two_folds_leave_no_rows_for_copies_without_both():
    labels, folds = np.arange(20) % 4, np.arange(20) // 10
    assert fit_nested(MajorityClass(), ROWS, labels, folds).inner == {}


def test_copies_of_what_learns_nothing_answer_as_it_does():
    nested = fit_nested(SoftVoting(), ROWS, np.zeros(20, dtype=int), np.arange(20) % 2)
    assert list(nested.inner) == [0, 1]
    assert all(predictions is nested.crossfit for predictions in nested.inner.values())


def test_what_learns_nothing_answers_as_at_inference():
    found = fit_crossfitted(SoftVoting(), ROWS, np.zeros(20, dtype=int), np.arange(20) % 2)
    np.testing.assert_array_equal(found, SoftVoting().predict_proba(ROWS).astype(np.float32))


def test_inputs_are_the_logits_unless_embeddings_are_read():
    outputs = MemberOutputs(ROWS, tuple(np.zeros((20, 2), dtype=np.float32) for _ in range(3)))
    assert combiner_inputs(SoftVoting(), outputs) is ROWS
    assert combiner_inputs(SoftVoting(), ROWS) is ROWS


def test_a_part_of_a_state_is_found_by_its_prefix():
    state = {"maps/a": np.zeros(1), "maps/b/c": np.ones(1), "other": np.ones(2)}
    assert set(sub_state(state, "maps/")) == {"a", "b/c"}
