"""Weights that let every class count the same, however many images it has. Reads no settings."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional


def class_weights(labels: Sequence[int] | np.ndarray, num_classes: int) -> np.ndarray:
    """n / (C n_c) of each class c with n_c of the n labels, float64 (C,); 0 for a class without any.

    The mean over the labels is 1 where every class occurs (King and Zeng 2001; scikit-learn's `balanced`).
    """
    counts = np.bincount(np.asarray(labels, dtype=np.int64), minlength=num_classes)
    return np.divide(counts.sum() / num_classes, counts, out=np.zeros(num_classes), where=counts > 0)


def sample_weights(labels: Sequence[int] | np.ndarray, num_classes: int) -> np.ndarray:
    """The weight of each label's class, float64 (N,)."""
    return class_weights(labels, num_classes)[np.asarray(labels, dtype=np.int64)]


class ClassWeightedLoss(nn.Module):
    """Mean over a batch of cross entropy with label smoothing, each row times the weight of its label's class.

    `nn.CrossEntropyLoss(weight=...)` weights the smoothed share of every class instead, which pulls rows of frequent
    classes towards the rare ones, and divides by the weights in the batch, which differ from batch to batch.
    """

    weights: Tensor

    def __init__(self, weights: np.ndarray, label_smoothing: float) -> None:
        super().__init__()
        self.register_buffer("weights", torch.from_numpy(weights).float())
        self.label_smoothing = label_smoothing

    def forward(self, logits: Tensor, labels: Tensor) -> Tensor:
        """A scalar; logits (B, C), labels (B,)."""
        losses = functional.cross_entropy(logits, labels, reduction="none", label_smoothing=self.label_smoothing)
        return (losses * self.weights[labels]).mean()


def balanced_order(labels: Tensor, num_classes: int, generator: torch.Generator) -> Tensor:
    """As many rows as there are labels, int64 (N,), drawn with replacement, every class equally likely."""
    weights = torch.from_numpy(sample_weights(labels.numpy(), num_classes))
    return torch.multinomial(weights, len(labels), replacement=True, generator=generator)
