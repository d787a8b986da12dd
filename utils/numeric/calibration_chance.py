"""The calibration error expected by chance: on a finite number of rows even that of a calibrated model is not 0."""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike, NDArray

from utils.numeric.means import design_effect
from utils.numeric.metrics import BINS, check_probabilities, confidence_bins

REPLICATES = 2000
QUANTILE = 0.95


def chance_ece(probabilities: ArrayLike, labels: ArrayLike, groups: ArrayLike | None = None) -> dict[str, float]:
    """Return `{mean, quantile}` of the expected calibration error of a perfectly calibrated model of these confidences.

    Takes probabilities (N, C) and labels (N,). The number of hits of each bin is drawn from a binomial distribution
    with the bin's mean confidence (Broecker and Smith 2007); `quantile` is the 95% quantile. With groups (N,),
    deviations are widened by their design effect. The draws have a fixed seed.
    """
    scores, truth = check_probabilities(probabilities, labels)
    confidence = scores.max(axis=1)
    bins = confidence_bins(confidence)
    counts = np.bincount(bins, minlength=BINS)
    means = np.bincount(bins, weights=confidence, minlength=BINS) / np.maximum(counts, 1)
    draws = np.random.default_rng(0).binomial(counts, np.clip(means, 0, 1), (REPLICATES, BINS))
    errors: NDArray[np.float64] = np.abs(draws - counts * means).sum(axis=1) / len(truth)
    widened = errors * np.sqrt(design_effect((scores.argmax(axis=1) == truth) - confidence, groups))
    return {"mean": float(widened.mean()), "quantile": float(np.quantile(widened, QUANTILE))}


def calibration_verdict(error: float, chance: dict[str, float]) -> str:
    """Return in words how well calibrated a model with this expected calibration error is, given `chance_ece`.

    It is called miscalibrated only where its error exceeds the 95% quantile of the error by chance, and well calibrated
    only where that quantile is small.
    """
    if error <= chance["quantile"]:
        return "well calibrated" if chance["quantile"] < 0.05 else "compatible with perfect calibration"
    return "slightly miscalibrated" if error - chance["mean"] < 0.02 else "not well calibrated"
