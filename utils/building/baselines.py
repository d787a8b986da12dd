"""Baselines of a learned combiner on the same rows: its gain over each simple combination, with an interval."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from utils.combiners.protocol import Combiner, MemberFacts, fit_crossfitted
from utils.combiners.weighting import WeightedPool
from utils.core.config import Config
from utils.ensemble_methods import COMBINERS
from utils.numeric.metrics import log_loss_per_row, softmax

REPLICATES = 2000
BLOCK = 100  # replicates drawn at a time: bounds the memory


@dataclass(frozen=True)
class Baselines:
    """Cross-fitted losses of the simple combinations on N out-of-sample rows."""

    losses: Mapping[str, np.ndarray]
    """{name: log-loss (N,) in nats}"""
    best_single: str
    """The member of lowest log-loss."""
    seed: int


def measure(
    config: Config, members: MemberFacts, logits: np.ndarray, labels: np.ndarray, folds: np.ndarray
) -> Baselines:
    """Best single, plain mean, greedy selection, convex weights and log-linear pool on logits (M, N, C)."""
    singles = np.array([log_loss_per_row(softmax(member_logits), labels) for member_logits in logits])
    best = int(singles.mean(axis=1).argmin())
    losses = {"best_single": singles[best]}
    weighted = WeightedPool.configured(config, members)
    recipes: dict[str, Combiner] = {
        "soft_voting": COMBINERS["soft_voting"].configured(config, members),
        "greedy_selection": COMBINERS["greedy_selection"].configured(config, members),
        "convex_weights": replace(weighted, metric="log_loss", kind="linear", optimize_weights=True),
        "log_linear_pool": replace(weighted, metric="log_loss", kind="log_linear", optimize_weights=True),
    }
    for name, recipe in recipes.items():
        losses[name] = log_loss_per_row(fit_crossfitted(recipe, logits, labels, folds), labels)
    return Baselines(losses, members.names[best], config.seed)


def compare(baselines: Baselines, losses: np.ndarray) -> dict[str, Any]:
    """Compare a learned combiner's losses (N,) with the baselines': `{guards, beats_guards, verdict}`, JSON-ready.

    Every gain is a mean paired difference with its 95 % bootstrap interval. The combiner beats the baselines when the
    interval of its gain over the best of them lies above 0.
    """
    comparisons: dict[str, dict[str, Any]] = {}
    for name, of_baseline in baselines.losses.items():
        gain = of_baseline - losses
        interval = bootstrap_interval(gain, seed=baselines.seed)
        comparisons[name] = {
            "log_loss": float(of_baseline.mean()),
            "gain": float(gain.mean()),
            "gain_ci95": list(interval),
        }
    best = min(comparisons, key=lambda name: (comparisons[name]["log_loss"], name))
    low, high = comparisons[best]["gain_ci95"]
    beats = low > 0
    label = f"{best} ({baselines.best_single})" if best == "best_single" else best
    words = "beats" if beats else "does not beat" if high > 0 else "is worse than"
    verdict = (
        f"{words} {label}, the best of the simple combinations: log-loss {losses.mean():.4f} against "
        f"{comparisons[best]['log_loss']:.4f}, gain {comparisons[best]['gain']:+.4f} [{low:+.4f}, {high:+.4f}]"
    )
    return {"guards": comparisons, "best_single": baselines.best_single, "beats_guards": beats, "verdict": verdict}


def bootstrap_interval(differences: np.ndarray, *, seed: int) -> tuple[float, float]:
    """95 % percentile interval of the mean of paired differences (N,), by resampling the rows (Efron 1979)."""
    rng, rows = np.random.default_rng(seed), len(differences)
    means = [differences[rng.integers(0, rows, (BLOCK, rows))].mean(axis=1) for _ in range(REPLICATES // BLOCK)]
    low, high = np.quantile(np.concatenate(means), [0.025, 0.975])
    return float(low), float(high)
