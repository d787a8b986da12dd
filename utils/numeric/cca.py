"""Generalised canonical correlation analysis (GCCA) of several views of the same rows, in closed form, without labels.

MAXVAR (Kettenring 1971; Carroll 1968) finds unit variates of the rows with the greatest sum, over the views, of squared
multiple correlations: the leading eigenvectors of the sum of the views' projectors. The covariance of each view is
regularised by the shrinkage of Ledoit and Wolf (2004) towards a multiple of the identity, so that a view may have more
columns than rows or collinear columns.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

SMALLEST_EIGENVALUE = 1e-10  # relative to a view's largest: smaller ones are rounding errors
MIN_COVARIANCE_WEIGHT = 0.01  # of the covariance relative to its ridge
MAX_DENSE_SIZE = 800  # a dense solver is faster up to this size, or for at least a quarter of the spectrum
Floats = NDArray[np.float64]


@dataclass(frozen=True)
class SharedSpace:
    """R variates that M views share, the most correlated first; the mapped views of a row sum to its variates."""

    centres: tuple[Floats, ...]
    """Means of the M views, (D_m,) each"""
    maps: tuple[Floats, ...]
    """M matrices (D_m, R): the sum of (view - centre) @ map has unit variance on the rows of the fit"""
    correlations: Floats
    """(R,): mean correlation of the pairs of mapped views; the canonical correlations of two views without a ridge"""
    shrinkage: Floats
    """(M,): weight of the ridge in each view's covariance, from 0 to 1"""


def shared_space(
    views: Sequence[NDArray], rank: int, *, shrinkage: float | None = None, min_shrinkage: float = 0.0
) -> SharedSpace:
    """Fit at most `rank` variates of M views (N, D_m).

    `shrinkage` replaces Ledoit and Wolf's intensity, which is otherwise at least `min_shrinkage`. There are fewer
    variates if the views have fewer directions in total, and a single zero variate if all views are constant.
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
    """Return the mean correlations (R,) over the pairs of M views, from their centred scores (N, R).

    They are 1 for a single view, which has no pair.
    """
    if len(scores) == 1:
        return np.ones(scores[0].shape[1])
    norms = [np.sqrt(np.square(view).sum(axis=0)) for view in scores]
    units = np.stack([view / np.where(norm > 0, norm, 1) for view, norm in zip(scores, norms, strict=True)])
    total = np.square(units.sum(axis=0)).sum(axis=0) - np.square(units).sum(axis=(0, 1))
    correlations: Floats = total / (len(scores) * (len(scores) - 1))
    return correlations


def principal_axes(values: NDArray, count: int) -> Floats:
    """Return at most `count` leading principal axes (D, R) of centred values (N, D); R is at least 1.

    The largest entry of each axis is positive.
    """
    rows, width = values.shape
    _, vectors = _leading(np.asarray(values, dtype=np.float64) / np.sqrt(max(1, rows)), min(count, rows))
    return vectors if vectors.shape[1] else np.zeros((width, 1))


def _ledoit_wolf(values: Floats) -> float:
    from sklearn.covariance import ledoit_wolf_shrinkage

    # The intensity does not depend on the scale; dividing by the spread keeps squares of huge values from overflowing.
    spread = np.abs(values).max()
    if len(values) < 2 or spread == 0 or values.shape[1] < 2:
        return 0.0
    return float(ledoit_wolf_shrinkage(values / spread, assume_centered=True))


def _whitener(values: Floats, intensity: float) -> Floats:
    """Return (D, K): the columns of values @ whitener are uncorrelated, with unit variance without a ridge."""
    width = values.shape[1]
    covariance = values.T @ values / len(values)
    ridge = intensity / max(1 - intensity, MIN_COVARIANCE_WEIGHT) * np.trace(covariance) / width
    covariance[np.diag_indices(width)] += ridge
    eigenvalues, axes = np.linalg.eigh(covariance)
    is_kept = eigenvalues > SMALLEST_EIGENVALUE * max(eigenvalues[-1], 0)
    return axes[:, is_kept] / np.sqrt(eigenvalues[is_kept])


def _leading(stacked: Floats, rank: int) -> tuple[Floats, Floats]:
    """Return leading eigenvalues (R,) and eigenvectors (K, R) of stacked.T @ stacked, from the smaller Gram matrix.

    Each vector's largest entry is positive. Eigenvalues within rounding of 0 are left out.
    """
    rows, columns = stacked.shape
    if 0 in stacked.shape:
        return np.zeros(0), np.zeros((columns, 0))
    is_wide = columns > rows
    gram = stacked @ stacked.T if is_wide else stacked.T @ stacked
    values, vectors = _leading_eigenpairs(gram, min(rank, len(gram)))
    is_kept = values > SMALLEST_EIGENVALUE * max(values[0], 0)
    values, vectors = values[is_kept], vectors[:, is_kept]
    if is_wide:
        vectors = stacked.T @ vectors / np.sqrt(values)
    largest = np.abs(vectors).argmax(axis=0), np.arange(vectors.shape[1])
    return values, vectors * np.where(vectors[largest] < 0, -1.0, 1.0)


def _leading_eigenpairs(gram: Floats, count: int) -> tuple[Floats, Floats]:
    size = len(gram)
    if size <= MAX_DENSE_SIZE or 4 * count >= size:
        from scipy.linalg import eigh

        values, vectors = eigh(gram, subset_by_index=[size - count, size - 1])
    else:
        from scipy.sparse.linalg import eigsh

        start = np.random.default_rng(0).normal(size=size)  # a fixed starting vector makes the result reproducible
        values, vectors = eigsh(gram, k=count, which="LA", v0=start)
    order = np.argsort(-values, kind="stable")
    return values[order], vectors[:, order]
