"""Which scores are the largest, in every runtime."""

from __future__ import annotations

import torch

from utils.combiners.routing_heads import top_k_mask


def test_the_largest_are_those_of_topk_and_of_equals_the_first():
    scores = torch.randn(50, 7, generator=torch.Generator().manual_seed(1))
    for count in (1, 3, 7):
        wanted = torch.zeros(50, 7, dtype=torch.bool).scatter(1, scores.topk(count, dim=1).indices, True)
        assert torch.equal(top_k_mask(scores, count), wanted)
    assert top_k_mask(torch.tensor([[1.0, 2.0, 2.0, 2.0]]), 2).tolist() == [[False, True, True, False]]
