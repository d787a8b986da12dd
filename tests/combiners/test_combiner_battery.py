"""One battery over every combiner in the families' tables; a new one is tested by its line in the table."""

from __future__ import annotations

import json
from copy import deepcopy
from functools import partial

import numpy as np
import pytest
import torch
from combiner_cases import FACTS, QUICK, C, M, N, changed_settings, facts_of

from utils.building import ensembles
from utils.building.ensembles import COMBINERS, Crossfit, Ensemble, Provenance
from utils.combiners.logistic import Coefficients
from utils.combiners.perceptron import Layers
from utils.combiners.protocol import Combiner, fit_nested, saved_fields
from utils.combiners.stacking_features import KINDS, features
from utils.core.config import Config
from utils.core.workspace import Workspace
from utils.numeric.metrics import log_loss_per_row
from utils.numeric.uniform_mixture import mixed_with_uniform
from utils.predictions.rows import MemberOutputs

pytestmark = pytest.mark.usefixtures("short_searches")

WIDTHS = (5, 8, 4, 6)
FOLDS = 3


@pytest.fixture(params=sorted(COMBINERS), scope="module")
def make(request):
    return partial(COMBINERS[request.param].configured, QUICK, FACTS)


@pytest.fixture(scope="module")
def rows(make):
    """Outputs, labels, folds; what reads embeddings gets some, each of its own width. Shared: never write to it."""
    rng = np.random.default_rng(7)
    labels = rng.integers(0, C, N)
    logits = rng.normal(size=(M, N, C)).astype(np.float32)
    logits[:, np.arange(N), labels] += 1
    outputs = logits
    if make().reads_embeddings:
        outputs = MemberOutputs(
            logits, tuple(_embeddings(rng, own, width) for own, width in zip(logits, WIDTHS, strict=True))
        )
    return outputs, labels, np.arange(N) % FOLDS


@pytest.fixture(scope="module")
def fitted(make, rows):
    """Fitted once for all that only ask it."""
    return make().fit(*rows)


def _embeddings(rng, logits, width):
    """(N, D): those of a network whose last layer reads them, near enough."""
    return (logits @ rng.normal(size=(C, width)) + rng.normal(size=(len(logits), width)) / 4).astype(np.float32)


def _extreme(outputs):
    """The same rows by networks that are certain."""
    if isinstance(outputs, MemberOutputs):
        return MemberOutputs(100 * outputs.logits, tuple(100 * own for own in outputs.embeddings))
    return 100 * outputs


def _tensors(outputs):
    """What the module takes: logits (N, M, C), and a list of embeddings where there are any."""
    if isinstance(outputs, MemberOutputs):
        return _tensors(outputs.logits)[0], [torch.from_numpy(own) for own in outputs.embeddings]
    return (torch.from_numpy(outputs.transpose(1, 0, 2).copy()),)


def test_answers_the_protocol(make):
    assert isinstance(make(), Combiner)
    assert isinstance(make().learns, bool)
    assert isinstance(make().reads_embeddings, bool)
    for place in make().settings:
        Config().at(place)


def test_probabilities_are_probabilities(fitted, rows):
    found = fitted.predict_proba(rows[0])
    assert found.shape == (N, C)
    assert (found >= 0).all()
    np.testing.assert_allclose(found.sum(axis=1), 1, atol=1e-12)


def test_no_fitted_answer_is_certain(make, fitted, rows):
    outputs = _extreme(rows[0])
    found = fitted.predict_proba(outputs)
    least = 1 / (10 * (C - 1) * (N + 2)) if make().learns else 0
    assert found.min() >= least * (1 - 1e-9)
    costs = log_loss_per_row(found, found.argmin(axis=1))
    assert (costs <= np.log(10 * (C - 1) * (N + 2)) + 1e-9).all() or not make().learns
    with torch.no_grad():
        assert fitted.to_module().eval()(*_tensors(outputs)).min() >= least * 0.999


def test_cross_fitted_copies_have_the_mixture_of_their_own_rows(make, rows):
    outputs, labels, folds = rows
    if not make().learns:
        pytest.skip("nothing is fitted")
    nested = fit_nested(make(), _extreme(outputs), labels, folds)
    assert nested.crossfit.min() >= 0.999 / (10 * (C - 1) * (N - N / FOLDS + 2))
    for fold, values in nested.inner.items():
        assert values[folds != fold].min() >= 0.999 / (10 * (C - 1) * (N - 2 * N / FOLDS + 2))


def test_what_an_earlier_version_saved_answers_as_it_did(fitted, rows):
    state = {name: values for name, values in fitted.state().items() if name != "uniform_weight"}
    earlier = type(fitted).from_state(state)
    assert earlier.uniform_weight == 0
    found = mixed_with_uniform(earlier.predict_proba(rows[0]), fitted.uniform_weight)
    np.testing.assert_allclose(found, fitted.predict_proba(rows[0]), atol=1e-15)


def test_state_restores_the_combiner(fitted, rows):
    again = type(fitted).from_state(fitted.state())
    assert again.predict_proba(rows[0]).tobytes() == fitted.predict_proba(rows[0]).tobytes()


def test_rows_do_not_influence_one_another(fitted, rows):
    together = fitted.predict_proba(rows[0])
    alone = np.concatenate([fitted.predict_proba(rows[0][:, n : n + 1]) for n in range(N)])
    np.testing.assert_allclose(alone, together, atol=1e-12)


def test_the_order_of_members_does_not_matter_to_a_vote(make, rows):
    if make().learns:
        pytest.skip("a fitted combiner knows its members by their place")
    logits = rows[0]
    np.testing.assert_allclose(make().predict_proba(logits[::-1]), make().predict_proba(logits), atol=1e-12)


def test_what_it_does_not_use_can_be_left_out(make, rows):
    outputs, labels, folds = deepcopy(rows)
    getattr(outputs, "logits", outputs)[3] = 0  # a member that knows nothing
    fitted = make().fit(outputs, labels, folds)
    used = fitted.used(M)
    assert used.shape == (M,)
    assert used.any()
    alone = fitted.restricted(used).predict_proba(outputs[used])
    np.testing.assert_allclose(alone, fitted.predict_proba(outputs), atol=1e-12)


def test_its_report_is_for_json_and_its_weights_are_named(fitted):
    report = json.loads(json.dumps(fitted.report(FACTS.names), allow_nan=False))
    if report.get("weights") is not None:
        assert tuple(report["weights"]) == FACTS.names
        assert min(report["weights"].values()) >= 0


def test_same_rows_same_bytes_whatever_was_fitted_before(make, rows, fitted):
    outputs, labels, folds = rows
    again = make().fit(outputs[:, ::2], labels[::2], folds[::2]).fit(*rows)
    assert {k: v.tobytes() for k, v in again.state().items()} == {k: v.tobytes() for k, v in fitted.state().items()}


@pytest.fixture(scope="module")
def traced(fitted, rows):
    return torch.jit.trace(fitted.to_module().eval(), _tensors(rows[0][:, :2]))


@pytest.mark.parametrize("batch", [1, 3, 17])
def test_module_agrees_traced_at_two_rows_and_run_at_others(traced, fitted, rows, batch):
    with torch.no_grad():
        found = traced(*_tensors(rows[0][:, :batch])).numpy()
    assert found.shape == (batch, C)
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, fitted.predict_proba(rows[0][:, :batch]), rtol=0, atol=1e-5)


def test_extreme_logits_stay_finite(make):
    outputs = np.array([[[1e30, 0, -1e30]], [[-1e30, 1e30, 0]], [[0, 0, 0]], [[3e38, -3e38, 0]]], dtype=np.float32)
    if make().reads_embeddings:
        outputs = MemberOutputs(outputs, tuple(np.full((1, width), 1e30, dtype=np.float32) for width in WIDTHS))
    found = make().fit(outputs, np.array([0]), np.array([0])).predict_proba(outputs)
    assert np.isfinite(found).all()
    np.testing.assert_allclose(found.sum(axis=1), 1, atol=1e-9)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("battery")


@pytest.mark.parametrize("members", [1, 2, 3, 5, 8])
@pytest.mark.parametrize("method", sorted(COMBINERS))
def test_no_setting_is_lost_on_disk(method, members, folder):
    """With every setting changed, the ensemble read from disk and its module answer as the one that was fitted."""
    facts = facts_of(members)
    combiner = COMBINERS[method].configured(changed_settings(COMBINERS[method]), facts)
    rng = np.random.default_rng(members)
    labels = rng.integers(0, C, 24)
    logits = (rng.normal(size=(members, 24, C)) + 2 * np.eye(C)[labels]).astype(np.float32)
    outputs = logits
    if combiner.reads_embeddings:
        outputs = MemberOutputs(logits, tuple(_embeddings(rng, own, 4 + place) for place, own in enumerate(logits)))
    expected = combiner.fit(outputs, labels, np.arange(24) % 3).predict_proba(outputs)
    used = combiner.used(members)
    names = tuple(np.array(facts.names)[used])
    restored = _from_disk(folder / f"{method}-{members}", method, combiner.restricted(used), names)
    found = restored.predict_proba(outputs[used])
    assert found.tobytes() == combiner.restricted(used).predict_proba(outputs[used]).tobytes()
    np.testing.assert_allclose(found, expected, atol=1e-12)
    with torch.no_grad():
        exported = restored.to_module().eval()(*_tensors(outputs[used])).numpy()
    np.testing.assert_allclose(exported, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_a_stacker_is_restored_with_its_kind_of_features(kind):
    rng = np.random.default_rng(0)
    logits = rng.normal(size=(M, 5, C)).astype(np.float32)
    width = features(logits, kind).shape[1]
    matrix, bias = rng.normal(size=(width, C)).astype(np.float32), np.zeros(C, dtype=np.float32)
    fitted = {
        "stacking_lr": Coefficients(kind, np.ones(M), matrix, bias),
        "stacking_mlp": Layers(kind, (matrix,), (bias,)),
    }
    for method, model in fitted.items():
        stacker = COMBINERS[method].configured(QUICK, FACTS)
        stacker.model = model
        again = COMBINERS[method].from_state(stacker.state())
        assert again.model.kind == kind
        np.testing.assert_array_equal(again.predict_proba(logits), stacker.predict_proba(logits))


@pytest.mark.parametrize("method", sorted(COMBINERS))
def test_its_saved_settings_come_from_the_configuration(method):
    kind = COMBINERS[method]
    default, changed = kind.configured(Config(), FACTS), kind.configured(changed_settings(kind), FACTS)
    for name in saved_fields(kind):
        assert not np.array_equal(getattr(default, name), getattr(changed, name)), name


def _from_disk(folder, method, combiner, names):
    workspace = Workspace(*([folder] * 8))
    nothing = Provenance((), ())
    none = np.zeros(0, dtype=np.int64)
    classes = tuple("abc"[:C])
    saved = Ensemble("it", method, names, names, classes, combiner, nothing, "digest", dict.fromkeys(names, ""), 0)
    ids = none.astype(str)
    ensembles.save(workspace, saved, Crossfit(np.zeros((0, C)), none, ids, ids, none), {})
    return ensembles.load(workspace, "it").combiner
