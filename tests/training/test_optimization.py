"""One optimizer step with clipped gradients."""

from __future__ import annotations

import pytest
import torch

from utils.training.optimization import MAX_GRAD_NORM, step_with_clipped_gradients


@pytest.mark.parametrize(("scale", "norm"), [(0.25, 0.5), (100.0, MAX_GRAD_NORM)])
def test_the_step_has_at_most_the_maximal_norm(scale, norm):
    """With SGD at rate 1 the step is the gradient, which is `scale` in each of four weights."""
    model = torch.nn.Linear(4, 1, bias=False)
    initial = model.weight.detach().clone()
    (scale * model.weight.sum()).backward()
    scaler = torch.amp.GradScaler("cuda", enabled=False)
    step_with_clipped_gradients(scaler, torch.optim.SGD(model.parameters(), lr=1.0), model)
    assert (initial - model.weight).norm().item() == pytest.approx(norm, rel=1e-4)
