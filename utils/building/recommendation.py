"""Which candidate to use, decided on honest rows alone: what was measured on test rows cannot reach this room."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from utils.core.errors import UserError
from utils.numeric.metrics import within_one_standard_error

SIMPLEST_FIRST = (
    *("soft_voting", "logit_averaging", "weighted", "greedy_selection", "pruned", "stacking_lr", "stacking_mlp"),
    *("stacking_rf", "stacking_xgb", "fusion", "cascade", "moe", "meta_fuser", "hard_voting"),
)
"""Beginnings of methods: among candidates that cannot be told apart the first is recommended, others after them.

Hard voting comes late, since its shares are no probabilities.
"""


@dataclass(frozen=True)
class Candidate:
    """Something that may be recommended, with its losses on honest rows."""

    name: str
    kind: str
    """member or ensemble"""
    method: str | None
    keys: tuple[tuple[str, str], ...]
    losses: np.ndarray
    """log-loss of each row in nats, (N,)"""
    hits: np.ndarray
    """bool (N,): the most probable class is the true one"""
    chosen_on_val: bool = False
    """Val rows decided what it is, so that they cannot speak for it."""


def recommend(found: Sequence[Candidate]) -> dict[str, Any]:
    """The candidate to use, by honest rows alone: `{name, reason, evidence, peers}`.

    Candidates with out-of-fold rows are compared on the rows they all share; without any, all are compared on val. The
    lowest log-loss wins, or the simplest ensemble within one paired standard error of it; a single member wins only
    when it is the lowest itself. A candidate with val rows alone replaces the winner only when the 95 % interval of the
    paired difference on the val rows lies above 0; one that was chosen on val never does.
    """
    with_oof = [candidate for candidate in found if any(split == "train" for split, _ in candidate.keys)]
    compared = with_oof or list(found)
    shared = sorted(set.intersection(*(set(candidate.keys) for candidate in compared)))
    if not shared:
        raise UserError("no row on which all members and ensembles have honest predictions. Build the ensembles again")
    losses = {candidate.name: _on(candidate, candidate.losses, shared) for candidate in compared}
    means = {name: float(values.mean()) for name, values in losses.items()}
    lowest = min(means, key=lambda name: (means[name], name))
    by_name = {candidate.name: candidate for candidate in found}
    winner, reason = lowest, "lowest log-loss on honest rows"
    if by_name[lowest].kind == "ensemble":
        near = [
            name
            for name in means
            if by_name[name].kind == "ensemble" and within_one_standard_error(losses[name], losses[lowest])
        ]
        winner = min(near, key=lambda name: (_simplicity(by_name[name]), name))
        if winner != lowest:
            reason = f"simplest within one standard error of the lowest log-loss ({lowest})"
    winner, reason, shared = _val_only_challengers(found, compared, winner, reason, shared)
    chosen = by_name[winner]
    values, hits = _on(chosen, chosen.losses, shared), _on(chosen, chosen.hits, shared)
    error = 1.96 * float(values.std(ddof=1)) / len(values) ** 0.5 if len(values) > 1 else 0.0
    mean = float(values.mean())
    singles = [name for name in means if by_name[name].kind == "member"]
    return {
        "name": winner,
        "reason": reason,
        "evidence": {
            "rows": "oof+val" if any(split == "train" for split, _ in shared) else "val",
            "n": len(shared),
            "log_loss": mean,
            "log_loss_ci95": [mean - error, mean + error],
            "accuracy": float(hits.mean()),
        },
        "best_single": min(singles, key=lambda name: (means[name], name)) if singles else None,
    }


def _val_only_challengers(
    found: Sequence[Candidate],
    compared: Sequence[Candidate],
    winner: str,
    reason: str,
    shared: list[tuple[str, str]],
) -> tuple[str, str, list[tuple[str, str]]]:
    by_name = {candidate.name: candidate for candidate in found}
    for challenger in sorted(found, key=lambda candidate: candidate.name):
        if challenger.name in {candidate.name for candidate in compared} or challenger.chosen_on_val:
            continue
        rows = sorted(set(challenger.keys) & set(by_name[winner].keys))
        if len(rows) < 2:
            continue
        gain = _on(by_name[winner], by_name[winner].losses, rows) - _on(challenger, challenger.losses, rows)
        if gain.mean() - 1.96 * gain.std(ddof=1) / len(rows) ** 0.5 > 0:
            winner, reason = challenger.name, f"clearly lower log-loss than {winner} on the val rows"
            shared = rows
    return winner, reason, shared


def _on(candidate: Candidate, values: np.ndarray, keys: Iterable[tuple[str, str]]) -> np.ndarray:
    place = {key: row for row, key in enumerate(candidate.keys)}
    return values[[place[key] for key in keys]]


def _simplicity(candidate: Candidate) -> int:
    method = candidate.method or ""
    return next((place for place, start in enumerate(SIMPLEST_FIRST) if method.startswith(start)), len(SIMPLEST_FIRST))
