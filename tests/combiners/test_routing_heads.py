"""Losses of a gate against values worked out by hand, its gradients against finite differences."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from utils.combiners.gating import gate_loss
from utils.combiners.routing_heads import NoisyTopK, balance_loss, top_k_mask, z_loss

ROWS, FEATURES, WIDTH, EXPERTS, CLASSES = 6, 3, 4, 3, 2


@pytest.fixture
def gate():
    """A gate in double precision away from its start, rows for it, labels and noise."""
    generator = torch.Generator().manual_seed(3)
    module = NoisyTopK((FEATURES, WIDTH, EXPERTS, CLASSES), top_k=2, reader=1).double()
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator, dtype=torch.float64))
    seen = torch.randn(ROWS, FEATURES, generator=generator, dtype=torch.float64)
    answers = torch.rand(ROWS, EXPERTS, CLASSES, generator=generator, dtype=torch.float64)
    rows = torch.cat([seen, (answers / answers.sum(dim=2, keepdim=True)).flatten(1)], dim=1)
    noise = torch.randn(ROWS, EXPERTS, generator=generator, dtype=torch.float64)
    return module, rows, torch.tensor([0, 1, 1, 0, 1, 0]), noise


def test_the_largest_are_those_of_topk_and_of_equals_the_first():
    scores = torch.randn(50, 7, generator=torch.Generator().manual_seed(1))
    for count in (1, 3, 7):
        wanted = torch.zeros(50, 7, dtype=torch.bool).scatter(1, scores.topk(count, dim=1).indices, True)
        assert torch.equal(top_k_mask(scores, count), wanted)
    assert top_k_mask(torch.tensor([[1.0, 2.0, 2.0, 2.0]]), 2).tolist() == [[False, True, True, False]]


def test_balance_loss_is_what_is_worked_out_by_hand():
    scores = torch.log(torch.tensor([[1.0, 3.0], [1.0, 3.0]]))  # probabilities 1/4 and 3/4
    all_to_one = torch.tensor([[False, True], [False, True]])
    assert balance_loss(scores, all_to_one).item() == pytest.approx(2 * (0 * 0.25 + 1 * 0.75))
    one_each = torch.tensor([[True, False], [False, True]])
    assert balance_loss(scores, one_each).item() == pytest.approx(1)
    # Two of three: shares 1/2, 1/4, 1/4 of the four choices; probabilities 1/2, 1/4, 1/4 and 1/4, 1/4, 1/2.
    scores = torch.log(torch.tensor([[2.0, 1.0, 1.0], [1.0, 1.0, 2.0]]))
    chosen = torch.tensor([[True, True, False], [True, False, True]])
    by_hand = 3 * (1 / 2 * 3 / 8 + 1 / 4 * 1 / 4 + 1 / 4 * 3 / 8)
    assert balance_loss(scores, chosen).item() == pytest.approx(by_hand)


def test_balance_loss_draws_scores_from_the_crowded_expert_to_those_that_nobody_chose():
    scores = torch.zeros(4, 3, requires_grad=True)
    balance_loss(scores, torch.tensor([[True, False, False]] * 4)).backward()
    assert (scores.grad[:, 0] > 0).all()
    assert (scores.grad[:, 1:] < 0).all()


def test_z_loss_is_the_square_of_log_sum_exp():
    assert z_loss(torch.zeros(2, 4)).item() == pytest.approx(math.log(4) ** 2)
    assert z_loss(torch.log(torch.tensor([[1.0, 3.0], [5.0, 5.0]]))).item() == pytest.approx(
        (math.log(4) ** 2 + math.log(10) ** 2) / 2
    )


def test_gradients_of_the_gate_are_those_of_finite_differences(gate):
    module, rows, labels, noise = gate
    gate_loss(module, rows, labels, noise).backward()
    chosen, step = module(rows, noise).chosen, 1e-6
    for name, parameter in module.named_parameters():
        found, flat = torch.empty(parameter.numel(), dtype=torch.float64), parameter.data.view(-1)
        for place in range(len(flat)):
            ends = []
            for sign in (1, -1):
                flat[place] += sign * step
                ends.append(gate_loss(module, rows, labels, noise).item())
                assert torch.equal(module(rows, noise).chosen, chosen), "a step changes a choice"
                flat[place] -= sign * step
            found[place] = (ends[0] - ends[1]) / (2 * step)
        np.testing.assert_allclose(parameter.grad.view(-1), found, rtol=1e-5, atol=1e-8, err_msg=name)
        assert found.abs().max() > 1e-4, f"{name} has no influence"


def test_only_the_chosen_and_the_reader_take_part(gate):
    module, rows, _, noise = gate
    routed = module(rows, noise)
    left_out = ~routed.chosen
    left_out[:, module.reader] = False
    assert left_out.any()
    assert not routed.chosen[:, module.reader].all()
    changed = rows.clone()
    answers = changed[:, FEATURES:].view(ROWS, EXPERTS, CLASSES)
    answers[left_out] = 0.5
    assert torch.equal(module(changed, noise).log_probabilities, routed.log_probabilities)
    answers[:, module.reader] = 0.5
    assert (module(changed, noise).log_probabilities != routed.log_probabilities).any(dim=1).all()


def test_training_starts_from_an_even_choice():
    module = NoisyTopK((FEATURES, WIDTH, EXPERTS, CLASSES), top_k=1, reader=0)
    rows = torch.randn(3000, FEATURES + EXPERTS * CLASSES, generator=torch.Generator().manual_seed(5))
    noise = torch.randn(3000, EXPERTS, generator=torch.Generator().manual_seed(6))
    shares = module(rows, noise).chosen.float().mean(dim=0)
    np.testing.assert_allclose(shares, 1 / EXPERTS, atol=0.04)
