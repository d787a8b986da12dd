"""The meta-fuser: what it reads of its inputs, and what it saves and reports of them."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import numpy as np
import pytest

from utils.combiners.protocol import MemberFacts, NestedPredictions, fit_crossfitted
from utils.core.config import validate
from utils.meta_methods import FUSERS, INPUT_METHODS, FuserInput, MetaFuserCombiner
from utils.predictions.rows import MemberOutputs

pytestmark = pytest.mark.usefixtures("short_searches")

M, N, C = 3, 120, 3
FACTS = MemberFacts(("a", "b", "c"), np.full(M, 0.7), np.full(M, np.nan), np.full(M, np.nan))


def configuration(fuser_type="attention", inputs=("soft_voting", "hard_voting")):
    fuser = {
        "mlp_config": {"hidden_dims": [8], "epochs": 5, "lr": 0.01},
        "input_ensembles": list(inputs),
        "fuser_type": fuser_type,
    }
    fusion = {"fusion_config": {"hidden_dims": [8], "epochs": 4}, "seeds": 1}
    runs = {"meta_fuser": fuser, "stacking": {"xgb_config": {"n_estimators": 5}}, "fusion": fusion}
    return validate({"runs": runs}, source=Path("of the test"))


CONFIG = configuration()


def combiner(method, config=CONFIG):
    return INPUT_METHODS[method].configured(config, FACTS)


def without_inner_copies(crossfit):
    """The same predictions by every copy, as of an input that learns nothing."""
    return NestedPredictions(crossfit, dict.fromkeys(range(3), crossfit))


@pytest.fixture
def rows():
    """Logits (M, N, C), labels (N,) and folds (N,)."""
    rng = np.random.default_rng(11)
    labels = rng.integers(0, C, N)
    logits = rng.normal(size=(M, N, C)).astype(np.float32)
    logits[:, np.arange(N), labels] += 1.5
    return logits, labels, np.arange(N) % 3


@pytest.mark.parametrize("kind", sorted(FUSERS))
def test_every_fuser_reads_only_the_cross_fitted_predictions_of_its_inputs(rows, kind):
    logits, labels, folds = rows
    config = configuration(kind)
    crossfits = [np.random.default_rng(seed).dirichlet(np.ones(C), N).astype(np.float32) for seed in range(2)]
    inputs = [
        FuserInput("soft_voting", combiner("soft_voting"), np.arange(M), without_inner_copies(crossfit))
        for crossfit in crossfits
    ]
    fuser = partial(MetaFuserCombiner.over, config, FACTS, inputs)
    expected = fit_crossfitted(fuser(), logits, labels, folds)
    np.testing.assert_array_equal(fit_crossfitted(fuser(), np.zeros_like(logits), labels, folds), expected)


def test_it_uses_only_the_members_of_its_inputs(rows):
    logits, labels, folds = rows
    inputs = [FuserInput("soft_voting", combiner("soft_voting"), np.array([member])) for member in (0, 2)]
    fuser = MetaFuserCombiner.over(CONFIG, FACTS, inputs).fit(logits, labels, folds)
    np.testing.assert_array_equal(fuser.used(M), [True, False, True])
    restricted = fuser.restricted(fuser.used(M))
    np.testing.assert_allclose(restricted.predict_proba(logits[[0, 2]]), fuser.predict_proba(logits), atol=1e-12)


def test_inputs_that_are_not_fitted_are_cross_fitted_over_the_same_folds(rows):
    logits, labels, folds = rows
    unfitted = [FuserInput("logit_averaging", combiner("logit_averaging"), np.array([0, 1]))]
    crossfit = fit_crossfitted(combiner("logit_averaging"), logits[:2], labels, folds)
    predictions = without_inner_copies(crossfit)
    fitted = [FuserInput("logit_averaging", combiner("logit_averaging"), np.array([0, 1]), predictions)]
    first, second = (
        fit_crossfitted(MetaFuserCombiner.over(CONFIG, FACTS, inputs), logits, labels, folds)
        for inputs in (unfitted, fitted)
    )
    np.testing.assert_array_equal(first, second)


def test_with_one_fold_the_fuser_reads_the_predictions_of_the_fitted_inputs(rows):
    logits, labels, _ = rows
    inputs = [FuserInput("stacking_lr", combiner("stacking_lr"), np.arange(M))]
    fuser = MetaFuserCombiner.over(CONFIG, FACTS, inputs).fit(logits, labels, np.zeros(N, dtype=int))
    assert np.isfinite(fuser.predict_proba(logits)).all()


def test_methods_that_cannot_be_inputs_are_left_out_of_an_unfitted_fuser():
    fuser = MetaFuserCombiner.configured(configuration(inputs=("soft_voting", "greedy_soup", "stacking_lr")), FACTS)
    assert [each.method for each in fuser.inputs] == ["soft_voting", "stacking_lr"]
    np.testing.assert_array_equal(fuser.inputs[0].member_indices, np.arange(M))


def test_it_reads_embeddings_and_is_discontinuous_as_its_inputs_are():
    def fuser(*methods, kind="attention"):
        return MetaFuserCombiner.configured(configuration(kind, methods), FACTS)

    assert not fuser("soft_voting").reads_embeddings
    assert fuser("soft_voting", "fusion_concat_mlp").reads_embeddings
    assert not fuser("soft_voting").is_discontinuous
    assert fuser("soft_voting", "hard_voting").is_discontinuous
    assert fuser("soft_voting", kind="xgb").is_discontinuous


@pytest.mark.parametrize("kind", sorted(FUSERS))
def test_a_restored_fuser_predicts_the_same(rows, kind):
    logits, labels, folds = rows
    rng = np.random.default_rng(5)
    outputs = MemberOutputs(logits, tuple(rng.normal(size=(N, 4)).astype(np.float32) for _ in range(M)))
    config = configuration(kind, ("logit_averaging", "fusion_concat_mlp"))
    fuser = MetaFuserCombiner.configured(config, FACTS).fit(outputs, labels, folds)
    restored = MetaFuserCombiner.from_state(fuser.state())
    np.testing.assert_array_equal(restored.predict_proba(outputs), fuser.predict_proba(outputs))
    assert (restored.fuser_type, [each.method for each in restored.inputs]) == (
        kind,
        ["logit_averaging", "fusion_concat_mlp"],
    )


def test_the_report_names_the_inputs(rows):
    report = MetaFuserCombiner.configured(CONFIG, FACTS).fit(*rows).report(FACTS.names)
    assert (report["fuser_type"], report["inputs"]) == ("attention", ["soft_voting", "hard_voting"])
    assert report["weights"] is None


CONVEX = configuration("convex", ("soft_voting", "stacking_lr", "weighted", "pruned_greedy_forward"))


def test_a_convex_fuser_reads_no_label_of_the_fold_that_it_is_scored_on(rows):
    """Two levels: its inputs have not read them either, of which those of the other fusers have."""
    logits, labels, folds = rows
    other = np.where(folds == 1, (labels + 1) % C, labels)
    before, after = (
        fit_crossfitted(MetaFuserCombiner.configured(CONVEX, FACTS), logits, truth, folds) for truth in (labels, other)
    )
    np.testing.assert_array_equal(after[folds == 1], before[folds == 1])
    assert not np.array_equal(after[folds == 0], before[folds == 0])


def test_inputs_without_weight_are_left_out_of_a_restricted_fuser(rows):
    logits, labels, folds = rows
    fuser = MetaFuserCombiner.configured(CONVEX, FACTS).fit(logits, labels, folds)
    weights = fuser.report(FACTS.names)["input_weights"]
    assert list(weights) == ["soft_voting", "stacking_lr", "weighted", "pruned_greedy_forward"]
    with_weight = [name for name, weight in weights.items() if weight > 0]
    assert 0 < len(with_weight) < len(weights)
    used = fuser.used(M)
    restricted = fuser.restricted(used)
    assert [each.method for each in restricted.inputs] == with_weight
    np.testing.assert_allclose(restricted.predict_proba(logits[used]), fuser.predict_proba(logits), atol=1e-12)
    assert restricted._to_module().fuser.weights.shape == (len(with_weight), 1)


def test_members_that_only_inputs_without_weight_use_are_not_needed(rows):
    logits, labels, folds = rows
    logits[2] = np.random.default_rng(3).normal(size=(N, C)) * 5  # knows nothing, and is sure of it
    inputs = [
        FuserInput("soft_voting", combiner("soft_voting"), np.array([0, 1]), name="two"),
        FuserInput("soft_voting", combiner("soft_voting"), np.array([2]), name="third"),
    ]
    fuser = MetaFuserCombiner.over(CONVEX, FACTS, inputs).fit(logits, labels, folds)
    assert fuser.report(FACTS.names)["input_weights"]["third"] == 0
    np.testing.assert_array_equal(fuser.used(M), [True, True, False])


def test_an_input_without_copies_without_two_folds_is_refused(rows):
    logits, labels, folds = rows
    predictions = NestedPredictions(fit_crossfitted(combiner("weighted"), logits, labels, folds), {})
    inputs = [
        FuserInput("weighted", combiner("weighted"), np.arange(M), predictions, "weighted_ensemble"),
        FuserInput("soft_voting", combiner("soft_voting"), np.arange(M)),
    ]
    with pytest.raises(ValueError, match="weighted_ensemble has no predictions of copies"):
        MetaFuserCombiner.over(CONVEX, FACTS, inputs).fit(logits, labels, folds)


def test_equal_inputs_get_one_weight(rows):
    logits, labels, folds = rows
    inputs = [FuserInput("soft_voting", combiner("soft_voting"), np.arange(M), name=name) for name in "ab"]
    fuser = MetaFuserCombiner.over(CONVEX, FACTS, inputs).fit(logits, labels, folds)
    weights = fuser.report(FACTS.names)["input_weights"]
    assert weights["a"] > 0
    assert weights["b"] == 0


def test_a_fuser_of_an_earlier_version_is_read():
    """The arrays that versions without a convex fuser wrote."""

    def text(value):
        return np.frombuffer(value.encode(), dtype=np.uint8)

    gate = {"hidden_matrix": (6, 4), "hidden_bias": (4,), "scores_matrix": (4, 2), "scores_bias": (2,)}
    arrays = {f"fuser/{name}": np.zeros(shape, dtype=np.float32) for name, shape in gate.items()}
    arrays |= {"fuser_type": text("attention"), "fuser/temperature": np.ones(1), "fuser/share": np.ones(1)}
    for index, method in enumerate(("soft_voting", "hard_voting")):
        arrays |= {f"inputs/{index:03d}/method": text(method), f"inputs/{index:03d}/places": np.arange(2)}
    arrays["inputs/000/state/settings"] = text("{}")
    logits = np.random.default_rng(0).normal(size=(2, 5, 3)).astype(np.float32)
    fuser = MetaFuserCombiner.from_state(arrays)
    votes = [combiner(method).predict_proba(logits) for method in ("soft_voting", "hard_voting")]
    np.testing.assert_allclose(fuser.predict_proba(logits), np.mean(votes, axis=0), atol=1e-9)
