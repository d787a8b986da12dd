"""Fusion heads as they are kept: a shape and named weights of each seed's head."""

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
    """What a head is built from."""

    method: str
    """A name of `fusion_heads.HEADS`"""
    widths: tuple[int, ...]
    """Of the blocks"""
    hidden: tuple[int, ...]
    classes: int
    rank: int
    """Of bilinear products; 0 where there are none"""

    def head(self, dropout: float = 0.0) -> nn.Module:
        """A head with random weights."""
        from utils.combiners.fusion_heads import HEADS

        return HEADS[self.method](self.widths, self.hidden, self.classes, dropout, self.rank)

    def cost(self) -> dict[str, int]:
        """Numbers that are learned, which is about how many multiplications an image takes."""
        from math import comb

        record = {"parameters": sum(values.numel() for values in self.head().parameters())}
        if self.rank:
            pairs = comb(len(self.widths), 2)
            full = sum(self.widths) ** 2 - sum(width**2 for width in self.widths)
            record |= {"pairs": pairs, "parameters_of_full_products": self.classes * full // 2}
        return record


@dataclass(frozen=True)
class TrainedHeads:
    """Trained heads of one shape, which differ by their seed; their mean probability is the answer."""

    shape: HeadShape
    weights: tuple[dict[str, np.ndarray], ...]
    """One set of named float32 arrays per seed."""

    def modules(self, dropout: float = 0.0) -> list[nn.Module]:
        """The heads as torch modules in evaluation mode; `dropout` for those that are trained further."""
        import torch

        heads = []
        for weights in self.weights:
            head = self.shape.head(dropout).eval().requires_grad_(False)
            head.load_state_dict({name: torch.from_numpy(np.array(values)) for name, values in weights.items()})
            heads.append(head)
        return heads

    def predict_proba(self, outputs: MemberOutputs, present: np.ndarray | None = None) -> np.ndarray:
        """Outputs whose embeddings are blocks (N, R) -> probabilities float64 (N, C).

        `present` (N, M), for attention alone: which members there are.
        """
        return np.mean(
            [softmax(scores) for scores in self._each(outputs, lambda head, *arguments: head(*arguments), present)],
            axis=0,
        )

    def attention(self, outputs: MemberOutputs, present: np.ndarray | None = None) -> np.ndarray:
        """Attention's weights of the members, float64 (N, M)."""
        return np.mean(self._each(outputs, lambda head, *arguments: head.weights(*arguments), present), axis=0)

    def _each(self, outputs: MemberOutputs, call: Any, present: np.ndarray | None) -> list[np.ndarray]:
        import torch

        values = torch.from_numpy(np.concatenate(outputs.embeddings, axis=1).astype(np.float64))
        arguments = (values,) if present is None else (values, torch.from_numpy(present))
        # In double precision a row's answer does not depend on the other rows.
        with torch.no_grad():
            return [call(head.double(), *arguments).numpy() for head in self.modules()]
