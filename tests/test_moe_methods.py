"""Mixture of experts and cascade on arrays: what they run, what they learn, what they cost."""

from __future__ import annotations

import io
import warnings
from dataclasses import replace

import numpy as np
import pytest
import torch

from utils import moe_methods
from utils.combiners.protocol import MemberFacts, fit_crossfitted
from utils.combiners.routing import SparseCombiner, routed_members, run_sparse
from utils.core.config import validate
from utils.moe_methods import COMBINERS, CascadeCombiner, MixtureOfExperts
from utils.numeric.metrics import accuracy, softmax
from utils.numeric.uniform_mixture import mixed_with_uniform

N, C = 300, 4
NAMES = ("a", "b", "c", "d", "e")
LATENCIES = np.array([9.0, 1.0, 5.0, 7.0, 3.0])


def facts(latency=LATENCIES, size=None):
    return MemberFacts(NAMES, np.full(5, np.nan), latency, np.full(5, np.nan) if size is None else size)


def configured(method, known=None, **runs):
    config = validate({"runs": {"moe": {"epochs": 20, "gating_hidden_dim": 16}} | runs}, source="of a test")
    return COMBINERS[method].configured(config, known or facts())


@pytest.fixture
def halves():
    """Member b knows which half of the classes an image is of, a knows the first half well and c the second."""
    rng = np.random.default_rng(1)
    labels = rng.integers(0, C, N)
    logits = rng.normal(scale=0.5, size=(5, N, C)).astype(np.float32)
    rows = np.arange(N)
    logits[1, rows, labels] += 2
    logits[1, rows, labels ^ 1] += 2
    for member, own in ((0, labels < 2), (2, labels >= 2)):
        logits[member, rows[own], labels[own]] += 4
        logits[member, rows[~own], labels[~own] ^ 1] += 2
    return logits, labels, rows % 3


@pytest.fixture
def alike():
    """Five members of the same kind, right about 3 times out of 4."""
    rng = np.random.default_rng(2)
    labels = rng.integers(0, C, N)
    logits = rng.normal(size=(5, N, C)).astype(np.float32)
    logits[:, np.arange(N), labels] += 1.8
    return logits, labels, np.arange(N) % 3


def without_unread(combiner, logits):
    """The members' logits as a runner that runs nothing in vain has them, and what ran."""
    seen, calls = np.zeros_like(logits), []

    def run(member, rows):
        calls.append(member)
        seen[member, rows] = logits[member, rows]
        return logits[member, rows]

    found, ran = run_sparse(combiner, run, logits.shape)
    return found, ran, calls


# running only what is needed ------------------------------------------------------------------------------------------
@pytest.mark.parametrize("top_k", [1, 2, 4, 5])
def test_running_only_the_chosen_experts_gives_the_same_answers(halves, top_k):
    combiner = configured("moe", moe={"num_experts": 5, "top_k": top_k, "epochs": 20}).fit(*halves)
    assert isinstance(combiner, SparseCombiner)
    found, ran, calls = without_unread(combiner, halves[0])
    np.testing.assert_array_equal(found, combiner.predict_proba(halves[0]))
    assert ran.sum(axis=0).max() <= min(top_k + 1, 5)
    assert len(calls) == len(set(calls)) <= 5, "the rows of one expert are run together"
    assert (ran.sum() < ran.size) == (top_k < 5)


def test_sparse_and_dense_agree_where_all_experts_are_chosen(halves):
    full = configured("moe", moe={"num_experts": 5, "top_k": 5, "epochs": 20}).fit(*halves)
    dense = configured("moe", moe={"num_experts": 5, "top_k": 2, "epochs": 20}).dense().fit(*halves)
    np.testing.assert_array_equal(full.predict_proba(halves[0]), dense.predict_proba(halves[0]))
    assert routed_members(full, halves[0]).all()
    np.testing.assert_array_equal(without_unread(full, halves[0])[0], dense.predict_proba(halves[0]))


def test_a_cascade_runs_its_chain_from_the_front_and_no_further(alike):
    combiner = configured("cascade", cascade={"max_accuracy_loss": 0.02}).fit(*alike)
    assert isinstance(combiner, SparseCombiner)
    found, ran, _ = without_unread(combiner, alike[0])
    np.testing.assert_array_equal(found, combiner.predict_proba(alike[0]))
    inside = ran[combiner.chain]
    assert (np.diff(inside.astype(int), axis=0) <= 0).all(), "a later member ran before an earlier one"
    assert 1 < inside.sum(axis=0).mean() < 5
    means = softmax(alike[0][combiner.chain]).cumsum(axis=0) / np.arange(1, 6)[:, None, None]
    last = inside.sum(axis=0) - 1
    sure = means.max(axis=2) >= combiner.threshold
    assert all(not sure[: last[n], n].any() and (sure[last[n], n] or last[n] == 4) for n in range(N))


# mixture of experts ---------------------------------------------------------------------------------------------------
def test_the_gate_sends_images_to_the_expert_that_knows_them(halves):
    logits, labels, folds = halves
    combiner = configured("moe", moe={"num_experts": 3, "top_k": 1, "epochs": 20})
    unseen = fit_crossfitted(combiner, logits, labels, folds)
    report = combiner.report(NAMES)
    assert (sorted(report["experts"]), report["gate_reads"]) == (["a", "b", "c"], "b")
    best = max(accuracy(softmax(own), labels) for own in logits)
    assert accuracy(unseen, labels) > best + 0.1
    ran = routed_members(combiner, logits)
    first = labels < 2
    assert ran[0, first].mean() > 0.8 > 0.2 > ran[0, ~first].mean()
    assert ran[2, ~first].mean() > 0.8 > 0.2 > ran[2, first].mean()


def test_the_table_of_use_adds_up(halves):
    combiner = configured("moe", moe={"num_experts": 4, "top_k": 2, "epochs": 20}).fit(*halves)
    report = combiner.report(NAMES)
    table = report["expert_use"]
    assert list(table) == report["experts"]
    assert sum(use["runs"] for use in table.values()) == pytest.approx(report["expected_experts"])
    assert sum(use["weight"] for use in table.values()) == pytest.approx(1)
    assert table[report["gate_reads"]]["runs"] == 1
    assert 2 <= report["expected_experts"] <= 3
    assert (combiner.gate.weights(halves[0])[:, combiner.gate.reader] > 0).all()
    assert 1 <= report["balance"] + 0.05 <= 4


@pytest.mark.parametrize("latency", [LATENCIES, LATENCIES[::-1], LATENCIES[[2, 0, 1, 3, 4]]])
def test_the_gate_reads_the_cheapest_expert(halves, latency):
    settings = {"moe": {"num_experts": 3, "top_k": 1, "epochs": 2}, "stacking": {"fallback": False}}
    report = configured("moe", facts(latency), **settings).fit(*halves).report(NAMES)
    assert report["gate_reads"] == min(report["experts"], key=lambda name: latency[NAMES.index(name)])


def test_the_same_experts_serve_all_images_where_nothing_is_gained_by_a_gate(alike):
    alike[0][[0, 1, 4]] = np.random.default_rng(4).normal(size=(3, N, C))  # what the gate reads says nothing
    combiner = configured("moe", moe={"num_experts": 4, "top_k": 2}).fit(*alike)
    report = combiner.report(NAMES)
    assert report["is_fixed"]
    assert combiner.used(5).tolist() == [False, False, True, True, False]
    assert report["expected_experts"] == 2
    forced = configured("moe", moe={"num_experts": 4, "top_k": 2}, stacking={"fallback": False}).fit(*alike)
    assert not forced.report(NAMES)["is_fixed"]


def test_more_experts_than_members_are_all_members(halves):
    logits, labels, folds = halves
    known = MemberFacts(NAMES[:2], *(np.full(2, np.nan) for _ in range(3)))
    combiner = configured("moe", known, moe={"num_experts": 9, "top_k": 7}).fit(logits[:2], labels, folds)
    assert (combiner.gate.top_k, combiner.used(2).tolist()) == (2, [True, True])


def test_experts_are_chosen_without_the_labels_of_the_held_out_fold(alike):
    logits, labels, folds = alike
    inside = folds == 2
    recipe = configured("moe", moe={"num_experts": 2, "top_k": 1, "epochs": 5})
    unseen = fit_crossfitted(recipe, logits, labels, folds)
    other = np.where(inside, (labels + 1) % C, labels)
    again = fit_crossfitted(configured("moe", moe={"num_experts": 2, "top_k": 1, "epochs": 5}), logits, other, folds)
    np.testing.assert_array_equal(again[inside], unseen[inside])
    assert (again[~inside] != unseen[~inside]).any()


# cascade --------------------------------------------------------------------------------------------------------------
def test_the_chain_goes_from_the_cheapest_on_by_latency_then_size_then_skill(alike):
    assert configured("cascade").fit(*alike).report(NAMES)["chain"] == ["b", "e", "c", "d", "a"]
    unknown = np.full(5, np.nan)
    by_size = configured("cascade", facts(unknown, LATENCIES[::-1])).fit(*alike)
    assert by_size.report(NAMES)["chain"] == ["d", "a", "c", "b", "e"]
    alike[0][3, np.arange(N), alike[1]] += 3
    by_skill = configured("cascade", facts(unknown)).fit(*alike)
    assert by_skill.report(NAMES)["chain"][0] == "d"


def test_more_accuracy_to_lose_means_fewer_members_to_run(alike):
    logits, labels, folds = alike
    runs, losses = [], []
    for allowed in (0.0, 0.01, 0.05, 1.0):
        combiner = configured("cascade", cascade={"max_accuracy_loss": allowed}).fit(logits, labels, folds)
        assert combiner.facts["accuracy_of_all"] - combiner.facts["accuracy"] <= allowed + 1e-9
        runs.append(combiner.facts["expected_experts"])
        losses.append(accuracy(fit_crossfitted(combiner, logits, labels, folds), labels))
    assert runs == sorted(runs, reverse=True)
    assert runs[0] > runs[1] > runs[2] > runs[3] == 1
    assert losses[1] > combiner.facts["accuracy_of_all"] - 0.03
    assert combiner.used(5).tolist() == [False, True, False, False, False], "nobody waits for the others"


def test_rows_pass_the_chain_that_was_chosen_without_their_fold(alike, monkeypatch):
    logits, labels, folds = alike
    seen = []
    choose = moe_methods.best_members
    monkeypatch.setattr(
        moe_methods, "best_members", lambda *rows, count: seen.append(rows) or choose(*rows, count=count)
    )
    configured("cascade").fit(logits, labels, folds)
    assert len(seen) == 4
    for fold, (others, truth) in enumerate(seen[1:]):
        np.testing.assert_array_equal(others, logits[:, folds != fold])
        np.testing.assert_array_equal(truth, labels[folds != fold])


def test_a_dense_cascade_is_the_mean_of_its_chain(alike):
    logits, labels, folds = alike
    dense = replace(
        CascadeCombiner.configured(validate({}, source="of a test"), facts()).dense(), use_temperature=False
    )
    found = dense.fit(logits, labels, folds).predict_proba(logits)
    expected = mixed_with_uniform(softmax(logits).mean(axis=0), dense.uniform_weight)
    np.testing.assert_allclose(found, expected, atol=1e-12)


def test_leaving_shares_add_up(alike):
    report = configured("cascade", cascade={"max_members": 3}).fit(*alike).report(NAMES)
    assert list(report["leaves"]) == report["chain"]
    assert sum(report["leaves"].values()) == pytest.approx(1)
    stages = dict(zip(report["chain"], (1, 2, 3), strict=True))
    by_hand = sum(stages[member] * share for member, share in report["leaves"].items())
    assert report["expected_experts"] == pytest.approx(by_hand)


def test_dense_recipes_start_unfitted():
    assert isinstance(configured("moe").dense(), MixtureOfExperts)
    assert configured("moe").dense().model is None


# export ---------------------------------------------------------------------------------------------------------------
def through_onnx(module):
    import onnxruntime

    file = io.BytesIO()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # the exporter's own age
        names = {"input_names": ["logits"], "dynamic_axes": {"logits": {0: "rows"}}}
        torch.onnx.export(module, (torch.zeros(2, 5, C),), file, dynamo=False, **names)
    session = onnxruntime.InferenceSession(file.getvalue(), providers=["CPUExecutionProvider"])
    return lambda logits: session.run(None, {"logits": logits})[0]


def through_torch_export(module):
    """The way to TFLite."""
    dynamic = ({0: torch.export.Dim("rows", max=2**31)},)  # torch 2.6 rejects a free size without a bound
    program = torch.export.export(module, (torch.zeros(2, 5, C),), dynamic_shapes=dynamic).module()
    return lambda logits: program(torch.from_numpy(logits)).numpy()


@pytest.mark.parametrize("runtime", [through_onnx, through_torch_export])
@pytest.mark.parametrize(
    ("method", "settings"), [("moe", {"num_experts": 5, "epochs": 20}), ("cascade", {"max_accuracy_loss": 0.02})]
)
def test_the_modules_have_no_control_flow_of_their_own(halves, method, settings, runtime):
    logits = halves[0]
    combiner = configured(method, **{method: settings}).fit(*halves)
    assert len(np.unique(routed_members(combiner, logits).sum(axis=0))) > 1, "all rows go one way"
    answer = runtime(combiner.to_module().eval())
    for rows in (1, 17, N):
        found = answer(np.ascontiguousarray(logits[:, :rows].transpose(1, 0, 2)))
        np.testing.assert_allclose(found, combiner.predict_proba(logits[:, :rows]), atol=1e-5)
