"""Inputs of a fusion head: the members' embeddings centred, scaled and reduced to a width. No labels are read."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from utils.combiners.stacking_features import standardisation
from utils.numeric import cca

if TYPE_CHECKING:
    from torch import nn

BUDGET = 1024  # numbers that a head reads at most; wider embeddings are reduced by PCA, each member's by itself
CCA_BUDGET = 4096
SHARED = 64  # variates that the members share at most
ROWS_PER_VARIATE = 4
LEAST_RIDGE = 0.1  # on 478 photographs: log-loss 0.344, with Ledoit and Wolf's own (0.005) 0.376, with 0.5 0.352


@dataclass(frozen=True)
class EmbeddingMaps:
    """(embedding - centre) / scale, then a matrix where there is one; concatenated over the members, or summed."""

    centres: tuple[np.ndarray, ...]
    """M arrays float32 (D_m,)"""
    scales: tuple[np.ndarray, ...]
    """M arrays float32 (1,)"""
    matrices: tuple[np.ndarray, ...]
    """M arrays float32 (D_m, R_m); (0, 0) where the embedding stays as wide as it is"""
    summed: bool
    facts: Mapping[str, Any]
    """Facts for the report."""

    @property
    def widths(self) -> tuple[int, ...]:
        """Of the blocks that a head reads: one per member, or a single one where they are summed."""
        widths = [matrix.shape[1] or len(centre) for matrix, centre in zip(self.matrices, self.centres, strict=True)]
        return (widths[0],) if self.summed else tuple(widths)

    def apply(self, embeddings: Sequence[np.ndarray]) -> tuple[np.ndarray, ...]:
        """M embeddings (N, D_m) -> blocks float32 (N, R), computed as the exported module does."""
        import torch

        with torch.no_grad():
            blocks = self.module()(
                [torch.from_numpy(np.array(embedding, dtype=np.float32)) for embedding in embeddings]
            )
        return tuple(block.numpy() for block in blocks)

    def module(self) -> nn.Module:
        """The same as a torch module: a list of M tensors (B, D_m) -> a list of blocks (B, R)."""
        from utils.combiners.fusion_heads import MappedEmbeddings

        return MappedEmbeddings(self.centres, self.scales, self.matrices, summed=self.summed)

    def state(self) -> dict[str, np.ndarray]:
        """All arrays by name."""
        arrays = {"summed": np.array([self.summed], dtype=np.uint8)}
        for member, parts in enumerate(zip(self.centres, self.scales, self.matrices, strict=True)):
            names = (f"{name}{member:03d}" for name in ("centre", "scale", "matrix"))
            arrays |= {name: part for name, part in zip(names, parts, strict=True) if part.size}
        return arrays

    @classmethod
    def from_state(cls, state: Mapping[str, np.ndarray]) -> EmbeddingMaps:
        """The maps whose `state` this is."""
        count = sum(name.startswith("centre") for name in state)
        none = np.zeros((0, 0), dtype=np.float32)
        centres, scales, matrices = (
            tuple(state.get(f"{name}{member:03d}", none) for member in range(count))
            for name in ("centre", "scale", "matrix")
        )
        return cls(centres, scales, matrices, bool(state["summed"][0]), {})


def concatenated(embeddings: Sequence[np.ndarray], budget: int = BUDGET) -> EmbeddingMaps:
    """Members' embeddings (N, D_m) concatenated, reduced where they are wider than `budget` together.

    One scale per member, so that a number that hardly varies stays small. Principal axes are those of these rows.
    """
    centres, scales = _standardised(embeddings)
    widths = [embedding.shape[1] for embedding in embeddings]
    read_widths = _shares(widths, budget)
    matrices = []
    variance_kept = []
    for embedding, centre, scale, width in zip(embeddings, centres, scales, read_widths, strict=True):
        if width == embedding.shape[1]:
            matrices.append(np.zeros((0, 0), dtype=np.float32))
            variance_kept.append(1.0)
            continue
        values = (embedding - centre) / scale
        axes = cca.principal_axes(values, width)
        matrices.append(axes.astype(np.float32))
        variance_kept.append(float(np.square(values @ axes).sum() / max(np.square(values).sum(), 1e-300)))
    facts = {"widths": widths, "read_widths": [int(width) for width in read_widths], "variance_kept": variance_kept}
    return EmbeddingMaps(centres, scales, tuple(matrices), False, facts)


def shared_variates(embeddings: Sequence[np.ndarray], rank: int = SHARED) -> EmbeddingMaps:
    """The variates that members' embeddings (N, D_m) have in common, at most `rank`; see `utils.numeric.cca`.

    Each is as wide as the members agree on it, so that a head sees less of what is hardly shared.
    """
    first = concatenated(embeddings, CCA_BUDGET)
    views = first.apply(embeddings)
    variates = max(1, min(rank, len(views[0]) // ROWS_PER_VARIATE))
    space = cca.shared_space(views, variates, min_shrinkage=LEAST_RIDGE)
    spread = np.maximum(space.correlations, 0)
    matrices = [  # the embeddings are centred already, and need no centres of the views
        ((matrix.astype(np.float64) @ view_map if matrix.size else view_map) * spread).astype(np.float32)
        for matrix, view_map in zip(first.matrices, space.maps, strict=True)
    ]
    facts = {
        **{name: first.facts[name] for name in ("widths", "variance_kept")},
        "canonical_correlations": space.correlations.tolist(),
        "rank": len(space.correlations),
        "shrinkage": space.shrinkage.tolist(),
    }
    return EmbeddingMaps(first.centres, first.scales, tuple(matrices), True, facts)


def _standardised(embeddings: Sequence[np.ndarray]) -> tuple[tuple[np.ndarray, ...], tuple[np.ndarray, ...]]:
    moments = [
        standardisation(np.asarray(embedding, dtype=np.float64), [embedding.shape[1]]) for embedding in embeddings
    ]
    centres = tuple(centre.astype(np.float32) for centre, _ in moments)
    return centres, tuple(scale[:1].astype(np.float32) for _, scale in moments)


def _shares(widths: Sequence[int], budget: int) -> list[int]:
    """Widths after reduction: as equal as the members allow, the narrow ones whole; at least 1 each."""
    reduced = dict.fromkeys(range(len(widths)), 0)
    remaining, order = max(budget, len(widths)), sorted(range(len(widths)), key=lambda member: (widths[member], member))
    for done, member in enumerate(order):
        reduced[member] = min(widths[member], remaining // (len(order) - done))
        remaining -= reduced[member]
    return [reduced[member] for member in range(len(widths))]
