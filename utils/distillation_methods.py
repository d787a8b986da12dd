"""What a student is taught by: the loss of distillation, mixed images, and the average of the student's weights."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F


def soften(log_probabilities: Tensor, temperature: float) -> Tensor:
    """Log-probabilities (B, C) at a temperature, normalised again."""
    return F.log_softmax(log_probabilities / temperature, dim=1)


def teacher_loss(logits: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    """T^2 KL(teacher || student), both at temperature T, mean over the rows: a scalar in nats.

    `logits` (B, C) are the student's, `teacher` (B, C) log-probabilities at temperature 1. The factor keeps the size of
    the gradient, T (student - teacher) / B, whatever T is (Hinton, Vinyals and Dean 2015).
    """
    student = F.log_softmax(logits / temperature, dim=1)
    target = soften(teacher, temperature)
    return temperature**2 * F.kl_div(student, target, reduction="batchmean", log_target=True)


@dataclass(frozen=True)
class Mixing:
    """How each image of a batch is mixed with another."""

    partner: Tensor
    """int64 (B,), the place in the batch of the other one"""
    weight: float
    """Of the image itself; of the partner what is left"""
    box: tuple[float, float, float, float] | None
    """Top, bottom, left and right of what comes from the partner, as shares of the sides; None: all is blended"""

    def images(self, images: Tensor) -> Tensor:
        """Images (B, C, H, W) mixed: blended (Zhang et al. 2018, mixup) or pasted (Yun et al. 2019, CutMix)."""
        others = images[self.partner]
        if self.box is None:
            return self.weight * images + (1 - self.weight) * others
        top, bottom, left, right = self._pixels(images.shape[2], images.shape[3])
        mixed = images.clone()
        mixed[:, :, top:bottom, left:right] = others[:, :, top:bottom, left:right]
        return mixed

    def _pixels(self, height: int, width: int) -> tuple[int, int, int, int]:
        assert self.box is not None
        top, bottom, left, right = self.box
        return round(top * height), round(bottom * height), round(left * width), round(right * width)


CONCENTRATION = {"mixup": 0.2, "cutmix": 1.0}  # of the Beta distribution of the shares, as in the two papers


def draw_mixing(kind: str, count: int, rng: np.random.Generator) -> Mixing:
    """A mixing of `count` images; `kind`: mixup or cutmix."""
    weight = float(rng.beta(CONCENTRATION[kind], CONCENTRATION[kind]))
    partner = torch.from_numpy(rng.permutation(count))
    if kind == "mixup":
        return Mixing(partner, weight, None)
    side = (1 - weight) ** 0.5
    top, left = ((1 - side) * rng.random(2)).tolist()
    return Mixing(partner, 1 - side**2, (top, top + side, left, left + side))


def student_loss(
    logits: Tensor,
    labels: Tensor,
    teacher: Tensor,
    *,
    distilled: Tensor,
    labelled: Tensor,
    mixing: Mixing | None,
    criterion: Callable[[Tensor, Tensor], Tensor],
    temperature: float,
    alpha: float,
) -> Tensor:
    """alpha T^2 KL(teacher || student) over the `distilled` rows + (1 - alpha) cross-entropy over the `labelled` ones.

    Logits (B, C), labels (B,), the teacher's log-probabilities (B, C), two masks (B,). `criterion` is the base
    pipeline's cross-entropy, whose label smoothing touches the labels' part alone. A part without rows is nothing.
    """
    loss = logits.sum() * 0.0
    if alpha > 0 and bool(distilled.any()):
        loss = loss + alpha * teacher_loss(logits[distilled], teacher[distilled], temperature)
    if alpha < 1 and bool(labelled.any()):
        own = criterion(logits[labelled], labels[labelled])
        if mixing is not None:
            others = criterion(logits[labelled], labels[mixing.partner][labelled])
            own = mixing.weight * own + (1 - mixing.weight) * others
        loss = loss + (1 - alpha) * own
    return loss


class WeightAverage:
    """Exponential moving average of a network's weights; counters and indices are copied.

    It follows `decay`, and while few steps are behind it a shorter memory.
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        self.decay = decay
        self.steps = 0
        self.weights = {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}

    @torch.no_grad()
    def update(self, model: nn.Module) -> None:
        """Take one more step's weights in."""
        self.steps += 1
        weight = 1 - min(self.decay, (1 + self.steps) / (10 + self.steps))
        for name, tensor in model.state_dict().items():
            if tensor.is_floating_point():
                self.weights[name].lerp_(tensor, weight)
            else:
                self.weights[name].copy_(tensor)

    def restore(self, weights: Mapping[str, Tensor], steps: int) -> None:
        """Go on from what was saved."""
        self.steps = steps
        for name, tensor in weights.items():
            self.weights[name].copy_(tensor)
