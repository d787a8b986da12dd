"""Which scores are the largest, in every runtime."""

from __future__ import annotations

import numpy as np
import torch

from utils.combiners.gates import SparseGate
from utils.combiners.routing_heads import top_k_mask


def test_the_largest_are_those_of_topk_and_of_equals_the_first():
    scores = torch.randn(50, 7, generator=torch.Generator().manual_seed(1))
    for count in (1, 3, 7):
        wanted = torch.zeros(50, 7, dtype=torch.bool).scatter(1, scores.topk(count, dim=1).indices, True)
        assert torch.equal(top_k_mask(scores, count), wanted)
    assert top_k_mask(torch.tensor([[1.0, 2.0, 2.0, 2.0]]), 2).tolist() == [[False, True, True, False]]


def test_scores_that_differ_by_rounding_errors_are_ties_in_the_gate_and_in_its_module():
    scores = np.array([[0.003, -0.003, -0.003 + 1e-9, -0.003 - 1e-9], [0.5, 0.25, 0.25 + 1e-5, 0.0]])
    expected = [[True, True, False, False], [True, False, True, False]]
    gate = SparseGate(np.arange(4), 0, 2, (np.zeros((3, 1)), np.zeros((1, 4))), (np.zeros(1), np.zeros(4)))
    assert gate.chosen(scores).tolist() == expected
    assert top_k_mask(torch.from_numpy(scores), 2).tolist() == expected
    assert top_k_mask(torch.from_numpy(scores).float(), 2).tolist() == expected
