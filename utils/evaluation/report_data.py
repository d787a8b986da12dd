"""What the report shows, gathered from the files that `evaluate` and the building commands left; nothing is fitted.

Absent records and keys come out as None, so that a report can be written of whatever was measured.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from utils.building import ensembles
from utils.core.artifacts import read_arrays, read_record
from utils.core.errors import UserError
from utils.core.workspace import Workspace
from utils.evaluation.example_images import Answers
from utils.numeric import diversity
from utils.numeric.metrics import SMALLEST_PROBABILITY, log_softmax, softmax
from utils.predictions import fold_networks
from utils.predictions.catalog import Member
from utils.predictions.rows import UNKNOWN, MemberRows
from utils.predictions.store import Store

AGAIN = "Remove it, then evaluate again"
SLICE = 4096  # rows at a time, whatever the number of classes
PEERS = ("best_single", "soft_voting")


@dataclass(frozen=True)
class Contributions:
    """Of M members on the honest rows that all of them have."""

    names: tuple[str, ...]
    rows: int
    accuracy: np.ndarray
    """(M,)"""
    log_loss: np.ndarray
    """(M,), nats"""
    alone_right: np.ndarray
    """int64 (M,): rows that this member alone gets right"""
    without: np.ndarray
    """(M,): log-loss of the plain mean without this member, less that of the mean of all; above 0: it helps"""
    mean_log_loss: float
    pairs: diversity.Diversity


@dataclass(frozen=True)
class ReportData:
    """Everything that a report is made of."""

    split: str
    ranking: dict[str, Any]
    metrics: dict[str, dict[str, Any]]
    """{name: what its `metrics.json` holds}, in the order of the ranking"""
    focus: str
    """What the report is about: the recommended member or ensemble."""
    records: dict[str, dict[str, Any]]
    """{name: `ensemble.json`} of the ensembles among `metrics`, in their order"""
    classes: tuple[str, ...]
    members: tuple[Member, ...]
    """Those of the focus, or all that are ranked where it is a member."""
    inference: str
    answers: Answers | None
    """Of the focus on the evaluated rows."""
    peers: dict[str, str]
    """{best_single, soft_voting: name}, those that are there and not the focus"""
    contributions: Contributions | None
    notes: list[str] = field(default_factory=list)
    """What could not be shown, and why."""

    @property
    def evaluated(self) -> dict[str, Any]:
        """Metrics of the focus."""
        return self.metrics[self.focus]

    @property
    def record(self) -> dict[str, Any]:
        """`ensemble.json` of the focus; empty for a member."""
        return self.records.get(self.focus, {})


def gather(store: Store, split: str) -> ReportData:
    """Read what there is of a split. Raises UserError where nothing was evaluated yet."""
    workspace = store.workspace
    ranking = read_record(workspace.ranking(split), remedy=AGAIN)
    if ranking is None:
        raise UserError(f"{workspace.ranking(split)}: nothing is evaluated yet. Run evaluate first")
    metrics = read_metrics(workspace, ranking, split)
    focus = ranking["recommended"]["name"]
    if focus not in metrics:  # its metrics were removed by hand
        focus = next(iter(metrics))
    kinds = {row["name"]: row["kind"] for row in ranking["rows"]}
    is_ensemble, notes = kinds[focus] == "ensemble", []
    records = _records(workspace, [name for name in metrics if kinds[name] == "ensemble"], notes)
    record = records.get(focus, {})
    wanted = record.get("members") or [name for name, kind in kinds.items() if kind == "member"]
    members = tuple(store.catalog.members[name] for name in sorted(wanted) if name in store.catalog.members)
    inference = record.get("inference", fold_networks.FULL)
    try:
        answers = _of_ensemble(store, focus, split) if is_ensemble else _of_member(store, focus, kinds, split)
    except (UserError, OSError) as error:
        answers = None
        notes.append(f"Single rows of {split} are not shown: {error}")
    try:
        contributions = contribute(store.out_of_sample_parts(members)) if len(members) > 1 else None
    except (UserError, OSError) as error:
        contributions = None
        notes.append(f"What each member adds is not shown: {error}")
    found = ranking.get("peers") or {}
    peers = {kind: found[kind] for kind in PEERS if found.get(kind) in metrics and found[kind] != focus}
    return ReportData(
        split, ranking, metrics, focus, records, store.catalog.classes, members, inference, answers, peers,
        contributions, notes,
    )  # fmt: skip


def _records(workspace: Workspace, names: Sequence[str], notes: list[str]) -> dict[str, dict[str, Any]]:
    """{name: `ensemble.json`} of those that are there and whole; of the others `notes` say why not."""
    found = {}
    for name in names:
        try:
            found[name] = ensembles.record_of(workspace, name) or {}
        except UserError as error:
            notes.append(f"How {name} combines is not shown: {error}")
    return found


def read_metrics(workspace: Workspace, ranking: Mapping[str, Any], split: str) -> dict[str, dict[str, Any]]:
    """{name: `metrics.json`} of all that is ranked and still there, in order."""
    found = {}
    for row in ranking["rows"]:
        place = workspace.ensemble_metrics if row["kind"] == "ensemble" else workspace.member_metrics
        record = read_record(place(row["name"], split), remedy=AGAIN)
        if record is not None:
            found[row["name"]] = record
    if not found:
        raise UserError(f"{workspace.scores}: no metrics of {split} are there. Run evaluate --force")
    return found


def _of_member(store: Store, name: str, kinds: Mapping[str, str], split: str) -> Answers:
    """Of a member on the rows that ensembles were evaluated on; without an ensemble, on all labelled ones."""
    ensemble = next((other for other, kind in kinds.items() if kind == "ensemble"), None)
    among = None if ensemble is None else _of_ensemble(store, ensemble, split).sample_ids
    return Answers.of_member(store.rows(store.catalog.members[name], split), among)


def _of_ensemble(store: Store, name: str, split: str) -> Answers:
    path = store.workspace.ensemble(name) / f"predictions_{split}.npz"
    arrays = read_arrays(path, remedy=AGAIN)
    return Answers(arrays["sample_ids"], arrays["labels"], arrays["probabilities"])


def contribute(parts: Mapping[str, Sequence[MemberRows]]) -> Contributions:
    """What each member adds to the plain mean of all, on the labelled rows that all of them have.

    Raises UserError where they share none. Only the probability of the true class is kept of each row.
    """
    of_truth, hits = {}, {}
    for name, pieces in parts.items():
        of_truth[name], hits[name] = _scored(pieces)
    shared = sorted(set.intersection(*(set(found) for found in of_truth.values())))
    if not shared:
        raise UserError(f"{', '.join(parts)}: no labelled row on which all of them have honest predictions")
    names = tuple(parts)
    truth = np.array([[of_truth[name][key] for key in shared] for name in names])
    right = np.array([[hits[name][key] for key in shared] for name in names])
    total = truth.sum(axis=0)
    mean = _loss(total / len(names))
    without = np.array([_loss((total - own) / max(1, len(names) - 1)) - mean for own in truth])
    return Contributions(
        names=names,
        rows=len(shared),
        accuracy=right.mean(axis=1),
        log_loss=np.array([_loss(own) for own in truth]),
        alone_right=(right & (right.sum(axis=0) == 1)).sum(axis=1),
        without=without,
        mean_log_loss=mean,
        pairs=diversity.pairwise_diversity(right),
    )


def _scored(pieces: Sequence[MemberRows]) -> tuple[dict[tuple[str, str], float], dict[tuple[str, str], bool]]:
    """{(split, id): probability of the true class} and {...: right} of one member."""
    of_truth: dict[tuple[str, str], float] = {}
    hits: dict[tuple[str, str], bool] = {}
    for part in pieces:
        labels, ids = np.asarray(part.labels), np.asarray(part.sample_ids)
        for start in range(0, len(labels), SLICE):
            chosen = start + np.flatnonzero(labels[start : start + SLICE] != UNKNOWN)
            logs, own = log_softmax(np.asarray(part.logits[chosen])), labels[chosen]
            keys = [(part.split, sample_id) for sample_id in ids[chosen].tolist()]
            of_truth |= zip(keys, np.exp(logs[np.arange(len(own)), own]).tolist(), strict=True)
            hits |= zip(keys, (logs.argmax(axis=1) == own).tolist(), strict=True)
    return of_truth, hits


def _loss(of_truth: np.ndarray) -> float:
    return float(-np.log(np.clip(of_truth, SMALLEST_PROBABILITY, 1)).mean())


def without_temperature(data: ReportData) -> np.ndarray | None:
    """Probabilities (N, C) of the focus before its temperature; None where it carries none, or one cannot be undone."""
    temperature, share = data.record.get("temperature"), data.record.get("share_of_stacker")
    if data.answers is None or temperature in (None, 1.0) or share not in (None, 1.0):
        return None
    logs = np.log(np.clip(data.answers.probabilities.astype(np.float64), SMALLEST_PROBABILITY, 1))
    return softmax(logs * temperature)
