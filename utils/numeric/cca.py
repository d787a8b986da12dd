"""Generalised canonical correlation analysis: what several views of the same rows have in common, in closed form.

MAXVAR (Kettenring 1971; Carroll 1968): unit variates g of the rows that have the greatest sum, over the views, of the
squared multiple correlations. They are the leading eigenvectors of the sum of the views' projectors. To each view's
covariance a ridge is added: the one by which Ledoit and Wolf (2004) shrink it towards a multiple of the identity, so
that a view with more columns than rows, or with columns that repeat one another, does no harm. Reads no labels.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

SMALLEST_EIGENVALUE = 1e-10  # relative to a view's largest: below it a direction is rounding
SMALLEST_SHARE = 0.01  # of the covariance beside its ridge
DENSE = 800  # up to so many columns in all, or where a quarter of the spectrum is asked for, all of it is cheaper
Floats = NDArray[np.float64]


@dataclass(frozen=True)
class SharedSpace:
    """R variates that M views share, the most shared first; mapped views of a row sum to its variates."""

    centres: tuple[Floats, ...]
    """M means (D_m,)"""
    maps: tuple[Floats, ...]
    """M matrices (D_m, R): the sum of (view - centre) @ map has unit variance on the rows that were fitted on"""
    correlations: Floats
    """(R,): mean correlation of every two mapped views; of two views without a ridge the canonical correlations"""
    shrinkage: Floats
    """(M,): share of the ridge in each view's covariance, from 0 to 1"""


def shared_space(
    views: Sequence[NDArray], rank: int, *, shrinkage: float | None = None, min_shrinkage: float = 0.0
) -> SharedSpace:
    """At most `rank` variates of M views (N, D_m); `shrinkage` takes the place of Ledoit and Wolf's intensity.

    Their intensity is at least `min_shrinkage`. Fewer variates where the views have fewer directions in all; one, which
    is 0 everywhere, where no view varies.
    """
    rows = len(views[0])
    centres, whiteners, whitened, intensities = [], [], [], []
    for view in views:
        centre = view.mean(axis=0, dtype=np.float64)
        values = np.asarray(view, dtype=np.float64) - centre
        intensity = max(min_shrinkage, _ledoit_wolf(values)) if shrinkage is None else shrinkage
        whitener = _whitener(values, intensity)
        centres.append(centre)
        whiteners.append(whitener)
        whitened.append(values @ whitener / np.sqrt(rows))
        intensities.append(intensity)
    stacked = np.concatenate(whitened, axis=1)
    values, vectors = _leading(stacked, rank)
    if not len(values):
        empty = tuple(np.zeros((view.shape[1], 1)) for view in views)
        return SharedSpace(tuple(centres), empty, np.zeros(1), np.array(intensities))
    ends = np.cumsum([part.shape[1] for part in whitened])[:-1]
    blocks = np.split(vectors, ends, axis=0)
    correlations = _mean_correlations([part @ block for part, block in zip(whitened, blocks, strict=True)])
    maps = [whitener @ block / np.sqrt(values) for whitener, block in zip(whiteners, blocks, strict=True)]
    return SharedSpace(tuple(centres), tuple(maps), correlations, np.array(intensities))


def _mean_correlations(scores: Sequence[Floats]) -> Floats:
    """Mean over the pairs of M views of the correlations of their scores (N, R), which are centred; (R,).

    A single view has no pair; it agrees with itself, so that its correlations are 1.
    """
    if len(scores) == 1:
        return np.ones(scores[0].shape[1])
    sizes = [np.sqrt(np.square(own).sum(axis=0)) for own in scores]
    units = np.stack([own / np.where(size > 0, size, 1) for own, size in zip(scores, sizes, strict=True)])
    total = np.square(units.sum(axis=0)).sum(axis=0) - np.square(units).sum(axis=(0, 1))
    found: Floats = total / (len(scores) * (len(scores) - 1))
    return found


def principal_axes(values: NDArray, count: int) -> Floats:
    """The `count` leading principal axes (D, R) of centred values (N, D), signs fixed; R may be less, never 0."""
    rows, width = values.shape
    _, vectors = _leading(np.asarray(values, dtype=np.float64) / np.sqrt(max(1, rows)), min(count, rows))
    return vectors if vectors.shape[1] else np.zeros((width, 1))


def _ledoit_wolf(values: Floats) -> float:
    from sklearn.covariance import ledoit_wolf_shrinkage

    # In units of its own spread: the intensity does not depend on them, and squares of huge numbers do not overflow.
    spread = np.abs(values).max()
    if len(values) < 2 or spread == 0 or values.shape[1] < 2:
        return 0.0
    return float(ledoit_wolf_shrinkage(values / spread, assume_centered=True))


def _whitener(values: Floats, intensity: float) -> Floats:
    """(D, K): columns of values @ whitener are uncorrelated, and of unit variance where there is no ridge."""
    width = values.shape[1]
    covariance = values.T @ values / len(values)
    ridge = intensity / max(1 - intensity, SMALLEST_SHARE) * np.trace(covariance) / width
    covariance[np.diag_indices(width)] += ridge
    found, axes = np.linalg.eigh(covariance)
    kept = found > SMALLEST_EIGENVALUE * max(found[-1], 0)
    return axes[:, kept] / np.sqrt(found[kept])


def _leading(stacked: Floats, rank: int) -> tuple[Floats, Floats]:
    """Leading eigenvalues (R,) and eigenvectors (K, R) of stacked.T @ stacked, through the smaller of the two products.

    Each vector's largest entry is positive. Eigenvalues that are rounding beside the largest are left out.
    """
    rows, columns = stacked.shape
    if 0 in stacked.shape:
        return np.zeros(0), np.zeros((columns, 0))
    wide = columns > rows
    gram = stacked @ stacked.T if wide else stacked.T @ stacked
    values, vectors = _top(gram, min(rank, len(gram)))
    kept = values > SMALLEST_EIGENVALUE * max(values[0], 0)
    values, vectors = values[kept], vectors[:, kept]
    if wide:
        vectors = stacked.T @ vectors / np.sqrt(values)
    places = np.abs(vectors).argmax(axis=0), np.arange(vectors.shape[1])
    return values, vectors * np.where(vectors[places] < 0, -1.0, 1.0)


def _top(gram: Floats, count: int) -> tuple[Floats, Floats]:
    size = len(gram)
    if size <= DENSE or 4 * count >= size:
        from scipy.linalg import eigh

        values, vectors = eigh(gram, subset_by_index=[size - count, size - 1])
    else:
        from scipy.sparse.linalg import eigsh

        start = np.random.default_rng(0).normal(size=size)  # the same Krylov space every time
        values, vectors = eigsh(gram, k=count, which="LA", v0=start)
    order = np.argsort(-values, kind="stable")
    return values[order], vectors[:, order]
