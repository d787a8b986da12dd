"""Baselines of a learned combiner on the same rows, and its gain over each of them with an interval.

Ensembles that are compared with baselines keep their losses, and a later command with equal inputs reads them there.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from utils.building import ensembles, family_fits
from utils.combiners.calibrated_votes import CalibratedBestSingle, CalibratedSoftVoting
from utils.combiners.greedy import GreedySelection
from utils.combiners.pooled_members import PooledMembers
from utils.combiners.protocol import MemberFacts, fit_crossfitted
from utils.combiners.weighting import WeightedPool
from utils.core.config import Config
from utils.core.errors import UserError
from utils.core.workspace import Workspace
from utils.numeric.means import LEVEL, MIN_UNITS, paired_interval
from utils.numeric.metrics import log_loss_per_row
from utils.numeric.paired_comparison import CANNOT_TELL

logger = logging.getLogger("disease_pipeline")


@dataclass(frozen=True)
class Baselines:
    """Cross-fitted losses of the baselines, simple combinations of members, on N out-of-sample rows."""

    losses: Mapping[str, np.ndarray]
    """{name: log-loss (N,) in nats}"""
    best_single: str
    """The member of lowest log-loss at its temperature."""
    digest: str = ""
    """Digest of their inputs; baselines with equal digests are equal."""
    groups: np.ndarray | None = None
    """Group of each row (N,); None where rows are independent"""


def measure(
    workspace: Workspace,
    config: Config,
    members: MemberFacts,
    logits: np.ndarray,
    labels: np.ndarray,
    folds: np.ndarray,
    groups: np.ndarray | None = None,
) -> Baselines:
    """Measure best single member, mean, greedy selection, convex weights and log-linear pool on logits (M, N, C).

    Takes labels (N,), folds (N,) and groups (N,). All baselines are cross-fitted and have temperatures, as the
    combiners that are compared with them; the best single member of a fold is the best on the other folds. Baselines of
    equal inputs are not measured again: they are kept in this process and with the ensembles of the workspace, since
    most commands compare their combiners on the same rows.
    """
    recipes = _recipes(config, members)
    settings = config.digest(*(setting for recipe in recipes.values() for setting in recipe.settings), "seed")
    # Neither latencies nor sizes of members: no baseline depends on what a member costs.
    digest = _digest((ensembles.VERSION, settings, members.names), members.recorded_accuracy, logits, labels, folds)
    if digest not in _measured:
        saved = _saved(workspace, digest, len(labels))
        _measured[digest] = saved or replace(_measure(recipes, members.names, logits, labels, folds), digest=digest)
    return replace(_measured[digest], groups=groups)


def _recipes(config: Config, members: MemberFacts) -> dict[str, PooledMembers]:
    weighted = WeightedPool.configured(config, members)
    return {
        "best_single": CalibratedBestSingle.configured(config, members),
        "soft_voting": CalibratedSoftVoting.configured(config, members),
        "greedy_selection": GreedySelection.configured(config, members),
        "convex_weights": replace(weighted, metric="log_loss", kind="linear", optimize_weights=True),
        "log_linear_pool": replace(weighted, metric="log_loss", kind="log_linear", optimize_weights=True),
    }


_measured: dict[str, Baselines] = {}
"""Baselines without groups, by the digest of their inputs."""


def _saved(workspace: Workspace, digest: str, n_rows: int) -> Baselines | None:
    """Return the baselines of this digest that an ensemble of the workspace was compared with, if there is one."""
    for name in ensembles.names(workspace):
        try:
            record = ensembles.record_of(workspace, name) or {}
            if record.get("baselines_digest") != digest:
                continue
            losses = ensembles.load_baseline_losses(workspace, name)
        except UserError as error:  # `status` reports the damage; the baselines are measured again
            logger.warning("%s", error)
            continue
        best_single, names = record.get("best_single"), record.get("guards", {}).keys()
        if best_single and losses.keys() == names and all(each.shape == (n_rows,) for each in losses.values()):
            return Baselines(losses, best_single, digest)
    return None


def _digest(facts: object, *arrays: np.ndarray) -> str:
    digest = hashlib.sha256(repr(facts).encode())
    for array in arrays:
        digest.update(repr((array.shape, array.dtype.str)).encode())
        digest.update(np.ascontiguousarray(array).data)
    return digest.hexdigest()


def _measure(
    recipes: Mapping[str, PooledMembers],
    names: Sequence[str],
    logits: np.ndarray,
    labels: np.ndarray,
    folds: np.ndarray,
) -> Baselines:
    shared = logits, labels, folds
    fits = family_fits.fit_each(
        _fit, recipes.values(), shared=shared, description="baselines", n_logits=logits.size, are_nested=False
    )
    losses, weights = {}, {}
    for name, found in zip(recipes, fits, strict=True):
        if isinstance(found, UserError):
            raise found
        losses[name], weights[name] = found
    return Baselines(losses, names[int(weights["best_single"].argmax())])


def _fit(
    logits: np.ndarray, labels: np.ndarray, folds: np.ndarray, recipe: PooledMembers
) -> tuple[np.ndarray, np.ndarray]:
    """Return the cross-fitted losses (N,) and the weights (M,) of a baseline."""
    losses = log_loss_per_row(fit_crossfitted(recipe, logits, labels, folds), labels)
    return losses, recipe.weights


def compare(baselines: Baselines, losses: np.ndarray) -> dict[str, Any]:
    """Compare a learned combiner's losses (N,) with those of the baselines.

    Returns `{guards, best_single, beats_guards, verdict}` as JSON values. Every gain is a mean paired difference with
    its 95% interval over rows, or over groups. The combiner beats the baselines if the interval of each gain is above
    0. It is worse than the best of them if the interval of that gain is below 0 after Bonferroni's correction, which
    accounts for the choice of the best of several. Otherwise the difference is not significant. With too few rows or
    groups for an interval, `beats_guards` is None.
    """
    comparisons: dict[str, dict[str, Any]] = {}
    for name, baseline_losses in baselines.losses.items():
        gain = baseline_losses - losses
        interval = paired_interval(gain, baselines.groups)
        comparisons[name] = {
            "log_loss": float(baseline_losses.mean()),
            "gain": float(gain.mean()),
            "gain_ci95": None if interval is None else list(interval),
        }
    best = min(comparisons, key=lambda name: (comparisons[name]["log_loss"], name))
    interval = comparisons[best]["gain_ci95"]
    label = f"{best} ({baselines.best_single})" if best == "best_single" else best
    figures = (
        f"log-loss {losses.mean():.4f} against {comparisons[best]['log_loss']:.4f}, "
        f"gain {comparisons[best]['gain']:+.4f}"
    )
    if interval is None:
        beats = None
        words, bounds = "is not tested against", f" (an interval needs {MIN_UNITS} rows or groups)"
    else:
        beats = all(entry["gain_ci95"][0] > 0 for entry in comparisons.values())
        corrected = paired_interval(
            baselines.losses[best] - losses, baselines.groups, level=1 - (1 - LEVEL) / len(comparisons)
        )
        is_worse = corrected is not None and corrected[1] < 0
        words = "beats" if beats else "is worse than" if is_worse else f"{CANNOT_TELL} from"
        bounds = f" [{interval[0]:+.4f}, {interval[1]:+.4f}]"
        if interval[1] < 0 and corrected is not None and not is_worse:
            bounds += f", and corrected for {len(comparisons)} baselines [{corrected[0]:+.4f}, {corrected[1]:+.4f}]"
    verdict = f"{words} {label}, the best of the simple combinations: {figures}{bounds}"
    return {"guards": comparisons, "best_single": baselines.best_single, "beats_guards": beats, "verdict": verdict}
