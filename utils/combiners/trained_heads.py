"""Trained fusion heads: a shape, and named weights for the head of each seed."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from utils.numeric.metrics import softmax
from utils.predictions.rows import MemberOutputs

if TYPE_CHECKING:
    from torch import nn


@dataclass(frozen=True)
class HeadShape:
    """Architecture of a head."""

    method: str
    """A name of `fusion_heads.HEADS`"""
    widths: tuple[int, ...]
    """Widths of the blocks"""
    hidden: tuple[int, ...]
    """Hidden widths"""
    classes: int
    rank: int
    """Rank of bilinear products; 0 for other heads"""

    def head(self, dropout: float = 0.0) -> nn.Module:
        """Return a head with random weights."""
        from utils.combiners.fusion_heads import HEADS

        return HEADS[self.method](self.widths, self.hidden, self.classes, dropout, self.rank)

    def cost(self) -> dict[str, int]:
        """Return the number of parameters, about that of multiplications per image; with a rank also that of pairs."""
        from math import comb

        record = {"parameters": sum(values.numel() for values in self.head().parameters())}
        if self.rank:
            pairs = comb(len(self.widths), 2)
            full = sum(self.widths) ** 2 - sum(width**2 for width in self.widths)
            record |= {"pairs": pairs, "parameters_of_full_products": self.classes * full // 2}
        return record


@dataclass(frozen=True)
class TrainedHeads:
    """Trained heads of one shape that differ by their seed; their probabilities are averaged."""

    shape: HeadShape
    weights: tuple[dict[str, np.ndarray], ...]
    """Named float32 arrays of each seed."""

    def modules(self, dropout: float = 0.0) -> list[nn.Module]:
        """Return the heads as torch modules in evaluation mode; `dropout` is used if they are trained further."""
        import torch

        heads = []
        for weights in self.weights:
            head = self.shape.head(dropout).eval().requires_grad_(False)
            head.load_state_dict({name: torch.from_numpy(np.array(values)) for name, values in weights.items()})
            heads.append(head)
        return heads

    def predict_proba(self, outputs: MemberOutputs, present: np.ndarray | None = None) -> np.ndarray:
        """Outputs whose embeddings are blocks (N, R) -> probabilities float64 (N, C).

        `present`, bool (N, M), is only for attention: which members are present for each row.
        """
        return np.mean(
            [softmax(scores) for scores in self._each(outputs, lambda head, *arguments: head(*arguments), present)],
            axis=0,
        )

    def attention(self, outputs: MemberOutputs, present: np.ndarray | None = None) -> np.ndarray:
        """Return the attention weights of the members, float64 (N, M)."""
        return np.mean(self._each(outputs, lambda head, *arguments: head.weights(*arguments), present), axis=0)

    def _each(self, outputs: MemberOutputs, call: Any, present: np.ndarray | None) -> list[np.ndarray]:
        import torch

        values = torch.from_numpy(np.concatenate(outputs.embeddings, axis=1).astype(np.float64))
        arguments = (values,) if present is None else (values, torch.from_numpy(present))
        # In double precision the probabilities of a row do not depend on the other rows.
        with torch.no_grad():
            return [call(head.double(), *arguments).numpy() for head in self.modules()]
