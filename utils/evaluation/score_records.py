"""`metrics.json` of one member or ensemble: scores with intervals, comparisons, cost, uncertainty and where it is from.

Every key is always there; what could not be measured is null, with the reason in `notes`.
"""

from __future__ import annotations

import platform
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any

import numpy as np

from utils.building import ensembles
from utils.building.ensembles import Ensemble
from utils.building.latency import Record, Timing
from utils.distillation import controls
from utils.evaluation import scoring
from utils.evaluation.scoring import ScoredModel
from utils.numeric import uncertainty
from utils.numeric.metrics import log_loss_per_row, point_metrics, softmax
from utils.numeric.statistics import (
    REPLICATES,
    Floats,
    bootstrap_metrics,
    difference_interval,
    mcnemar,
    mean_interval,
    metric_intervals,
)
from utils.predictions import fold_networks
from utils.predictions.catalog import IMPORTED, Member
from utils.predictions.rows import UNKNOWN, Rows
from utils.predictions.store import Store

COPIED = ("expected_experts",)
"""What an ensemble's own record may say of it that its scores repeat."""


@dataclass(frozen=True)
class UncertaintyOptions:
    """What `evaluate` may be told about uncertainty."""

    alpha: float = uncertainty.ALPHA
    """Share of rows whose conformal set may miss the true class."""
    target_risk: float = uncertainty.TARGET_RISK
    """Share of answered rows that may be wrong when unsure ones are not answered."""
    class_conditional: bool = False
    """Whether each class gets a threshold of its own as well."""

    def as_record(self) -> dict[str, Any]:
        """As a ranking records them; the keys are on disk."""
        return {
            "alpha": self.alpha,
            "wanted_error": self.target_risk,
            "class_conditional": self.class_conditional,
        }


@dataclass(frozen=True)
class OutOfSamplePredictions:
    """Honest answers of one member or ensemble: out-of-fold or cross-fitted on train, held out on val."""

    probabilities: np.ndarray
    """(N, C)"""
    labels: np.ndarray
    """(N,)"""
    split: np.ndarray
    """unicode (N,)"""
    sample_ids: np.ndarray
    """unicode (N,)"""

    def of_val(self) -> tuple[np.ndarray, np.ndarray] | None:
        """Probabilities and labels of the val rows, which the networks that answer at inference gave; None without."""
        rows = self.split == "val"
        return (self.probabilities[rows], self.labels[rows]) if rows.any() else None


def member_predictions(store: Store, member: Member) -> OutOfSamplePredictions:
    """A member's honest rows with a label."""
    parts = store.out_of_sample_parts([member])[member.name]
    labels = np.concatenate([np.asarray(part.labels) for part in parts])
    known = labels != UNKNOWN
    return OutOfSamplePredictions(
        np.concatenate([softmax(np.asarray(part.logits)) for part in parts])[known],
        labels[known],
        np.concatenate([np.full(len(part.labels), part.split) for part in parts])[known],
        np.concatenate([np.asarray(part.sample_ids) for part in parts])[known],
    )


def crossfitted_predictions(store: Store, name: str) -> OutOfSamplePredictions:
    """An ensemble's cross-fitted rows."""
    found = ensembles.load_crossfit(store.workspace, name)
    return OutOfSamplePredictions(found.probabilities, found.labels, found.split, found.sample_ids)


class EvaluationContext:
    """What the records of one evaluation share: rows, bootstrap samples, the ones to compare with, latencies."""

    def __init__(
        self,
        store: Store,
        rows: Rows,
        split: str,
        scored: Sequence[ScoredModel],
        *,
        dropped: int,
        references: Mapping[str, ScoredModel | None],
        latencies: Mapping[str, Record],
        combiners: Mapping[str, Record],
        unmeasured: Mapping[str, str],
        options: UncertaintyOptions,
    ) -> None:
        """`references` {vs_best_single, vs_soft_voting: what to compare with}; `latencies` {member: of its network};
        `combiners` {ensemble: of its combiner}; `unmeasured` {member or ensemble: why there is no latency}.
        """
        self.store, self.rows, self.split, self.dropped, self.options = store, rows, split, dropped, options
        self.references, self.latencies, self.combiners = references, latencies, combiners
        self.unmeasured = unmeasured
        self.groups = scoring.groups(store, rows, split)
        compared = {id(item): item for item in (*scored, *references.values()) if item is not None}
        self.place = {key: number for number, key in enumerate(compared)}
        answers = [item.probabilities for item in compared.values()]
        self.samples = bootstrap_metrics(answers, rows.labels, groups=self.groups, seed=store.config.seed)
        self._unfamiliar: dict[tuple[str, str], tuple[np.ndarray, Floats]] = {}

    def ood_scores(self, names: Sequence[str], split: str) -> Floats:
        """Mean over members of `uncertainty.ood_scores` of their full networks on the rows that all have, (2, N)."""
        found = [self._of_network(name, split) for name in names]
        shared = set.intersection(*(set(ids.tolist()) for ids, _ in found))
        mean: Floats = np.mean([values[:, np.isin(ids, list(shared))] for ids, values in found], axis=0)
        return mean

    def _of_network(self, name: str, split: str) -> tuple[np.ndarray, Floats]:
        """Sample ids (N,) and what they are to one member's network, (2, N); found once."""
        if (name, split) not in self._unfamiliar:
            ids, logits = self.rows.sample_ids, self.rows.logits[self.rows.members.index(name)]
            if split != self.split:
                stored = self.store.rows(self.store.catalog.members[name], split)
                ids, logits = np.asarray(stored.sample_ids), np.asarray(stored.logits)
            self._unfamiliar[name, split] = ids, uncertainty.ood_scores(logits)
        return self._unfamiliar[name, split]


def record(item: ScoredModel, saved: Ensemble | None, context: EvaluationContext) -> dict[str, Any]:
    """`metrics.json` of one scored member, or of one ensemble, which is then `saved`."""
    store, rows = context.store, context.rows
    found = point_metrics(item.probabilities, rows.labels, rows.classes)
    notes: dict[str, str] = found.pop("notes")
    units = len(rows.labels) if context.groups is None else len(np.unique(context.groups))
    found["ci95"] = metric_intervals(found, context.samples, context.place[id(item)], units)
    if found["accuracy"] == 1:
        notes["ci95"] = "no row is wrong: accuracy has an exact bound, the others no spread that resampling could show"
    for key, reference in context.references.items():
        found[key] = _compared(item, reference, context)
        if found[key] is None:
            notes[key] = f"it is {item.name} itself" if reference is not None else "it has no answers to these rows"
    own = ensembles.record_of(store.workspace, item.name) if saved else None
    unseen = (
        crossfitted_predictions(store, item.name) if saved else member_predictions(store, _member(store, item.name))
    )
    if saved:
        ids = rows.sample_ids.tolist()
        told = controls.control_metrics(store.workspace, item.name, context.split, ids, item.probabilities)
        found, notes = found | told[0], notes | told[1]
    fitted, selected = (
        scoring.overlap(sets, rows) for sets in (item.provenance.fitted_on, item.provenance.selected_on)
    )
    found |= {
        "name": item.name,
        "split": context.split,
        "bootstrap": {"replicates": REPLICATES, "unit": "row" if context.groups is None else "group", "units": units},
        "members": list(item.members),
        "weights": _weights(item, own, notes),
        "latency_ms": _latency(item, saved, context, notes),
        "size_mb": _size_mb(store, item, notes),
        "crossfit": _crossfit(unseen),
        **_uncertainty(item, unseen, context, notes),
        "fitted_on": [part.as_record() for part in item.provenance.fitted_on],
        "selected_on": [part.as_record() for part in item.provenance.selected_on],
        "contaminated": fitted > 0,
        "optimistic": selected > 0,
        "overlap": {"fitted": fitted, "selected": selected, "dropped": context.dropped},
        "config_digest": own["config_digest"] if own else None,
        "seed": store.config.seed,
        "versions": {"python": platform.python_version(), "numpy": np.__version__},
        "created": datetime.now().astimezone().isoformat(timespec="seconds"),
        "notes": notes,
        **{key: own[key] for key in COPIED if own and key in own},
    }
    if own is None:
        notes["config_digest"] = "a member does not depend on the configuration"
    if not store.catalog.has_images:
        notes["overlap.dropped"] = "there are no images, so that equal samples under two names cannot be told"
    return found


def _member(store: Store, name: str) -> Member:
    return store.catalog.members[name]


def _compared(item: ScoredModel, reference: ScoredModel | None, context: EvaluationContext) -> dict[str, Any] | None:
    """What an item gains over another on the same rows, by the paired bootstrap and McNemar's test."""
    if reference is None or item.name == reference.name:
        return None
    own, other = context.place[id(item)], context.place[id(reference)]
    hits, others = ((one.probabilities.argmax(axis=1) == context.rows.labels) for one in (item, reference))
    losses = [log_loss_per_row(one.probabilities, context.rows.labels) for one in (item, reference)]
    samples = context.samples
    return {
        "name": reference.name,
        "delta_accuracy": float(hits.mean() - others.mean()),
        "delta_ci95": difference_interval(samples["accuracy"][own], samples["accuracy"][other]),
        "delta_log_loss": float((losses[0] - losses[1]).mean()),
        "delta_log_loss_ci95": difference_interval(samples["log_loss"][own], samples["log_loss"][other]),
        "mcnemar_p": mcnemar(hits, others),
    }


def _weights(item: ScoredModel, own: Mapping[str, Any] | None, notes: dict[str, str]) -> dict[str, float] | None:
    if own is None:
        return {item.name: 1.0}
    if own.get("weights") is None:
        notes["weights"] = f"{own['method']} is no weighted mean of its members"
    return own.get("weights")


def _crossfit(unseen: OutOfSamplePredictions) -> dict[str, Any]:
    losses = log_loss_per_row(unseen.probabilities, unseen.labels)
    hits = unseen.probabilities.argmax(axis=1) == unseen.labels
    return {
        "n": len(losses),
        "accuracy": float(hits.mean()),
        "log_loss": float(losses.mean()),
        "log_loss_ci95": mean_interval(losses),
    }


def _networks(store: Store, item: ScoredModel) -> dict[str, tuple[str, ...]]:
    """{member: stages of the networks that answer for it}."""
    if item.inference == fold_networks.FULL:
        return {name: (store.catalog.members[name].checkpoints[0]["stage"],) for name in item.members}
    return {name: fold_networks.stages(store.catalog.members[name]) for name in item.members}


def _imported(store: Store, item: ScoredModel) -> list[str]:
    return [name for name in item.members if store.catalog.members[name].source == IMPORTED]


def _size_mb(store: Store, item: ScoredModel, notes: dict[str, str]) -> float | None:
    """10^6 bytes of the checkpoints that answer, and of the combiner."""
    imported = _imported(store, item)
    if imported:
        notes["size_mb"] = f"known by predictions alone: {', '.join(imported)}"
        return None
    files = [
        store.workspace.base / entry["path"]
        for name, stages in _networks(store, item).items()
        for entry in store.catalog.members[name].checkpoints
        if entry["stage"] in stages
    ]
    if item.kind == "ensemble":
        folder = store.workspace.ensemble(item.name)
        files += [folder / "combiner.safetensors", *sorted(folder.glob("*booster.json"))]
    gone = [file.name for file in files if not file.is_file()]
    if gone:
        notes["size_mb"] = f"gone: {', '.join(gone)}"
        return None
    return round(sum(file.stat().st_size for file in files) / 1e6, 3)


def _latency(
    item: ScoredModel, saved: Ensemble | None, context: EvaluationContext, notes: dict[str, str]
) -> dict[str, Any] | None:
    """Milliseconds for a batch of 1 and of 32: the networks one after another, then the combiner.

    The p95 of a sum is at most the sum of the parts' p95 that stands here, but for chance.
    """
    imported = _imported(context.store, item)
    unmeasured = {name: context.unmeasured[name] for name in (*item.members, item.name) if name in context.unmeasured}
    if imported or unmeasured:
        words = f"known by predictions alone: {', '.join(imported)}"
        notes["latency_ms"] = words if imported else "; ".join(unmeasured.values())
        return None
    passes = {name: len(stages) for name, stages in _networks(context.store, item).items()}
    parts = [(context.latencies[name], count) for name, count in passes.items()]
    parts += [(context.combiners[item.name], 1)] if saved else []
    found: dict[str, Any] = {}
    for size in (1, 32):
        timings = [(record.batches.get(size), count) for record, count in parts]
        found[f"batch_{size}"] = _summed(timings)
        if found[f"batch_{size}"] is None:
            notes[f"latency_ms.batch_{size}"] = "memory was too small for it"
    return found | {"device": parts[0][0].device, "threads": parts[0][0].threads}


def _summed(timings: Sequence[tuple[Timing | None, int]]) -> dict[str, float] | None:
    known = [(timing, count) for timing, count in timings if timing is not None]
    if len(known) < len(timings):
        return None
    return {key: round(sum(getattr(timing, key) * count for timing, count in known), 4) for key in ("p50", "p95")}


def _uncertainty(
    item: ScoredModel, unseen: OutOfSamplePredictions, context: EvaluationContext, notes: dict[str, str]
) -> dict[str, Any]:
    """`conformal`, `conformal_by_class` where asked for, `selective`, `mutual_information`, `out_of_distribution`."""
    options, rows = context.options, context.rows
    evaluated = (item.probabilities, rows.labels)
    of_val = unseen.of_val()
    calibration = None if context.split == "val" else of_val
    found: dict[str, Any] = {"conformal": None}
    missing = "val rows calibrate it, and cannot say how well" if context.split == "val" else "it has no val rows"
    if calibration is not None:
        sets = {
            kind: uncertainty.conformal_metrics(kind, calibration, evaluated, alpha=options.alpha)
            for kind in uncertainty.NONCONFORMITY_SCORES
        }
        n, needed = len(calibration[1]), uncertainty.min_calibration_rows(options.alpha)
        missing = f"too few rows: {n} val rows, and an alpha of {options.alpha:g} needs {needed}"
        found["conformal"] = sets if all(sets.values()) else None
        if options.class_conditional:
            found["conformal_by_class"] = {
                kind: uncertainty.class_conditional_metrics(
                    kind, calibration, evaluated, rows.classes, alpha=options.alpha
                )
                for kind in uncertainty.NONCONFORMITY_SCORES
            }
    if found["conformal"] is None:
        notes["conformal"] = missing
    found["selective"] = uncertainty.selective_metrics(evaluated, calibration, target_risk=options.target_risk)
    if found["selective"]["threshold"] is None:
        reached = f"on no part of the val rows is the error {options.target_risk:g} or less"
        notes["selective.threshold"] = reached if calibration is not None else missing
    found["mutual_information"] = None if item.disagreement is None else float(item.disagreement.mean())
    if item.disagreement is None:
        notes["mutual_information"] = "one member alone cannot disagree"
    found["out_of_distribution"] = _foreign(item, context, notes)
    return found


def _foreign(item: ScoredModel, context: EvaluationContext, notes: dict[str, str]) -> dict[str, Any] | None:
    reason = "its members' answers are log-probabilities, which do not say how little a network knows of a row"
    members = [context.store.catalog.members[name] for name in item.members]
    hint = None
    if context.split == "val":
        reason = "val rows are what others would be held against"
    elif not all(context.store.is_available(member, "val") for member in members):
        reason = "it has no val rows"
    elif item.inference == fold_networks.FULL:
        here, there = (context.ood_scores(item.members, split) for split in (context.split, "val"))
        hint = uncertainty.ood_summary(here, there)
    if hint is None:
        notes["out_of_distribution"] = reason
        return None
    limits = "a hint, no test: networks can be very sure of foreign images, and a shift may leave both alike"
    return hint | {"limits": limits}
