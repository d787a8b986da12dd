"""One optimizer step, like the base pipeline's."""

from __future__ import annotations

import torch
from torch import nn

MAX_GRAD_NORM = 1.0  # the base pipeline's value


def step_with_clipped_gradients(
    scaler: torch.amp.GradScaler, optimizer: torch.optim.Optimizer, model: nn.Module
) -> None:
    """Unscale the gradients of `model`, clip their norm to `MAX_GRAD_NORM` and step; the caller updates the scaler."""
    scaler.unscale_(optimizer)
    nn.utils.clip_grad_norm_(model.parameters(), MAX_GRAD_NORM)
    scaler.step(optimizer)
