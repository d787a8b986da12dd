"""Recommendation of a member or ensemble by out-of-sample rows only; results on test rows are never used."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from utils.building import ensembles
from utils.building.ensembles import Crossfit, Ensemble
from utils.building.selection_rule import Key, RowUnits, after_selection, nearest_by_cost, selection_widening
from utils.core.errors import LeakageError, UserError
from utils.numeric.means import LEVEL, MIN_ERRORS, mean_interval, paired_interval
from utils.numeric.metrics import log_loss_per_row, softmax
from utils.predictions import training_data
from utils.predictions.catalog import Catalog, Member, is_chosen_on_val
from utils.predictions.row_groups import row_groups
from utils.predictions.rows import MemberRows
from utils.predictions.store import Store
from utils.predictions.training_data import NONE, TRAIN

VAL_ALONE = "no out-of-fold rows: compared on val rows alone"
NO_LATENCY = "no latency is measured"


@dataclass(frozen=True)
class Candidate:
    """A member or ensemble with its losses on out-of-sample rows."""

    name: str
    kind: str
    """member or ensemble"""
    keys: tuple[Key, ...]
    losses: np.ndarray
    """Log-loss of each row in nats, (N,)"""
    hits: np.ndarray
    """bool (N,): whether the most probable class is the true one"""
    chosen_on_val: bool = False
    """Whether the candidate or one of its networks was selected on val rows, which are then no evidence for it."""


def recommend(
    candidates: Sequence[Candidate],
    units: RowUnits | None = None,
    latencies: Mapping[str, float] | None = None,
) -> dict[str, Any]:
    """Recommend a candidate by out-of-sample rows.

    Returns `{name, reason, note, evidence, latency_ms, fast, best_single, not_compared}`, the last {candidate: why it
    was not compared with the others}.

    Candidates with train rows are compared on the rows that they all share. If no candidate has train rows, or if only
    members have some but no ensemble does, all are compared on val. The lowest log-loss wins. Candidates that were
    selected on val are used only if there are no others. A candidate with val rows only replaces the winner if the
    interval of the paired difference on the val rows is above 0, with Bonferroni's correction for the number of
    candidates with val rows only.

    `evidence` has the scores of the winner, and under `after_selection` those of the rule: on each fold, the scores of
    the candidate with the lowest log-loss on the other folds. `fast` is the cheapest candidate by `latencies` {name:
    milliseconds per image} within one standard error of the winner. `units` are the folds and groups of the rows.
    """
    units = units or RowUnits({}, {})
    unbiased = [candidate for candidate in candidates if not candidate.chosen_on_val] or list(candidates)
    compared = _compared(unbiased)
    shared = sorted(set.intersection(*(set(candidate.keys) for candidate in compared)))
    if not shared:
        raise UserError(
            "no row on which all members and ensembles have out-of-sample predictions. Build the ensembles again"
        )
    means = {candidate.name: float(_on(candidate, candidate.losses, shared).mean()) for candidate in compared}
    winner = min(compared, key=lambda candidate: (means[candidate.name], candidate.kind == "ensemble", candidate.name))
    reason = "lowest log-loss on out-of-sample rows"
    challenger = _val_only_challenger(unbiased, compared, winner, units)
    if challenger is not None:
        reason = f"clearly lower log-loss than {winner.name} on the val rows"
        shared = sorted(set(challenger.keys) & set(winner.keys))
        compared, winner = [*compared, challenger], challenger
    groups, folds = units.groups_of(shared), units.folds_of(shared)
    names = [candidate.name for candidate in compared]
    losses, hits = (
        np.stack([_on(candidate, getattr(candidate, values), shared) for candidate in compared])
        for values in ("losses", "hits")
    )
    index = names.index(winner.name)
    on_train = any(split == "train" for split, _ in shared)
    evidence = {
        "rows": "oof+val" if on_train else "val",
        "n": len(shared),
        **_scores(losses[index], hits[index], groups),
        "after_selection": _scores(
            *after_selection(losses, hits, folds), groups, widening=selection_widening(losses, folds, groups)
        ),
    }
    notes = [] if on_train else [VAL_ALONE]
    if winner.chosen_on_val:
        notes.append("val rows have chosen it, so that its score is too good")
    singles = [name for name, candidate in zip(names, compared, strict=True) if candidate.kind == "member"]
    measured = latencies or {}
    fast = nearest_by_cost(losses, index, [measured.get(name) for name in names], groups)
    return {
        "name": winner.name,
        "reason": reason,
        "note": "; ".join(notes) or None,
        "evidence": evidence,
        "latency_ms": measured.get(winner.name),
        "fast": {
            "name": None if fast is None else names[fast],
            "reason": NO_LATENCY if fast is None else f"cheapest within one standard error of {winner.name}",
            "evidence": None if fast is None else _scores(losses[fast], hits[fast], groups),
            "latency_ms": None if fast is None else measured[names[fast]],
        },
        "best_single": min(singles, key=lambda name: (losses[names.index(name)].mean(), name)) if singles else None,
        "not_compared": {
            candidate.name: _why_not_compared(candidate) for candidate in candidates if candidate.name not in names
        },
    }


def _why_not_compared(candidate: Candidate) -> str:
    if candidate.chosen_on_val:
        return "selected on val rows"
    splits = sorted({split for split, _ in candidate.keys})
    return f"{len(candidate.keys)} {' and '.join(splits)} rows only"


def _compared(candidates: Sequence[Candidate]) -> list[Candidate]:
    """Return the candidates that are compared: those with train rows, or else those with val rows; see `recommend`."""
    with_train, with_val = (
        [candidate for candidate in candidates if any(part == split for part, _ in candidate.keys)]
        for split in ("train", "val")
    )
    has_ensembles = any(candidate.kind == "ensemble" for candidate in candidates)
    on_train = with_train and (not has_ensembles or any(candidate.kind == "ensemble" for candidate in with_train))
    return with_train if on_train else with_val


def _val_only_challenger(
    candidates: Sequence[Candidate], compared: Sequence[Candidate], winner: Candidate, units: RowUnits
) -> Candidate | None:
    """Return the best of the candidates that are significantly better than the winner on val rows; None without any."""
    names = {candidate.name for candidate in compared}
    others = [candidate for candidate in candidates if candidate.name not in names]
    clear: dict[str, tuple[float, Candidate]] = {}
    for challenger in others:
        rows = sorted(set(challenger.keys) & set(winner.keys))
        gain = _on(winner, winner.losses, rows) - _on(challenger, challenger.losses, rows)
        bounds = paired_interval(gain, units.groups_of(rows), level=1 - (1 - LEVEL) / len(others))
        if bounds is not None and bounds[0] > 0:
            clear[challenger.name] = float(gain.mean()), challenger
    return max(clear.values(), key=lambda entry: (entry[0], entry[1].name))[1] if clear else None


def _scores(
    losses: np.ndarray, hits: np.ndarray, groups: np.ndarray | None, *, widening: float = 1.0
) -> dict[str, Any]:
    """Return `{log_loss, log_loss_ci95, accuracy}`; the interval is None with too few rows, groups or errors."""
    bounds = mean_interval(losses, groups) if (~hits).sum() >= MIN_ERRORS else None
    mean = float(losses.mean())
    return {
        "log_loss": mean,
        "log_loss_ci95": None if bounds is None else [mean + widening * (bound - mean) for bound in bounds],
        "accuracy": float(hits.mean()),
    }


def _on(candidate: Candidate, values: np.ndarray, keys: Iterable[Key]) -> np.ndarray:
    row_of = {key: row for row, key in enumerate(candidate.keys)}
    return values[[row_of[key] for key in keys]]


def recommended(store: Store, members: Mapping[str, Member], saved: Mapping[str, Ensemble]) -> dict[str, Any]:
    """Recommend a member or saved ensemble by out-of-sample rows only, by the rule of `recommend_among`."""
    current = {
        name: ensemble for name, ensemble in saved.items() if not ensembles.is_stated_otherwise(store.catalog, ensemble)
    }
    crossfits = [(ensemble, ensembles.load_crossfit(store.workspace, name)) for name, ensemble in current.items()]
    parts = store.out_of_sample_parts(list(members.values()))
    keys = [(split, sample_id) for split in ("train", "val") for sample_id in store.samples(split).sample_ids]
    groups = row_groups(store, keys)
    return recommend_among(
        store.catalog, parts, crossfits, {} if groups is None else dict(zip(keys, groups.tolist(), strict=True))
    )


def recommend_among(
    catalog: Catalog,
    parts: Mapping[str, Sequence[MemberRows]],
    crossfits: Iterable[tuple[Ensemble, Crossfit]],
    groups: Mapping[Key, int] | None = None,
    latencies: Mapping[str, float] | None = None,
) -> dict[str, Any]:
    """Recommend a member or ensemble by the rule of `recommend`.

    `parts` are {member: its out-of-sample rows}, `crossfits` ensembles with their cross-fitted predictions, `groups`
    {(split, sample id): group} if rows are not independent. Candidates with unknown training data are left out. Raises
    LeakageError if no candidate is left.
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
        is_chosen = is_chosen_on_val(catalog, [name])
        candidates.append(_candidate(name, "member", keys, probabilities, labels, is_chosen=is_chosen))
    fold_of: dict[Key, int] = {}
    for ensemble, crossfit in crossfits:
        keys = crossfit.keys()
        fold_of |= zip(keys, crossfit.fold.tolist(), strict=True)
        is_chosen = is_chosen_on_val(catalog, [*ensemble.members, *ensemble.candidates])
        candidates.append(
            _candidate(ensemble.name, "ensemble", keys, crossfit.probabilities, crossfit.labels, is_chosen=is_chosen)
        )
    if not candidates:
        training_data.require_some_known(catalog, parts)
        raise LeakageError(_without_rows(catalog, parts))
    return recommend(candidates, RowUnits(fold_of, groups or {}), latencies)


def _without_rows(catalog: Catalog, names: Iterable[str]) -> str:
    """Return the error message if none of the named members has out-of-sample rows."""
    members = [catalog.members[name] for name in names]
    if not members:
        return (
            "no member and no ensemble has out-of-sample rows, by which one could be recommended: no member is "
            "selected. Name some in backbones.include"
        )
    # Statements are made for declared networks; those of the base pipeline record their training data.
    corrigible = [member.name for member in members if member.trained_on != TRAIN and member.pretrained_on == NONE]
    correction = f", or correct what it was trained on: {training_data.command(corrigible[:1], 'STATEMENT')}"
    return (
        f"no member or ensemble has out-of-sample rows, by which one could be recommended: "
        f"{', '.join(member.name for member in members)}. Give a member out-of-fold predictions"
        f"{correction if corrigible else ''}"
    )


def _candidate(
    name: str,
    kind: str,
    keys: list[Key],
    probabilities: np.ndarray,
    labels: np.ndarray,
    *,
    is_chosen: bool,
) -> Candidate:
    hits = probabilities.argmax(axis=1) == labels
    losses = log_loss_per_row(probabilities, labels)
    return Candidate(name, kind, tuple(keys), losses, hits, is_chosen)
