"""Gates trained in one batch: gradients against autograd, and the bytes of each gate trained alone."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from utils.combiners.batched_gates import BALANCE, BatchedSparseGates, Z, mixture_gradient, sparse_gradient
from utils.combiners.gate_learners import LEARNING_RATE, AttentionLearner, SparseLearner
from utils.combiners.gates import ExpertChoice
from utils.numeric import nested_cv
from utils.numeric.batched_training import Schedule
from utils.numeric.metrics import SMALLEST_PROBABILITY

GATES, ROWS, EXPERTS = 3, 8, 4
PADDING = 2  # rows at the end of each batch


def softmax_over(scores, takes_part):
    return torch.softmax(scores.masked_fill(~takes_part, -torch.inf), dim=1)


def balance(scores, chosen):
    """Experts times the sum over them of the fraction of all choices times the mean probability."""
    fractions = chosen.to(scores.dtype).sum(dim=0) / chosen.sum()
    return scores.shape[1] * (fractions * torch.softmax(scores, dim=1).mean(dim=0)).sum()


def one_gate_loss(scores, spreads, noise, truths, is_reader, top_k):
    """The loss of one gate on its rows (n, E), as the papers write it."""
    noisy = scores + noise * torch.nn.functional.softplus(spreads)
    chosen = torch.zeros(noisy.shape, dtype=torch.bool).scatter(1, noisy.topk(top_k, dim=1).indices, True)
    mixed = (softmax_over(noisy, chosen | is_reader) * truths).sum(dim=1)
    z = torch.logsumexp(scores, dim=1).square().mean()
    return -mixed.log().mean() + BALANCE * balance(scores, chosen) + Z * z


@pytest.fixture
def batch():
    generator = torch.Generator().manual_seed(4)
    scores, spreads, noise = torch.randn(3, GATES, ROWS, EXPERTS, generator=generator, dtype=torch.float64)
    truths = torch.rand(GATES, ROWS, EXPERTS, generator=generator, dtype=torch.float64)
    divisors = torch.full((GATES, ROWS), 1 / (ROWS - PADDING), dtype=torch.float64)
    divisors[:, -PADDING:] = 0
    is_reader = torch.eye(EXPERTS, dtype=torch.bool)[[1, 0, 3]].unsqueeze(1)
    return scores, spreads, noise, truths, divisors, is_reader


@pytest.mark.parametrize("top_k", [1, 2, EXPERTS])
def test_gradients_of_sparse_gates_are_those_of_autograd(batch, top_k, monkeypatch):
    """With weights of the additional losses that let no term hide behind another."""
    scores, spreads, noise, truths, _, is_reader = batch
    for module in ("utils.combiners.batched_gates", __name__):
        monkeypatch.setattr(f"{module}.BALANCE", 0.7)
        monkeypatch.setattr(f"{module}.Z", 0.3)
    found = sparse_gradient(*batch, top_k)
    for gate in range(GATES):
        inputs = torch.stack([scores[gate], spreads[gate]])[:, :-PADDING].requires_grad_()
        of_gate = (values[gate, :-PADDING] for values in (noise, truths))
        one_gate_loss(*inputs, *of_gate, is_reader[gate], top_k).backward()
        expected = torch.cat([*inputs.grad], dim=1)
        np.testing.assert_allclose(found[gate, :-PADDING], expected, rtol=1e-9, atol=1e-12)
    assert (found[:, -PADDING:] == 0).all()


def test_the_balance_loss_is_one_for_even_use_and_the_number_of_experts_for_one():
    """The reference above against values worked out by hand."""
    even = torch.tensor([[True, False], [False, True]])
    assert balance(torch.zeros(2, 2), even).item() == pytest.approx(1)
    scores = torch.log(torch.tensor([[2.0, 1.0, 1.0], [1.0, 1.0, 2.0]]))
    chosen = torch.tensor([[True, True, False], [True, False, True]])
    assert balance(scores, chosen).item() == pytest.approx(3 * (1 / 2 * 3 / 8 + 1 / 4 * 1 / 4 + 1 / 4 * 3 / 8))


def test_experts_that_neither_the_gate_nor_the_reader_chose_have_no_influence(batch):
    scores, spreads, noise, truths, divisors, is_reader = batch
    noisy = scores + noise * torch.nn.functional.softplus(spreads)
    takes_part = (noisy == noisy.amax(dim=2, keepdim=True)) | is_reader
    assert not takes_part.all()
    changed = torch.where(takes_part, truths, 0.123)
    expected = sparse_gradient(scores, spreads, noise, truths, divisors, is_reader, 1)
    assert torch.equal(sparse_gradient(scores, spreads, noise, changed, divisors, is_reader, 1), expected)


def test_gradients_of_a_mixture_are_those_of_autograd(batch):
    scores, _, _, truths, _, _ = batch
    logits = scores.clone().requires_grad_()
    weights = torch.softmax(logits, dim=2)
    (-(weights * truths).sum(dim=2).log()).sum().backward()
    np.testing.assert_allclose(mixture_gradient(weights.detach(), truths), logits.grad, rtol=1e-9, atol=1e-12)
    tiny = torch.full_like(truths, SMALLEST_PROBABILITY / 2)
    assert (mixture_gradient(weights.detach(), tiny) == 0).all()


def members_and_labels(rows=260, members=4, classes=3):
    rng = np.random.default_rng(8)
    labels = rng.integers(0, classes, rows)
    logits = rng.normal(size=(members, rows, classes)).astype(np.float32)
    return logits + np.eye(classes, dtype=np.float32)[labels] * rng.uniform(0, 3, (members, rows, 1)), labels


LEARNERS = {
    "attention": AttentionLearner(8, 4, 0.01, 3),
    # The experts and the reader depend on the rows of the fit.
    "sparse": SparseLearner(
        lambda logits, labels: np.argsort(logits[:, 0, 0])[:3], 2, 8, 4, 3, costs=np.array([3.0, 1.0, 4.0, 2.0])
    ),
}


@pytest.mark.parametrize("name", LEARNERS)
def test_gates_side_by_side_have_the_bytes_of_each_alone(name):
    logits, labels = members_and_labels()
    learner = LEARNERS[name]
    held_out = [np.arange(len(labels)) % 5 == fold for fold in range(4)]
    ((fits, together),) = learner.trainings(0, logits, labels, held_out)
    assert list(fits) == [0, 1, 2, 3]
    alone = [learner.trainings(0, logits, labels, [mask])[0][1] for mask in held_out]
    wanted = [0, 1, 2, 3]
    for stop in range(len(learner.settings())):
        found = together.advance(wanted)
        for number, values in zip(wanted, found, strict=True):
            assert values.tobytes() == alone[number].advance([0])[0].tobytes(), f"gate {number} at stop {stop}"
        wanted = wanted[1:] if stop == 1 else wanted  # one that has stopped changes nothing about the others


@pytest.mark.parametrize(("width", "together"), [(8, 4), (6, 1)])
def test_gates_whose_bytes_could_depend_on_others_are_trained_alone(width, together):
    logits, labels = members_and_labels()
    held_out = [np.arange(len(labels)) % 5 == fold for fold in range(4)]
    trainings = AttentionLearner(width, 4, 0.01, 3).trainings(0, logits, labels, held_out)
    assert {len(fits) for fits, _ in trainings} == {together}


def test_a_gate_of_no_epochs_is_the_mean_of_its_first_experts():
    logits, labels = members_and_labels()
    learner = LEARNERS["sparse"]
    assert learner.settings()[0] == {"epochs": 0}
    gate = learner.fit(logits, labels, {"epochs": 0})
    assert gate.experts.tolist() == learner.choice(logits, labels).experts[:2].tolist()
    weights = gate.weights(logits)
    np.testing.assert_allclose(weights, 1 / 2)


def test_experts_are_at_first_chosen_evenly(monkeypatch):
    logits, labels = members_and_labels(rows=3000)
    seen = []
    original = sparse_gradient

    def recorded(scores, spreads, noise, *others):
        seen.append(scores + noise * torch.nn.functional.softplus(spreads))
        return original(scores, spreads, noise, *others)

    monkeypatch.setattr("utils.combiners.batched_gates.sparse_gradient", recorded)
    choice = ExpertChoice(np.array([2, 0, 1]), 0)
    gates = BatchedSparseGates(logits, labels, [np.arange(3000)], [choice], 1, 8, Schedule(1, LEARNING_RATE, 1.0), 5)
    gates.n_batches, gates.width = 1, 3000
    gates.run_to(1)
    first = torch.nn.functional.one_hot(seen[0][0].argmax(dim=1), 3).float().mean(dim=0)
    np.testing.assert_allclose(first, 1 / 3, atol=0.04)


@pytest.mark.parametrize("name", LEARNERS)
def test_the_rows_of_a_fold_do_not_decide_about_its_copy(name):
    """With other labels in one fold, its rows have the same cross-fitted probabilities, bit for bit."""
    logits, labels = members_and_labels(rows=120)
    folds = np.arange(len(labels)) % 4
    changed = np.where(folds == 1, (labels + 1) % 3, labels)
    before, after = (
        nested_cv.cross_validate(LEARNERS[name], logits, truth, folds).nested_crossfit for truth in (labels, changed)
    )
    assert before[folds == 1].tobytes() == after[folds == 1].tobytes()
    assert before[folds == 0].tobytes() != after[folds == 0].tobytes()
