"""Weights of a pool, with the kind of pool, the penalty strength and added members selected on held-out folds.

Scores are log-probabilities (M, N, C) of M members, clipped from below at `LOWEST_SCORE` of
`utils.combiners.pooled_members`; labels and folds are (N,).
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from utils.combiners.pooled_members import Floats, Pool
from utils.combiners.shared_fits import SharedFits
from utils.numeric import candidate_losses, pools, temperature, weight_search
from utils.numeric.metrics import METRICS, log_softmax

STRENGTHS = (np.inf, 10.0, 3.0, 1.0, 0.3, 0.1, 0.01, 0.001, 0.0)
"""Candidate strengths of the penalty towards equal weights, the strongest first: it wins a tie."""
TUNING_TOLERANCE = 1e-6  # of weights that only select a strength
PIECEWISE_CONSTANT = ("accuracy", "f1_macro")
"""Metrics for which the weights minimise the log-loss as a surrogate and members are added; higher is better."""
MAX_TUNING_ROWS = 10_000
"""Most rows of the selection of a strength, and of a bootstrap sample; with more rows they are sampled, so that only
fits with the selected strength scale with the number of rows."""
MAX_TUNING_SCORES = 20_000_000
"""Most scores (members x rows x classes) of the selection of a strength, as far as `MIN_TUNING_ROWS` are left."""
MIN_TUNING_ROWS = 500
BAGS = 5  # bootstrap samples
VOTES = 20  # weight of the pool, to which members are added with weight 1
ADDITIONS = 10  # most members that are added


@dataclass(frozen=True)
class Weighting:
    """Weights of a pool and the cross-fitted predictions."""

    pool: Pool
    weights: Floats
    """(M,), fitted on all rows"""
    temperature: float = 1.0
    """Divisor of the pooled log-probabilities."""
    crossfit: Floats | None = None
    """Cross-fitted log-probabilities (N, C); None where there is one fold."""
    fold_weights: tuple[Floats, ...] = ()
    """Weights (M,) fitted without each fold, in the order of the folds."""
    strength: float | None = None
    """Strength of the penalty; None where weights were not fitted."""
    gap: float | None = None
    """Duality gap, an upper bound of the loss minus the least loss."""
    added: bool = False
    """Whether members were added for a piecewise constant metric."""


def fixed_weights(
    pool: Pool, scores: Floats, labels: NDArray[Any], folds: NDArray[Any], weights: Floats, *, calibrate: bool
) -> Weighting:
    """Return a weighting by given weights (M,); `calibrate` fits a temperature."""
    crossfit = pool.pooled(np.tensordot(weights, pool.parts(scores), axes=1))
    [(divisor, crossfit)] = calibrated(crossfit[None], labels, folds, calibrate=calibrate)
    return Weighting(pool, weights, divisor, crossfit)


def fitted_weights(pool: Pool, scores: Floats, labels: NDArray[Any], metric: str, *, strength: float) -> Weighting:
    """Return the weighting of least loss plus penalty, without cross-fitting."""
    solution = weight_search.minimise(
        pool.loss(pool.parts(scores), labels, metric), strength=strength, sum_bounds=pool.sums
    )
    return Weighting(pool, solution.weights, strength=strength, gap=solution.gap)


def tuned_weights(
    pool: Pool,
    scores: Floats,
    labels: NDArray[Any],
    folds: NDArray[Any],
    metric: str,
    *,
    calibrate: bool,
    shared: SharedFits | None = None,
) -> Weighting:
    """Return the weighting under the penalty with the least loss on held-out folds.

    The loss is the Brier score for `brier`, else the log-loss. With `calibrate`, it is computed after a temperature if
    the sum of the pool's weights is fixed. For accuracy and macro F1, equal weights (the infinite penalty) win if their
    score is higher and they classify more held-out rows correctly, by more than one standard error. Copies of a
    cross-fitting share fits on equal rows by `shared`.
    """
    calibrate = calibrate and not pool.scales
    parts = pool.parts(scores)
    sample = tuning_rows(labels, folds, scores.shape[0] * scores.shape[2])
    rows = parts[:, sample], labels[sample], folds[sample]
    paths, candidates, best = _tried(pool, *rows, metric, calibrate=calibrate, shared=shared or SharedFits())
    strength, fold_weights, held_out = STRENGTHS[best], tuple(path[best] for path in paths), candidates[best]
    mean_weights = np.mean(fold_weights, axis=0)
    options: dict[str, Any] = {"strength": strength, "sum_bounds": pool.sums, "start": mean_weights}
    if len(held_out[1]) < len(labels):
        fold_weights = tuple(
            weight_search.minimise(
                pool.loss(parts[:, folds != number], labels[folds != number], metric),
                tolerance=TUNING_TOLERANCE,
                **options,
            ).weights
            for number in np.unique(folds)
        )
        unseen = _unseen(pool, parts, folds, fold_weights)
        [held_out] = calibrated(unseen[None], labels, folds, calibrate=calibrate)
    solution = weight_search.minimise(pool.loss(parts, labels, metric), **options)
    return Weighting(pool, solution.weights, *held_out, fold_weights, strength, solution.gap)


def preferred_pool(linear: Weighting, other: Weighting, labels: NDArray[Any], metric: str) -> Weighting:
    """Return `linear`, unless the held-out loss of `other` is lower by more than one standard error of the gain."""
    assert linear.crossfit is not None, "fitted without folds"
    assert other.crossfit is not None, "fitted without folds"
    gains = pooled_losses(linear.crossfit, labels, metric) - pooled_losses(other.crossfit, labels, metric)
    return other if _is_clear(gains) else linear


def with_members_added(
    weighting: Weighting,
    scores: Floats,
    labels: NDArray[Any],
    folds: NDArray[Any],
    metric: str,
    *,
    seed: int,
    calibrate: bool,
    shared: SharedFits | None = None,
) -> Weighting:
    """Return the weighting with added members that raise accuracy or macro F1, if they do so on held-out folds.

    Copies of a cross-fitting share additions on equal rows by `shared`.
    """
    assert weighting.crossfit is not None, "fitted without folds"
    parts, shared = weighting.pool.parts(scores), shared or SharedFits()
    moved = []
    for number, weights in zip(np.unique(folds), weighting.fold_weights, strict=True):
        given = parts[:, folds != number], labels[folds != number], weights
        settings = ("members added", weighting.pool.name, metric, seed)
        moved.append(shared.result(settings, given, partial(_moved, weighting.pool, *given, metric, seed)))
    fold_weights = tuple(moved)
    crossfit = _unseen(weighting.pool, parts, folds, fold_weights)
    if _score(crossfit, labels, metric) <= _score(weighting.crossfit, labels, metric):
        return weighting
    [(divisor, crossfit)] = calibrated(crossfit[None], labels, folds, calibrate=calibrate)
    weights = _moved(weighting.pool, parts, labels, weighting.weights, metric, seed)
    return replace(
        weighting, weights=weights, temperature=divisor, crossfit=crossfit, fold_weights=fold_weights, added=True
    )


def pooled_losses(log_probabilities: Floats, labels: NDArray[Any], metric: str) -> Floats:
    """Return the loss of each row (..., N) of log-probabilities (..., N, C): Brier score for `brier`, else log-loss."""
    log_p_true = log_probabilities[..., np.arange(len(labels)), labels]
    if metric != "brier":
        return -log_p_true
    brier: Floats = (np.exp(log_probabilities) ** 2).sum(axis=-1) - 2 * np.exp(log_p_true) + 1
    return brier


def tuning_rows(labels: NDArray[Any], folds: NDArray[Any], scores_per_row: int) -> Any:
    """Return a slice of all rows, or indices of the rows that select a setting, evenly spaced in folds and classes.

    They are at most as many as the limits say, and one more for each fold.
    """
    most = min(MAX_TUNING_ROWS, max(MIN_TUNING_ROWS, MAX_TUNING_SCORES // scores_per_row))
    if len(labels) <= most:
        return slice(None)
    step, order = -(-len(labels) // most), np.lexsort((labels, folds))
    # Anew in each fold, so that the copies of a cross-fitting take the same rows of it.
    by_fold = np.split(order, np.flatnonzero(np.diff(folds[order])) + 1)
    return np.sort(np.concatenate([rows[::step] for rows in by_fold]))


def calibrated(
    log_probabilities: Floats, labels: NDArray[Any], folds: NDArray[Any], *, calibrate: bool
) -> list[tuple[float, Floats]]:
    """Return, for each of B log-probabilities (B, N, C), a temperature and the rows at those of the other folds.

    The temperature is 1 without `calibrate`; with it, a row's log-probabilities (C,) are divided by the temperature
    that was fitted on the other folds.
    """
    if not calibrate:
        return [(1.0, each) for each in log_probabilities]
    choices = temperature.select_temperatures(log_probabilities, labels, folds)
    return [
        (choice.temperature, log_softmax(each / choice.row_temperatures[:, None]))
        for choice, each in zip(choices, log_probabilities, strict=True)
    ]


def _score(log_probabilities: Floats, labels: NDArray[Any], metric: str) -> float:
    return METRICS[metric].function(np.exp(log_probabilities), labels)


def _hits_more(first: Floats, second: Floats, labels: NDArray[Any], metric: str) -> bool:
    """Return whether the first log-probabilities (N, C) have the higher score and clearly more correct rows."""
    gains = (first.argmax(axis=1) == labels).astype(float) - (second.argmax(axis=1) == labels)
    return _is_clear(gains) and _score(first, labels, metric) > _score(second, labels, metric)


def _is_clear(gains: Floats) -> bool:
    """Return whether the mean of paired gains (N,) is above its standard error."""
    return bool(gains.mean() > gains.std(ddof=1) / np.sqrt(len(gains)))


def _tried(
    pool: Pool,
    parts: Floats,
    labels: NDArray[Any],
    folds: NDArray[Any],
    metric: str,
    *,
    calibrate: bool,
    shared: SharedFits,
) -> tuple[list[Floats], list[tuple[float, Floats]], int]:
    """Return the weights (S, M) of all strengths without each fold, the held-out results and the index of the best.

    There is one result per strength: temperature and held-out log-probabilities (N, C).
    """
    paths = []
    for number in np.unique(folds):
        rows = parts[:, folds != number], labels[folds != number]
        paths.append(shared.result((pool.name, metric), rows, partial(_path, pool, *rows, metric)))
    unseen = np.stack([_unseen(pool, parts, folds, fold_weights) for fold_weights in zip(*paths, strict=True)])
    candidates = calibrated(unseen, labels, folds, calibrate=calibrate)
    means = np.array([pooled_losses(crossfit, labels, metric).mean() for _, crossfit in candidates])
    best = int(np.flatnonzero(means <= means.min() + 1e-9 * abs(means.min()))[0])
    if metric in PIECEWISE_CONSTANT and _hits_more(candidates[0][1], candidates[best][1], labels, metric):
        best = 0
    return paths, candidates, best


def _path(pool: Pool, parts: Floats, labels: NDArray[Any], metric: str) -> Floats:
    """Return the weights (S, M) of all strengths; each search starts from the solution of the next stronger one."""
    loss = pool.loss(parts, labels, metric)
    path: list[Floats] = []
    for strength in STRENGTHS:
        start = path[-1] if path else None
        solution = weight_search.minimise(
            loss, strength=strength, sum_bounds=pool.sums, start=start, tolerance=TUNING_TOLERANCE
        )
        path.append(solution.weights)
    return np.stack(path)


def _unseen(pool: Pool, parts: Floats, folds: NDArray[Any], fold_weights: tuple[Floats, ...]) -> Floats:
    crossfit = np.empty(parts.shape[1:])
    for number, weights in zip(np.unique(folds), fold_weights, strict=True):
        inside = folds == number
        crossfit[inside] = pool.pooled(np.tensordot(weights, parts[:, inside], axes=1))
    return crossfit


def _moved(pool: Pool, parts: Floats, labels: NDArray[Any], weights: Floats, metric: str, seed: int) -> Floats:
    """Return weights (M,) of unchanged sum after greedy additions of members, averaged over bootstrap samples."""
    random, votes = np.random.default_rng(seed), pool.votes(parts)
    counts = np.zeros(len(weights))
    for _ in range(BAGS):
        rows = np.sort(random.integers(len(labels), size=min(len(labels), MAX_TUNING_ROWS)))
        counts += _additions(pool, parts, votes[:, rows], labels[rows], rows, weights, metric)
    return weight_search.average_duplicates(counts, pools.first_duplicates([parts])) * (weights.sum() / counts.sum())


def _additions(
    pool: Pool,
    parts: Floats,
    votes: NDArray[np.float32],
    labels: NDArray[Any],
    rows: NDArray[Any],
    weights: Floats,
    metric: str,
) -> Floats:
    """Return shares (M,) of votes after adding members, one at a time, while the metric on the sampled rows rises.

    Of members that raise it equally, the one of least log-loss is added, then the first.
    """
    total = weights.sum()
    counts = VOTES * weights / total
    scorer = candidate_losses.make_scorer(votes, labels, metric)
    scorer.reset(np.tensordot(counts.astype(np.float32), votes, axes=1), VOTES)
    sums = np.tensordot(counts, parts, axes=1)[rows]
    lowest = scorer.loss()
    for size in range(VOTES + 1, VOTES + ADDITIONS + 1):
        member_losses = scorer.losses()
        if member_losses.min() >= lowest - candidate_losses.TIE_TOLERANCE:
            break
        lowest = member_losses.min()
        tied = np.flatnonzero(member_losses <= lowest + candidate_losses.TIE_TOLERANCE)
        smooth = [
            pooled_losses(pool.pooled((sums + parts[member, rows]) * (total / size)), labels, "log_loss").mean()
            for member in tied
        ]
        added = int(tied[np.argmin(smooth)])
        scorer.add(added)
        sums += parts[added, rows]
        counts[added] += 1
    return counts / counts.sum()
