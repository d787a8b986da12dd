"""Knowledge distillation: the student's loss, matching of embeddings, image mixing and the average of its weights."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

SMALLEST_DEVIATION = 1e-6
"""Standard deviation up to which a dimension of an embedding counts as constant."""


def soften(log_probabilities: Tensor, temperature: float) -> Tensor:
    """Return normalised log-probabilities (B, C) at a temperature."""
    return F.log_softmax(log_probabilities / temperature, dim=1)


def teacher_loss(logits: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    """Return T^2 KL(teacher || student), both at temperature T, mean over the rows: a scalar in nats.

    `logits` (B, C) are the student's, `teacher` (B, C) log-probabilities at temperature 1. The factor T^2 keeps the
    scale of the gradient, T (student - teacher) / B, for all T (Hinton, Vinyals and Dean 2015).
    """
    student = F.log_softmax(logits / temperature, dim=1)
    target = soften(teacher, temperature)
    return temperature**2 * F.kl_div(student, target, reduction="batchmean", log_target=True)


@dataclass(frozen=True)
class Mixing:
    """Mixing of each image of a batch with another image of the batch."""

    partner: Tensor
    """int64 (B,), index of the other image in the batch"""
    weight: float
    """Weight of the image; that of its partner is 1 - weight"""
    box: tuple[float, float, float, float] | None
    """Top, bottom, left and right of the box pasted from the partner, relative to the sides; None blends the images"""

    def images(self, images: Tensor) -> Tensor:
        """Return mixed images (B, C, H, W): blended (mixup, Zhang et al. 2018) or pasted (CutMix, Yun et al. 2019)."""
        partners = images[self.partner.to(images.device, non_blocking=True)]
        if self.box is None:
            return self.weight * images + (1 - self.weight) * partners
        top, bottom, left, right = self._pixels(images.shape[2], images.shape[3])
        mixed = images.clone()
        mixed[:, :, top:bottom, left:right] = partners[:, :, top:bottom, left:right]
        return mixed

    def log_probabilities(self, unmixed: Tensor) -> Tensor:
        """Return targets of the mixed images from the log-probabilities (B, C) of the images and their partners.

        Probabilities are mixed with the weights of the images, as labels are.
        """
        parts = [unmixed + math.log(self.weight)] if self.weight > 0 else []
        if self.weight < 1:
            parts.append(unmixed[self.partner] + math.log1p(-self.weight))
        return torch.logsumexp(torch.stack(parts), dim=0)

    def _pixels(self, height: int, width: int) -> tuple[int, int, int, int]:
        assert self.box is not None
        top, bottom, left, right = self.box
        return round(top * height), round(bottom * height), round(left * width), round(right * width)


BETA_CONCENTRATION = {"mixup": 0.2, "cutmix": 1.0}  # of the distribution of weights, as in the two papers


def draw_mixing(kind: str, count: int, rng: np.random.Generator) -> Mixing:
    """Draw a mixing of `count` images; `kind` is mixup, cutmix or both, which draws one of the two."""
    if kind == "both":
        kind = tuple(BETA_CONCENTRATION)[int(rng.integers(2))]
    weight = float(rng.beta(BETA_CONCENTRATION[kind], BETA_CONCENTRATION[kind]))
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
    """Return alpha T^2 KL(teacher || student) + (1 - alpha) cross-entropy, of `distilled` and of `labelled` rows.

    Takes logits (B, C) on any device, and on the CPU labels (B,), the teacher's log-probabilities (B, C) and two masks
    (B,): rows are selected on the CPU, since selection on a GPU would synchronise. `criterion` is the cross-entropy of
    the second term; label smoothing affects only that term. A term without rows is 0.
    """
    device = logits.device
    loss = logits.sum() * 0.0
    if alpha > 0 and bool(distilled.any()):
        targets = teacher[distilled].to(device, non_blocking=True)
        loss = loss + alpha * teacher_loss(_of_rows(logits, distilled), targets, temperature)
    if alpha < 1 and bool(labelled.any()):
        label_logits = _of_rows(logits, labelled)
        label_loss = criterion(label_logits, labels[labelled].to(device, non_blocking=True))
        if mixing is not None:
            partners = labels[mixing.partner][labelled].to(device, non_blocking=True)
            label_loss = mixing.weight * label_loss + (1 - mixing.weight) * criterion(label_logits, partners)
        loss = loss + (1 - alpha) * label_loss
    return loss


def _of_rows(values: Tensor, mask: Tensor) -> Tensor:
    """Return the rows of values (B, ...), on any device, that a mask (B,) on the CPU selects."""
    if bool(mask.all()):
        return values
    return values[mask.nonzero().squeeze(1).to(values.device, non_blocking=True)]


def embedding_loss(projected: Tensor, embeddings: Tensor) -> Tensor:
    """Return the mean squared difference of two arrays (B, D): a scalar.

    `projected` is a linear map of the student's embeddings, `embeddings` the teacher's, standardised: predicting their
    mean gives 1. Matching embeddings by a learned map is the hint of Romero et al. (2015), here of the last layer.
    """
    return F.mse_loss(projected, embeddings)


def standardised(embeddings: np.ndarray) -> np.ndarray:
    """Return embeddings float32 (N, D) with mean 0 and deviation 1 per dimension; constant dimensions are 0."""
    values = embeddings.astype(np.float64)
    deviation = values.std(axis=0)
    centred = values - values.mean(axis=0)
    scaled: np.ndarray = (centred / np.where(deviation > SMALLEST_DEVIATION, deviation, np.inf)).astype(np.float32)
    return scaled


class WeightAverage:
    """Exponential moving average of a network's weights; integer buffers are copied.

    After n steps the decay is at most (1 + n) / (10 + n), so that the average forgets the initial weights. It differs
    from `torch.optim.swa_utils.AveragedModel` in this warm-up and in the average of floating-point buffers.
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        self.decay = decay
        self.steps = 0
        live = model.state_dict()  # tensors that share memory with the network
        self.weights = {name: tensor.detach().clone() for name, tensor in live.items()}
        averaged = [name for name, tensor in live.items() if tensor.is_floating_point()]
        self._averaged = [self.weights[name] for name in averaged], [live[name] for name in averaged]
        self._copied = [(self.weights[name], tensor) for name, tensor in live.items() if name not in averaged]

    @torch.no_grad()
    def update(self) -> None:
        """Update the average with the network's weights after one more step."""
        self.steps += 1
        weight = 1 - min(self.decay, (1 + self.steps) / (10 + self.steps))
        torch._foreach_lerp_(*self._averaged, weight)
        for copied, tensor in self._copied:
            copied.copy_(tensor)

    def restore(self, weights: Mapping[str, Tensor], steps: int) -> None:
        """Set the average to saved weights after a number of steps."""
        self.steps = steps
        for name, tensor in weights.items():
            self.weights[name].copy_(tensor)
