"""Data that the report computes from its sources: contributions of members, example images, undone temperatures.

Nothing is read or fitted. Missing records and keys are None, so that a report can be written of partial measurements.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

import numpy as np

from utils.core.display_text import format_count
from utils.core.errors import UserError
from utils.evaluation.leaderboard import HEADINGS
from utils.evaluation.report import example_images
from utils.evaluation.report.example_images import ExampleImage
from utils.evaluation.report.report_sources import ReportRecords, ReportSources
from utils.numeric import diversity
from utils.numeric.metrics import SMALLEST_PROBABILITY, log_softmax, softmax
from utils.numeric.uniform_mixture import without_uniform
from utils.predictions.rows import UNKNOWN, MemberRows

BLOCK = 4096  # rows at a time, whatever the number of classes
PEERS = ("best_single", "soft_voting")


@dataclass(frozen=True)
class Contributions:
    """Contributions of M members to their unweighted mean, on the out-of-sample rows that all of them share."""

    names: tuple[str, ...]
    rows: int
    accuracy: np.ndarray
    """(M,)"""
    log_loss: np.ndarray
    """(M,), nats"""
    only_correct: np.ndarray
    """int64 (M,): rows that only this member predicts correctly"""
    without: np.ndarray
    """(M,): increase of the log-loss of the mean when this member is left out; above 0 if the member helps"""
    mean_log_loss: float
    pairs: diversity.Diversity


@dataclass(frozen=True)
class ReportData(ReportRecords):
    """All data of the sections of a report."""

    peers: Mapping[str, str]
    """{best_single, soft_voting: name} of those that are evaluated and not the focus"""
    contributions: Contributions | None
    examples: Sequence[ExampleImage]
    notes: Sequence[str]
    """Sentences on what is not shown, and why"""

    @property
    def classes(self) -> tuple[str, ...]:
        """Names (C,) of the classes."""
        return self.catalog.classes

    @property
    def evaluated(self) -> Mapping[str, Any]:
        """Metrics of the focus."""
        return self.metrics[self.focus]

    @property
    def record(self) -> Mapping[str, Any]:
        """`ensemble.json` of the focus; empty for a member."""
        return self.records.get(self.focus, {})

    @property
    def counted_rows(self) -> str:
        """Text on the evaluated rows, such as `179 rows of test`."""
        return f"{format_count(self.evaluated['n_samples'], 'row')} of {self.split}"

    @property
    def ordered_by(self) -> str:
        """Heading of the metric that orders the ranking."""
        metric = str(self.ranking["order"][0])
        return HEADINGS.get(metric, metric)


def median_milliseconds(record: Mapping[str, Any], batch: str = "batch_1") -> float | None:
    """Return the median time of a batch from the metrics of a model; None if it is not measured."""
    time: float | None = ((record.get("latency_ms") or {}).get(batch) or {}).get("p50")
    return time


def busy_cores(record: Mapping[str, Any]) -> float | None:
    """Return the cores that other programs used while a model was timed; None if they did not interfere."""
    cores: float | None = (record.get("latency_ms") or {}).get("busy")
    return cores


def report_data(sources: ReportSources) -> ReportData:
    """Compute the data of the report that its records do not contain."""
    notes = list(sources.notes)
    contributions = None
    if sources.out_of_sample is not None and len(sources.members) > 1:
        try:
            contributions = member_contributions(sources.out_of_sample)
        except UserError as error:
            notes.append(f"The contribution of each member is not shown: {error}")
    try:
        examples = example_images.choose(
            sources.split,
            sources.focus,
            sources.member_rows or {},
            sources.predictions,
            sources.out_of_sample or {},
            sources.crossfit,
        )
    except UserError as error:
        examples = []
        notes.append(f"Single images are not shown: {error}")
    ranked_peers = sources.ranking.get("peers") or {}
    peers = {
        kind: ranked_peers[kind]
        for kind in PEERS
        if ranked_peers.get(kind) in sources.metrics and ranked_peers[kind] != sources.focus
    }
    shared = {field.name: getattr(sources, field.name) for field in fields(ReportRecords)}
    return ReportData(**shared, peers=peers, contributions=contributions, examples=examples, notes=notes)


def member_contributions(parts: Mapping[str, Sequence[MemberRows]]) -> Contributions:
    """Return the contribution of each member to the unweighted mean of all, on the labelled rows that all share.

    `parts` are {member: its out-of-sample rows}; only the probability of the true class of each row is kept. Raises
    UserError if the members have no row in common.
    """
    true_probabilities, hits = {}, {}
    for name, member_parts in parts.items():
        true_probabilities[name], hits[name] = _true_probabilities(member_parts)
    shared = sorted(set.intersection(*(set(rows) for rows in true_probabilities.values())))
    if not shared:
        raise UserError(f"{', '.join(parts)}: no labelled row on which all of them have out-of-sample predictions")
    names = tuple(parts)
    probabilities = np.array([[true_probabilities[name][key] for key in shared] for name in names])
    correct = np.array([[hits[name][key] for key in shared] for name in names])
    total = probabilities.sum(axis=0)
    mean = _log_loss(total / len(names))
    without = np.array([_log_loss((total - row) / max(1, len(names) - 1)) - mean for row in probabilities])
    return Contributions(
        names=names,
        rows=len(shared),
        accuracy=correct.mean(axis=1),
        log_loss=np.array([_log_loss(row) for row in probabilities]),
        only_correct=(correct & (correct.sum(axis=0) == 1)).sum(axis=1),
        without=without,
        mean_log_loss=mean,
        pairs=diversity.pairwise_diversity(correct),
    )


def _true_probabilities(
    parts: Sequence[MemberRows],
) -> tuple[dict[tuple[str, str], float], dict[tuple[str, str], bool]]:
    """Return {(split, id): probability of the true class} and {(split, id): whether it is predicted} of one member."""
    probabilities: dict[tuple[str, str], float] = {}
    hits: dict[tuple[str, str], bool] = {}
    for part in parts:
        labels, ids = np.asarray(part.labels), np.asarray(part.sample_ids)
        for start in range(0, len(labels), BLOCK):
            rows = start + np.flatnonzero(labels[start : start + BLOCK] != UNKNOWN)
            logs, truth = log_softmax(np.asarray(part.logits[rows])), labels[rows]
            keys = [(part.split, sample_id) for sample_id in ids[rows].tolist()]
            probabilities |= zip(keys, np.exp(logs[np.arange(len(truth)), truth]).tolist(), strict=True)
            hits |= zip(keys, (logs.argmax(axis=1) == truth).tolist(), strict=True)
    return probabilities, hits


def _log_loss(probabilities: np.ndarray) -> float:
    return float(-np.log(np.clip(probabilities, SMALLEST_PROBABILITY, 1)).mean())


def without_temperature(data: ReportData) -> np.ndarray | None:
    """Return probabilities (N, C) of the focus before its temperature; None if it has none or cannot be undone."""
    temperature, stacker_weight = data.record.get("temperature"), data.record.get("share_of_stacker")
    if data.predictions is None or temperature in (None, 1.0) or stacker_weight not in (None, 1.0):
        return None
    before = without_uniform(data.predictions.probabilities, data.record.get("uniform_weight", 0.0))
    return softmax(np.log(np.clip(before, SMALLEST_PROBABILITY, 1)) * temperature)
