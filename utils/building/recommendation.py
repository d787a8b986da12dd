"""Which member or ensemble to recommend, by out-of-sample rows alone; results on test rows never enter."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from utils.building import ensembles
from utils.building.ensembles import Crossfit, Ensemble
from utils.core.errors import LeakageError, UserError
from utils.numeric.means import is_within_one_standard_error
from utils.numeric.metrics import log_loss_per_row, softmax
from utils.predictions import training_data
from utils.predictions.catalog import Catalog, Member, end_to_end_member_name
from utils.predictions.rows import MemberRows
from utils.predictions.store import Store
from utils.predictions.training_data import NONE, TRAIN

SIMPLEST_FIRST = (
    *("soft_voting", "logit_averaging", "weighted", "greedy_selection", "pruned", "stacking_lr", "stacking_mlp"),
    *("stacking_rf", "stacking_xgb", "fusion", "cascade", "moe", "meta_fuser", "hard_voting"),
)
"""Prefixes of methods, simplest first: among candidates within one standard error the first is recommended.

Hard voting comes last, since vote fractions are not probabilities.
"""
CHOSEN_ON_VAL = ("greedy_soup", "wise_ft", "distilled")
"""In the name of whatever val rows have chosen."""


@dataclass(frozen=True)
class Candidate:
    """A member or ensemble with its losses on out-of-sample rows."""

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
    """Val rows decided what it is, so that they are no evidence for it."""


def recommend(candidates: Sequence[Candidate]) -> dict[str, Any]:
    """The candidate to use, by out-of-sample rows alone: `{name, reason, evidence, peers}`.

    Candidates with train rows are compared on the rows they all share. Without any, and where members alone have some
    and ensembles none, all are compared on val. The lowest log-loss wins, or the simplest ensemble within one paired
    standard error of it; a single member wins only when it is the lowest itself. A candidate with val rows alone
    replaces the winner only when the 95 % interval of the paired difference on the val rows lies above 0; one that was
    chosen on val never does.
    """
    with_train, with_val = (
        [candidate for candidate in candidates if any(part == split for part, _ in candidate.keys)]
        for split in ("train", "val")
    )
    has_ensembles = any(candidate.kind == "ensemble" for candidate in candidates)
    on_train = with_train and (not has_ensembles or any(candidate.kind == "ensemble" for candidate in with_train))
    compared = with_train if on_train else with_val
    shared = sorted(set.intersection(*(set(candidate.keys) for candidate in compared)))
    if not shared:
        raise UserError(
            "no row on which all members and ensembles have out-of-sample predictions. Build the ensembles again"
        )
    losses = {candidate.name: _on(candidate, candidate.losses, shared) for candidate in compared}
    means = {name: float(values.mean()) for name, values in losses.items()}
    lowest = min(means, key=lambda name: (means[name], name))
    by_name = {candidate.name: candidate for candidate in candidates}
    winner, reason = lowest, "lowest log-loss on out-of-sample rows"
    if by_name[lowest].kind == "ensemble":
        near = [
            name
            for name in means
            if by_name[name].kind == "ensemble" and is_within_one_standard_error(losses[name], losses[lowest])
        ]
        winner = min(near, key=lambda name: (_simplicity(by_name[name]), name))
        if winner != lowest:
            reason = f"simplest within one standard error of the lowest log-loss ({lowest})"
    winner, reason, shared = _val_only_challengers(candidates, compared, winner, reason, shared)
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
    candidates: Sequence[Candidate],
    compared: Sequence[Candidate],
    winner: str,
    reason: str,
    shared: list[tuple[str, str]],
) -> tuple[str, str, list[tuple[str, str]]]:
    by_name = {candidate.name: candidate for candidate in candidates}
    for challenger in sorted(candidates, key=lambda candidate: candidate.name):
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
    row_of = {key: row for row, key in enumerate(candidate.keys)}
    return values[[row_of[key] for key in keys]]


def _simplicity(candidate: Candidate) -> int:
    method = candidate.method or ""
    return next((rank for rank, start in enumerate(SIMPLEST_FIRST) if method.startswith(start)), len(SIMPLEST_FIRST))


def recommended(store: Store, members: Mapping[str, Member], saved: Mapping[str, Ensemble]) -> dict[str, Any]:
    """Which member or ensemble to use, by out-of-sample rows alone; `recommend_among` is the rule."""
    current = {name: each for name, each in saved.items() if not ensembles.is_stated_otherwise(store.catalog, each)}
    crossfits = ((ensemble, ensembles.load_crossfit(store.workspace, name)) for name, ensemble in current.items())
    return recommend_among(store.catalog, store.out_of_sample_parts(list(members.values())), crossfits)


def recommend_among(
    catalog: Catalog, parts: Mapping[str, Sequence[MemberRows]], crossfits: Iterable[tuple[Ensemble, Crossfit]]
) -> dict[str, Any]:
    """Which member or ensemble to use; `recommend` is the rule.

    `parts` are {member: its out-of-sample rows}, `crossfits` ensembles with their cross-fitted predictions. Those whose
    training data is unknown are left out. Raises LeakageError where nothing is left.
    """
    candidates = []
    unknown = training_data.unknown_names(catalog, parts)
    crossfits = [entry for entry in crossfits if not entry[0].provenance.unknown_training_data]
    for name, member_parts in parts.items():
        if name in unknown or not member_parts:
            continue
        keys = [(part.split, sample_id) for part in member_parts for sample_id in part.sample_ids.tolist()]
        probabilities = np.concatenate([softmax(np.asarray(part.logits)) for part in member_parts])
        labels = np.concatenate([np.asarray(part.labels) for part in member_parts])
        candidates.append(_candidate(name, None, keys, probabilities, labels))
    for ensemble, crossfit in crossfits:
        candidates.append(_candidate(ensemble.name, ensemble, crossfit.keys(), crossfit.probabilities, crossfit.labels))
    if not candidates:
        training_data.require_some_known(catalog, parts)
        raise LeakageError(_without_rows(catalog, parts))
    return recommend(candidates)


def _without_rows(catalog: Catalog, names: Iterable[str]) -> str:
    """The message where none of the named members has out-of-sample rows."""
    members = [catalog.members[name] for name in names]
    if not members:
        return (
            "no member and no ensemble has out-of-sample rows, by which one could be recommended: no member is "
            "selected. Name some in backbones.include"
        )
    # Statements are about declared networks; those of the base pipeline record theirs.
    corrigible = [member.name for member in members if member.trained_on != TRAIN and member.pretrained_on == NONE]
    correction = f", or correct what it was trained on: {training_data.command(corrigible[:1], 'STATEMENT')}"
    return (
        f"no member or ensemble has out-of-sample rows, by which one could be recommended: "
        f"{', '.join(member.name for member in members)}. Give a member out-of-fold predictions"
        f"{correction if corrigible else ''}"
    )


def _candidate(
    name: str,
    ensemble: Ensemble | None,
    keys: list[tuple[str, str]],
    probabilities: np.ndarray,
    labels: np.ndarray,
) -> Candidate:
    hits = probabilities.argmax(axis=1) == labels
    losses = log_loss_per_row(probabilities, labels)
    kind, method = ("ensemble", ensemble.method) if ensemble else ("member", None)
    return Candidate(name, kind, method, tuple(keys), losses, hits, is_chosen_on_val(name, ensemble))


def is_chosen_on_val(name: str, ensemble: Ensemble | None) -> bool:
    """Whether val rows decided what it is: by its name, or since its networks were trained further for it."""
    further = ensemble is not None and any(
        member.startswith(end_to_end_member_name(name, "")) for member in ensemble.members
    )
    return further or any(word in name for word in CHOSEN_ON_VAL)
