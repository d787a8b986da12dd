"""Inputs of a fusion head: the members' embeddings centred, scaled and reduced in width. No labels are read."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from utils.combiners.stacking_features import standardisation
from utils.numeric import cca

if TYPE_CHECKING:
    from torch import nn

BUDGET = 1024  # largest input width of a head; wider embeddings are reduced by PCA, separately for each member
CCA_BUDGET = 4096  # largest total width before CCA
SHARED = 64  # most shared variates
ROWS_PER_VARIATE = 4
LEAST_RIDGE = 0.1  # on 478 photographs: log-loss 0.344; with Ledoit and Wolf's intensity (0.005) 0.376, with 0.5 0.352


@dataclass(frozen=True)
class EmbeddingMaps:
    """(embedding - centre) / scale, times a matrix where there is one; concatenated over the members, or summed."""

    centres: tuple[np.ndarray, ...]
    """M arrays float32 (D_m,)"""
    scales: tuple[np.ndarray, ...]
    """M arrays float32 (1,)"""
    matrices: tuple[np.ndarray, ...]
    """M arrays float32 (D_m, R_m); (0, 0) where the embedding keeps its width"""
    summed: bool
    """Whether the mapped embeddings are summed instead of concatenated"""
    facts: Mapping[str, Any]
    """Facts for the report."""

    @property
    def widths(self) -> tuple[int, ...]:
        """Widths of a head's input blocks: one per member, or a single one where they are summed."""
        widths = [matrix.shape[1] or len(centre) for matrix, centre in zip(self.matrices, self.centres, strict=True)]
        return (widths[0],) if self.summed else tuple(widths)

    def apply(self, embeddings: Sequence[np.ndarray]) -> tuple[np.ndarray, ...]:
        """Map M embeddings (N, D_m) to blocks float32 (N, R), computed as the exported module does."""
        import torch

        with torch.no_grad():
            blocks = self.module()(
                [torch.from_numpy(np.array(embedding, dtype=np.float32)) for embedding in embeddings]
            )
        return tuple(block.numpy() for block in blocks)

    def module(self) -> nn.Module:
        """Return the maps as a torch module: a list of M tensors (B, D_m) -> a list of blocks (B, R)."""
        from utils.combiners.fusion_heads import MappedEmbeddings

        return MappedEmbeddings(self.centres, self.scales, self.matrices, summed=self.summed)

    def state(self) -> dict[str, np.ndarray]:
        """Return all arrays by name."""
        arrays = {"summed": np.array([self.summed], dtype=np.uint8)}
        for member, parts in enumerate(zip(self.centres, self.scales, self.matrices, strict=True)):
            names = (f"{name}{member:03d}" for name in ("centre", "scale", "matrix"))
            arrays |= {name: part for name, part in zip(names, parts, strict=True) if part.size}
        return arrays

    @classmethod
    def from_state(cls, state: Mapping[str, np.ndarray]) -> EmbeddingMaps:
        """Restore the maps from their `state`."""
        count = sum(name.startswith("centre") for name in state)
        empty = np.zeros((0, 0), dtype=np.float32)
        centres, scales, matrices = (
            tuple(state.get(f"{name}{member:03d}", empty) for member in range(count))
            for name in ("centre", "scale", "matrix")
        )
        return cls(centres, scales, matrices, bool(state["summed"][0]), {})


def concatenated(embeddings: Sequence[np.ndarray], budget: int = BUDGET) -> EmbeddingMaps:
    """Fit maps that concatenate members' embeddings (N, D_m), reduced by PCA where their total width exceeds `budget`.

    There is one scale per member, so that dimensions of low variance stay small. Principal axes are those of these
    rows.
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
    """Fit maps to at most `rank` variates shared by members' embeddings (N, D_m); see `utils.numeric.cca`.

    Each variate is scaled by its mean correlation between members, so that weakly shared variates have less influence
    on a head.
    """
    first = concatenated(embeddings, CCA_BUDGET)
    views = first.apply(embeddings)
    variates = max(1, min(rank, len(views[0]) // ROWS_PER_VARIATE))
    space = cca.shared_space(views, variates, min_shrinkage=LEAST_RIDGE)
    spread = np.maximum(space.correlations, 0)
    matrices = [  # the embeddings are already centred, so that the centres of the views are not needed
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
    """Return the reduced widths, at least 1 each: as equal as possible within the budget, narrow members unreduced."""
    reduced = dict.fromkeys(range(len(widths)), 0)
    remaining, order = max(budget, len(widths)), sorted(range(len(widths)), key=lambda member: (widths[member], member))
    for done, member in enumerate(order):
        reduced[member] = min(widths[member], remaining // (len(order) - done))
        remaining -= reduced[member]
    return [reduced[member] for member in range(len(widths))]
