"""Fusion heads: their arithmetic, odd embeddings, absent members, what is chosen and what is told."""

from __future__ import annotations

import logging
import warnings
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from short_fits import short_searches

from utils.combiners import embedding_maps, fusion_learner
from utils.combiners.fusion_heads import AttentionHead, BilinearHead
from utils.combiners.protocol import MemberFacts, fit_crossfitted
from utils.core import engines
from utils.core.config import validate
from utils.core.errors import UserError
from utils.fusion_methods import COMBINERS
from utils.numeric.batched_training import BatchedTraining
from utils.numeric.metrics import log_loss
from utils.predictions.rows import MemberOutputs

M, N, C = 3, 120, 3
FACTS = MemberFacts(("a", "b", "c"), np.full(M, 0.7), np.full(M, np.nan), np.full(M, np.nan))


def recipe(method, **fusion):
    shape = {"hidden_dims": [16], "epochs": 8, "lr": 0.01} | fusion.pop("shape", {})
    runs = {"fusion": {"fusion_config": shape, **fusion}}
    return COMBINERS[f"fusion_{method}"].configured(validate({"runs": runs}, source=Path("of the test")), FACTS)


@pytest.fixture
def rows():
    """Outputs whose embeddings know the class and whose logits do not; labels; folds."""
    rng = np.random.default_rng(3)
    labels = np.arange(N) % C
    logits = rng.normal(size=(M, N, C)).astype(np.float32) / 10
    known = np.eye(C)[labels] + 0.3 * rng.normal(size=(N, C))
    embeddings = tuple(
        (known @ rng.normal(size=(C, width)) + 0.3 * rng.normal(size=(N, width))).astype(np.float32)
        for width in (4, 7, 5)
    )
    return MemberOutputs(logits, embeddings), labels, np.arange(N) // C % 3


@pytest.fixture
def shortened():
    with short_searches():
        yield


@pytest.mark.usefixtures("shortened")
@pytest.mark.parametrize("method", ["concat_mlp", "attention", "bilinear", "cca_aligned"])
def test_heads_learn_what_only_the_embeddings_know(method, rows):
    unseen = fit_crossfitted(recipe(method, shape={"epochs": 14}), *rows)
    assert log_loss(unseen, rows[1]) < 0.5 * np.log(C)


@pytest.mark.parametrize(
    "odd",
    [np.zeros((N, 3)), np.arange(N)[:, None], np.outer(np.arange(N), [1, 2, 3]), np.full((N, 2), 1e30)],
    ids=["constant", "one column", "rank one", "huge"],
)
@pytest.mark.usefixtures("shortened")
@pytest.mark.parametrize("method", ["concat_mlp", "cca_aligned", "bilinear"])
def test_embeddings_that_say_little_do_no_harm(method, odd, rows):
    outputs, labels, folds = rows
    outputs = MemberOutputs(outputs.logits, (*outputs.embeddings[:2], odd.astype(np.float32)))
    fitted = recipe(method)
    unseen = fit_crossfitted(fitted, outputs, labels, folds)
    assert log_loss(unseen, labels) < 0.7 * np.log(C)
    assert np.isfinite(fitted.predict_proba(outputs)).all()


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_columns_that_are_not_finite_are_refused_with_the_members_name(value, rows):
    outputs, labels, folds = rows
    outputs.embeddings[1][5, 2] = value
    with pytest.raises(UserError, match=r"member b: 1 of 7 columns .*first column 2.*backbones\.exclude=\[b\]"):
        recipe("concat_mlp").fit(outputs, labels, folds)


@pytest.mark.usefixtures("shortened")
@pytest.mark.parametrize("method", ["concat_mlp", "attention", "bilinear", "cca_aligned"])
def test_without_a_hidden_width_a_head_is_linear_or_takes_its_own(method, rows):
    fitted = recipe(method, shape={"hidden_dims": []}).fit(*rows)
    assert log_loss(fitted.predict_proba(rows[0]), rows[1]) < np.log(C)
    if method == "concat_mlp":
        assert fitted.report(FACTS.names)["cost"] == {"parameters": (4 + 7 + 5) * C + C}


def test_the_length_of_training_is_chosen_by_rows_left_out(rows):
    facts = recipe("concat_mlp").fit(*rows).report(FACTS.names)
    assert facts["setting"]["epochs"] in (1, 3, 4, 5, 7, 8)
    assert 0 < facts["settings_tried"] <= 6
    assert facts["cross_validated_log_loss"] >= facts["selection_score"] / 2


def test_several_seeds_are_averaged(rows):
    alone = [replace(recipe("concat_mlp").learner, seed=seed) for seed in (42, 43)]
    outputs, labels, _ = rows
    setting = {"rank": 0, "epochs": 4}
    both = recipe("concat_mlp", seeds=2).learner.fit(outputs, labels, setting)
    assert len(both.weights) == 2
    expected = np.mean([one.fit(outputs, labels, setting).predict_proba(outputs) for one in alone], axis=0)
    np.testing.assert_allclose(both.predict_proba(outputs), expected, atol=1e-12)


def test_label_smoothing_reaches_the_loss(rows):
    outputs, labels, _ = rows
    setting = {"rank": 0, "epochs": 8}
    plain, smooth = (
        recipe("concat_mlp", label_smoothing=value).learner.fit(outputs, labels, setting).predict_proba(outputs)
        for value in (0.0, 0.4)
    )
    assert smooth.max(axis=1).mean() < plain.max(axis=1).mean() - 0.05


@pytest.mark.usefixtures("shortened")
@pytest.mark.parametrize("method", ["concat_mlp", "attention", "bilinear", "cca_aligned"])
def test_the_module_goes_to_onnx_with_a_free_batch(method, rows, tmp_path):
    import onnxruntime

    outputs, labels, folds = rows
    fitted = recipe(method, shape={"epochs": 2}).fit(outputs, labels, folds)

    def given(count):
        logits = torch.from_numpy(outputs.logits[:, :count].transpose(1, 0, 2).copy())
        return logits, [torch.from_numpy(own[:count]) for own in outputs.embeddings]

    names = ["logits", "a", "b", "c"]
    path = tmp_path / "fusion.onnx"
    free = {name: {0: "batch"} for name in names}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.onnx.export(
            fitted.to_module().eval(),
            given(2),
            path,
            dynamo=False,
            opset_version=17,
            input_names=names,
            dynamic_axes=free,
        )
    session = onnxruntime.InferenceSession(path)
    for count in (1, 3, 17):
        logits, embeddings = given(count)
        wanted = {each.name for each in session.get_inputs()}
        feed = dict(zip(names, (values.numpy() for values in (logits, *embeddings)), strict=True))
        (found,) = session.run(None, {name: value for name, value in feed.items() if name in wanted})
        expected = fitted.predict_proba(outputs[:, :count])
        np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5)


# attention -----------------------------------------------------------------------------------------------------------


def test_an_absent_member_is_not_seen_and_has_no_weight(rows):
    outputs, labels, folds = rows
    fitted = recipe("attention").fit(outputs, labels, folds)
    weights = fitted.report(FACTS.names)["weights"]
    assert tuple(weights) == FACTS.names
    assert abs(sum(weights.values()) - 1) < 1e-9
    present = np.ones((N, M), dtype=bool)
    np.testing.assert_allclose(fitted.predict_present(outputs, present), fitted.predict_proba(outputs), atol=1e-12)
    present[:, 1] = False
    broken = MemberOutputs(outputs.logits.copy(), tuple(own.copy() for own in outputs.embeddings))
    broken.logits[1], broken.embeddings[1][:] = np.nan, np.nan
    without = fitted.predict_present(broken, present)
    np.testing.assert_allclose(without, fitted.predict_present(outputs, present), atol=1e-12)
    assert np.abs(without - fitted.predict_proba(outputs)).max() > 1e-3
    assert log_loss(without, labels) < 0.7 * np.log(C)  # it has learned to go without
    assert (fitted.model.attention(fitted.mapped_outputs(broken), present)[:, 1] == 0).all()


def test_attention_starts_from_the_plain_mean():
    head = AttentionHead((4, 7), (8,), C, 0.0, 0).eval()
    np.testing.assert_allclose(head.weights(torch.randn(5, 11)).detach().numpy(), 0.5)


# products ------------------------------------------------------------------------------------------------------------


def test_products_are_those_of_every_two_members():
    torch.manual_seed(0)
    head = BilinearHead((4, 7, 5), (), C, 0.0, 6).eval()
    values = torch.randn(9, 16)
    parts = [
        torch.tanh(layer(own)) for layer, own in zip(head.projections, values.split((4, 7, 5), dim=1), strict=True)
    ]
    pairs = parts[0] * parts[1] + parts[0] * parts[2] + parts[1] * parts[2]
    seen = torch.cat([sum(parts) / 3**0.5, pairs / 3**0.5], dim=1)
    torch.testing.assert_close(head(values), head.perceptron(seen))


def test_the_rank_is_chosen_and_its_cost_is_told(rows):
    facts = recipe("bilinear").fit(*rows).report(FACTS.names)
    assert facts["setting"]["rank"] in fusion_learner.RANKS
    assert 6 < facts["settings_tried"] <= 12  # each rank by itself
    assert facts["cost"]["pairs"] == 3
    assert facts["cost"]["parameters_of_full_products"] == C * (4 * 7 + 4 * 5 + 7 * 5)


# maps ----------------------------------------------------------------------------------------------------------------


def test_canonical_correlations_are_told(rows):
    facts = recipe("cca_aligned").fit(*rows).report(FACTS.names)["embeddings"]
    assert facts["rank"] == len(facts["canonical_correlations"]) > 2
    assert max(facts["canonical_correlations"][:2]) > 0.8


def test_wide_embeddings_are_reduced_member_by_member(rows):
    outputs, *_ = rows
    found = embedding_maps.concatenated(outputs.embeddings, budget=12)
    assert found.widths == (4, 4, 4)
    assert found.facts["read_widths"] == [4, 4, 4]
    assert found.facts["variance_kept"][0] == 1
    assert 0.8 < min(found.facts["variance_kept"]) < 1
    blocks = found.apply(outputs.embeddings)
    assert [own.shape for own in blocks] == [(N, 4)] * 3
    covariance = np.cov(blocks[1].T)
    np.testing.assert_allclose(covariance - np.diag(np.diag(covariance)), 0, atol=1e-5)
    again = embedding_maps.EmbeddingMaps.from_state(found.state()).apply(outputs.embeddings)
    assert all(np.array_equal(*pair) for pair in zip(blocks, again, strict=True))


@pytest.mark.parametrize(
    ("widths", "budget", "expected"),
    [((4, 7, 5), 16, [4, 7, 5]), ((2, 9, 9), 12, [2, 5, 5]), ((5, 5), 1, [1, 1]), ((100, 3), 13, [10, 3])],
)
def test_narrow_members_stay_whole(widths, budget, expected):
    assert embedding_maps._shares(widths, budget) == expected


# memory --------------------------------------------------------------------------------------------------------------


def test_out_of_memory_halves_the_batch_and_says_so(rows, monkeypatch, caplog):
    outputs, labels, _ = rows
    tried = []

    def run_to(self, epoch):
        tried.append(self.n_batches)
        if self.n_batches < 4 * tried[0]:
            raise RuntimeError("DefaultCPUAllocator: can't allocate memory")
        really_run_to(self, epoch)

    really_run_to = BatchedTraining.run_to
    monkeypatch.setattr(BatchedTraining, "run_to", run_to)
    monkeypatch.setattr(logging.getLogger("disease_pipeline"), "propagate", True)
    learner = recipe("concat_mlp").learner
    with caplog.at_level("WARNING"):
        heads = learner.fit(outputs, labels, {"rank": 0, "epochs": 2})
    assert tried == [7, 14, 28]
    for count in (9, 5):
        assert f"fusion_concat_mlp: out of memory; going on with {count} rows at a time" in caplog.text
    assert log_loss(heads.predict_proba(outputs), labels) < np.log(C)

    def never(*_):
        raise MemoryError

    monkeypatch.setattr(BatchedTraining, "run_to", never)
    with pytest.raises(UserError, match=r"out of memory with one row at a time.*hidden_dims"):
        learner.fit(outputs, labels, {"rank": 0, "epochs": 2})


def test_a_training_that_ran_out_of_memory_goes_on_where_it_was(rows, monkeypatch):
    outputs, labels, _ = rows
    first, second = np.arange(N) % 6 == 0, np.arange(N) % 6 == 1
    learner = recipe("concat_mlp").learner
    ((_, training),) = learner.trainings(0, outputs, labels, [first, second])
    training.advance([0, 1])
    really_run_to, failures = BatchedTraining.run_to, iter([True])

    def run_to(self, epoch):
        if next(failures, False):
            raise MemoryError
        really_run_to(self, epoch)

    monkeypatch.setattr(BatchedTraining, "run_to", run_to)
    (found,) = training.advance([1])
    ((_, fewer),) = learner.trainings(0, outputs, labels, [second])
    fewer.batches = training.batches
    fewer.advance([0])
    np.testing.assert_array_equal(found, fewer.advance([0])[0])
    assert training.networks.n_batches == 12


# trainings -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["concat_mlp", "attention", "bilinear"])
def test_a_setting_is_the_same_training_stopped_earlier(method, rows):
    outputs, labels, _ = rows
    learner = recipe(method, seeds=2).learner
    by_setting = learner.predictions(outputs[:, 30:], labels[30:], outputs[:, :30])
    assert len(by_setting) == len(learner.settings())
    for setting, expected in zip(learner.settings(), by_setting, strict=True):
        heads = learner.fit(outputs[:, 30:], labels[30:], setting)
        np.testing.assert_allclose(heads.predict_proba(outputs[:, :30]), expected, rtol=0, atol=1e-6)


class Apart(engines.Local):
    """An engine whose jobs keep nothing."""

    shares_memory = False


@pytest.mark.parametrize("method", ["concat_mlp", "attention", "bilinear"])
def test_threads_and_an_engine_that_keeps_no_state_give_the_same_bytes(method, rows, monkeypatch):
    outputs, labels, folds = rows
    folds = np.where(np.arange(N) % 17 == 0, 0, folds)  # of unequal sizes
    here, beside, apart = (recipe(method, shape={"epochs": 3}) for _ in range(3))
    beside.n_jobs = 2
    unseen = [fit_crossfitted(each, outputs, labels, folds) for each in (here, beside)]
    monkeypatch.setattr(engines, "_current", Apart())
    unseen.append(fit_crossfitted(apart, outputs, labels, folds))
    for other, found in zip((beside, apart), unseen[1:], strict=True):
        assert found.tobytes() == unseen[0].tobytes()
        arrays = other.fitted_arrays()
        assert all(values.tobytes() == arrays[name].tobytes() for name, values in here.fitted_arrays().items())


def test_heads_train_alone_where_the_ones_beside_them_could_change_a_bit(rows):
    outputs, labels, _ = rows
    held_out_sets = [np.arange(N) % 7 == part for part in range(7)]

    def sizes(method, **shape):
        trainings = recipe(method, shape=shape).learner.trainings(0, outputs, labels, held_out_sets)
        assert sorted(fit for fits, _ in trainings for fit in fits) == list(range(7))
        return [len(fits) for fits, _ in trainings]

    assert max(sizes("attention", hidden_dims=[16])) == 5
    assert set(sizes("attention", hidden_dims=[12])) == {1}
    assert set(sizes("concat_mlp", hidden_dims=[16, 7])) == {1}
    assert set(sizes("concat_mlp", hidden_dims=[2048, 512])) == {1}  # these fill the cache


def test_networks_trained_further_are_calibrated_where_rows_left_out_gain(rows):
    outputs, labels, folds = rows
    fitted = recipe("concat_mlp").fit(outputs, labels, folds)
    predicted = fitted.predict_proba(outputs).argmax(axis=1)
    predicted[0] = (predicted[0] + 1) % outputs.shape[2]  # one error, which the other folds know nothing of
    raw = fitted.model.predict_proba(fitted.mapped_outputs(outputs))
    unseen = fitted.retrained(fitted.model.weights, outputs, predicted, folds)
    assert log_loss(unseen, predicted) <= log_loss(raw, predicted) + 1 / (5 * N)
    assert fitted.calibration.temperature > 0.3  # a few rows without another error do not end in certainty
    unseen = fitted.retrained(fitted.model.weights, outputs, labels, folds)
    assert log_loss(unseen, labels) <= log_loss(fitted.model.predict_proba(fitted.mapped_outputs(outputs)), labels)


def test_heads_that_are_trained_further_have_gradients_and_those_that_answer_have_none(rows):
    fusion = recipe("concat_mlp", seeds=2)
    fusion.fit(*rows)
    trained = fusion.heads_to_train()
    assert len(trained) == 2
    assert all(parameter.requires_grad for head in trained for parameter in head.parameters())
    assert not any(parameter.requires_grad for head in fusion.model.modules() for parameter in head.parameters())
