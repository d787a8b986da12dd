"""Select the networks that predict for a stacker: the members' full networks, or the means of their fold networks.

A stacker is fitted on out-of-fold rows. Full networks were trained on more images and are more confident, means of fold
networks are smoother; the val rows show which of the two suits the stacker.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from utils.building.builder_protocol import SHOWN_MEMBERS
from utils.combiners.protocol import MemberFacts
from utils.combiners.weighting import WeightedPool
from utils.core.config import Config
from utils.numeric.means import count_units, standard_error
from utils.numeric.metrics import accuracy, log_loss_per_row, log_softmax, softmax
from utils.predictions.rows import Rows

MEASURED_WITH = "log-linear pool fitted on out-of-fold rows"


@dataclass(frozen=True)
class Measurement:
    """Losses with both kinds of networks on the val rows."""

    full: np.ndarray | None
    """float64 (N,): log-loss of the pool on the full networks' val rows; None without out-of-fold rows or val rows"""
    folds: np.ndarray | None
    """float64 (N,): the same with the means of the fold networks; None if they are missing or not requested"""
    shift: dict[str, dict[str, Any]]
    """{member: {out_of_fold, full, folds: result of `describe`}}"""
    groups: np.ndarray | None = None
    """int64 (N,): groups of the val rows; None if the rows are independent"""

    @property
    def gain(self) -> tuple[float, float] | None:
        """Decrease of the log-loss with fold networks, and its standard error over rows or groups.

        None with fewer than two rows or groups, or if either loss is None.
        """
        if self.full is None or self.folds is None or count_units(len(self.full), self.groups) < 2:
            return None
        difference = self.full - self.folds
        return float(difference.mean()), standard_error(difference, self.groups)


def measure(
    config: Config,
    members: MemberFacts,
    fold: np.ndarray,
    full: Rows,
    folds: Rows | None,
    groups: np.ndarray | None = None,
) -> Measurement:
    """Fit a log-linear pool on out-of-fold rows and score it on val, with full networks and means of fold networks.

    `full` and `folds` have the same rows, out-of-fold and val, with cross-fitting folds `fold` (N,) and groups (N,).
    The pool represents all learners: it has weights and a temperature, and a change of networks mainly shifts the
    members' confidence.
    """
    train, val = np.flatnonzero(full.split == "train"), np.flatnonzero(full.split == "val")
    shift = {
        name: {
            "out_of_fold": describe(full.logits[index, train], full.labels[train]),
            "full": describe(full.logits[index, val], full.labels[val]),
            "folds": None if folds is None else describe(folds.logits[index, val], folds.labels[val]),
        }
        for index, name in enumerate(full.members)
    }
    if not len(train) or not len(val):
        return Measurement(None, None, shift)
    pool = replace(
        WeightedPool.configured(config, members), metric="log_loss", kind="log_linear", optimize_weights=True
    )
    pool.fit(full.logits[:, train], full.labels[train], fold[train])
    losses = [
        None if rows is None else log_loss_per_row(pool.predict_proba(rows.logits[:, val]), rows.labels[val])
        for rows in (full, folds)
    ]
    return Measurement(losses[0], losses[1], shift, None if groups is None else groups[val])


def describe(logits: np.ndarray, labels: np.ndarray) -> dict[str, float] | None:
    """Return accuracy, mean largest probability and mean entropy in nats of logits (N, C) with labels (N,).

    None without rows.
    """
    if not len(labels):
        return None
    logs, probabilities = log_softmax(logits), softmax(logits)
    return {
        "n": len(labels),
        "accuracy": accuracy(probabilities, labels),
        "mean_largest_probability": float(probabilities.max(axis=1).mean()),
        "mean_entropy": float(-(probabilities * logs).sum(axis=1).mean()),
    }


def choose(requested: str, measured: Measurement, *, lacking: Sequence[str], feeds_fuser: bool) -> dict[str, Any]:
    """Return `{asked, chosen, reason, val_log_loss, gain_of_folds, standard_error, measured_with, shift}`.

    `auto` selects the fold networks if their gain on val exceeds its standard error, unless members are `lacking` them
    or a fuser combines the stacker with ensembles of full networks.
    """
    gain = measured.gain
    if requested != "auto":
        chosen, reason = requested, "asked for"
    elif lacking:
        chosen, reason = "full", f"no complete set of fold networks: {', '.join(lacking)}"
    elif feeds_fuser:
        chosen, reason = "full", "the inputs of runs.meta_fuser share their members' networks"
    elif gain is None:
        chosen, reason = "full", "no val rows to measure on"
    else:
        chosen = "folds" if gain[0] > gain[1] else "full"
        sign = "more" if chosen == "folds" else "no more"
        reason = f"fold networks gain {gain[0]:+.4f} in log-loss on val, {sign} than one standard error {gain[1]:.4f}"
    return {
        "asked": requested,
        "chosen": chosen,
        "reason": reason,
        "val_log_loss": {
            kind: None if losses is None else float(losses.mean())
            for kind, losses in (("full", measured.full), ("folds", measured.folds))
        },
        "gain_of_folds": None if gain is None else gain[0],
        "standard_error": None if gain is None else gain[1],
        "measured_with": MEASURED_WITH,
        "shift": measured.shift,
    }


def summary_lines(record: dict[str, Any]) -> list[str]:
    """Return a line on the choice, and one on the shift of each member, or of the `SHOWN_MEMBERS` with the largest."""
    lines = [f"inference members: {record['chosen']} ({record['reason']})"]
    shift = record["shift"]
    largest = sorted(shift, key=lambda name: _difference(shift[name]), reverse=True)[:SHOWN_MEMBERS]
    for name, kinds in shift.items():
        if name not in largest:
            continue
        parts = [
            f"{kind.replace('_', '-')} {values['mean_largest_probability']:.3f} / {values['mean_entropy']:.3f} / "
            f"{values['accuracy']:.3f}"
            for kind, values in kinds.items()
            if values is not None
        ]
        lines.append(f"    {name}, mean largest probability / entropy / accuracy: {', '.join(parts)}")
    if len(shift) > len(largest):
        lines.append(f"    and {len(shift) - len(largest)} members with smaller differences, in ensemble.json")
    return lines


def _difference(kinds: Mapping[str, Mapping[str, float] | None]) -> float:
    """Return the range of the mean largest probability over the kinds of predictions of one member."""
    means = [values["mean_largest_probability"] for values in kinds.values() if values is not None]
    return max(means) - min(means) if means else 0.0
