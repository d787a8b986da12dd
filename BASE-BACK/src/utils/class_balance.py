"""Weights that balance classes of different sizes. Reads no settings."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional


def class_weights(labels: Sequence[int] | np.ndarray, num_classes: int) -> np.ndarray:
    """Weight n / (C n_c) of each class c with n_c of the n labels, float64 (C,); 0 for a class without labels.

    The mean over the labels is 1 if every class occurs (King and Zeng 2001; scikit-learn's `balanced`).
    """
    counts = np.bincount(np.asarray(labels, dtype=np.int64), minlength=num_classes)
    return np.divide(counts.sum() / num_classes, counts, out=np.zeros(num_classes), where=counts > 0)


def sample_weights(labels: Sequence[int] | np.ndarray, num_classes: int) -> np.ndarray:
    """The class weight of each label, float64 (N,)."""
    return class_weights(labels, num_classes)[np.asarray(labels, dtype=np.int64)]


class ClassWeightedLoss(nn.Module):
    """Batch mean of cross entropy with label smoothing, each row multiplied by the weight of its label's class.

    `nn.CrossEntropyLoss(weight=...)` instead weights the smoothed target of every class, which biases predictions of
    frequent classes towards rare ones, and divides by the sum of the weights in the batch, which varies.
    """

    weights: Tensor

    def __init__(self, weights: np.ndarray, label_smoothing: float) -> None:
        super().__init__()
        self.register_buffer("weights", torch.from_numpy(weights).float())
        self.label_smoothing = label_smoothing

    def forward(self, logits: Tensor, labels: Tensor) -> Tensor:
        """Loss (scalar) of logits (B, C) and labels (B,)."""
        losses = functional.cross_entropy(logits, labels, reduction="none", label_smoothing=self.label_smoothing)
        return (losses * self.weights[labels]).mean()


def balanced_order(labels: Tensor, num_classes: int, generator: torch.Generator) -> Tensor:
    """N row indices, int64 (N,), drawn with replacement so that every class in `labels` (N,) is equally likely."""
    weights = torch.from_numpy(sample_weights(labels.numpy(), num_classes))
    return torch.multinomial(weights, len(labels), replacement=True, generator=generator)
