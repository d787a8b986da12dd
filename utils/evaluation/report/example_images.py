"""Images worth inspecting: confident errors, images on which members disagree, and labels that are likely wrong.

The first two kinds are from the evaluated split. The third is from out-of-sample rows, predicted by models that were
not fitted on the row's label (confident learning: Northcutt, Jiang and Chuang 2021).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from utils.building.ensembles import Crossfit
from utils.core.errors import UserError
from utils.numeric import diversity
from utils.numeric.metrics import softmax
from utils.predictions.rows import UNKNOWN, MemberRows

MAX_EXAMPLES = 20
QUOTAS = {"wrong": 8, "disagreement": 6, "mislabelled": 6}
SURE = 0.5
"""Probability above which a member's predicted class counts: no other class can have as high a probability."""
BLOCK = 4096  # rows at a time, whatever the number of classes


@dataclass(frozen=True)
class LabelledPredictions:
    """Predictions of one member or ensemble on labelled rows."""

    sample_ids: np.ndarray
    """unicode (N,)"""
    labels: np.ndarray
    """int64 (N,)"""
    probabilities: np.ndarray
    """(N, C)"""

    @classmethod
    def of_member(cls, rows: MemberRows, sample_ids: np.ndarray | None = None) -> LabelledPredictions:
        """Return a member's labelled rows; with `sample_ids`, only those with one of these ids."""
        selected = np.asarray(rows.labels) != UNKNOWN
        if sample_ids is not None:
            selected &= np.isin(rows.sample_ids, sample_ids)
        indices = np.flatnonzero(selected)
        probabilities = softmax(np.asarray(rows.logits[indices]))
        return cls(np.asarray(rows.sample_ids)[indices], np.asarray(rows.labels)[indices], probabilities)


@dataclass(frozen=True)
class MemberPrediction:
    """The class that one member predicts for an image."""

    member: str
    predicted: int
    probability: float


@dataclass(frozen=True)
class ExampleImage:
    """One image that is worth inspecting."""

    kind: str
    """wrong, disagreement or mislabelled"""
    split: str
    sample_id: str
    label: int
    predicted: int
    """The model's most probable class"""
    probability: float
    """Of that class"""
    label_probability: float
    """The model's probability of the labelled class"""
    disagreement: float | None
    """Mutual information between the prediction and the member that makes it, in nats"""
    member_predictions: tuple[MemberPrediction, ...] = field(default=())


def choose(
    split: str,
    focus: str,
    member_rows: Mapping[str, MemberRows],
    predictions: LabelledPredictions | None,
    out_of_sample: Mapping[str, Sequence[MemberRows]],
    crossfit: Crossfit | None,
    count: int = MAX_EXAMPLES,
) -> list[ExampleImage]:
    """Select up to `count` images; each kind has a quota, and unused quota goes to the other kinds.

    `focus` is the model of the report and `predictions` are its predictions on the evaluated rows. `member_rows` are
    {member: its rows of the split}, `out_of_sample` {member: its out-of-sample rows}, and `crossfit` the cross-fitted
    predictions if the focus is an ensemble. Raises UserError if an evaluated row is missing among a member's rows.
    """
    ordered: dict[str, list[ExampleImage]] = {kind: [] for kind in QUOTAS}
    if predictions is not None:
        disagreement = mutual_information(member_rows, predictions.sample_ids)
        ordered["wrong"] = confident_errors(split, predictions, disagreement, count)
        shown = {item.sample_id for item in ordered["wrong"][: QUOTAS["wrong"]]}
        disputed = is_disputed(member_rows, predictions.sample_ids)
        ordered["disagreement"] = disagreements(split, predictions, disagreement, disputed, count, shown)
    ordered["mislabelled"] = _likely_mislabelled(_out_of_sample_predictions(focus, out_of_sample, crossfit), count)
    examples = apply_quotas(ordered, count)
    parts = {name: {part.split: part for part in rows} for name, rows in out_of_sample.items()}
    for name, rows in member_rows.items():
        parts.setdefault(name, {})[split] = rows
    return [_with_members(item, parts) for item in examples]


def apply_quotas(ordered: Mapping[str, Sequence[ExampleImage]], count: int) -> list[ExampleImage]:
    """Return the first images of each kind within its quota; unused quota goes to the next kinds."""
    counts = {kind: min(len(ordered[kind]), quota * count // MAX_EXAMPLES) for kind, quota in QUOTAS.items()}
    for kind, items in ordered.items():
        counts[kind] += min(len(items) - counts[kind], count - sum(counts.values()))
    return [item for kind, items in ordered.items() for item in items[: counts[kind]]]


def confident_errors(
    split: str, predictions: LabelledPredictions, disagreement: np.ndarray | None, count: int
) -> list[ExampleImage]:
    """Return rows whose predicted class is not the label, the most confident first."""
    confidence = predictions.probabilities.max(axis=1)
    wrong = np.flatnonzero(predictions.probabilities.argmax(axis=1) != predictions.labels)
    order = sorted(wrong.tolist(), key=lambda row: (-confidence[row], str(predictions.sample_ids[row])))
    return [_example("wrong", split, predictions, row, disagreement) for row in order[:count]]


def disagreements(
    split: str,
    predictions: LabelledPredictions,
    disagreement: np.ndarray | None,
    disputed: np.ndarray,
    count: int,
    shown: Iterable[str],
) -> list[ExampleImage]:
    """Return the `disputed` rows (N,) with the largest `disagreement` (N,), except those that are already `shown`."""
    if disagreement is None:
        return []
    rows = np.flatnonzero(disputed & ~np.isin(predictions.sample_ids, list(shown)))
    order = sorted(rows.tolist(), key=lambda row: (-disagreement[row], str(predictions.sample_ids[row])))
    return [_example("disagreement", split, predictions, row, disagreement) for row in order[:count]]


def is_disputed(member_rows: Mapping[str, MemberRows], sample_ids: np.ndarray) -> np.ndarray:
    """Return whether two members give different classes a probability above `SURE`, bool (N,)."""
    indices = {name: np.asarray(_row_indices(part, sample_ids)) for name, part in member_rows.items()}
    disputed = np.zeros(len(sample_ids), dtype=bool)
    for start in range(0, len(sample_ids), BLOCK):
        block = slice(start, start + BLOCK)
        first_class = np.full(len(sample_ids[block]), UNKNOWN)
        for name, part in member_rows.items():
            probabilities = softmax(np.asarray(part.logits[indices[name][block]]))
            classes, is_confident = probabilities.argmax(axis=1), probabilities.max(axis=1) > SURE
            disputed[block] |= is_confident & (first_class != UNKNOWN) & (first_class != classes)
            first_class = np.where(is_confident & (first_class == UNKNOWN), classes, first_class)
    return disputed


def mutual_information(member_rows: Mapping[str, MemberRows], sample_ids: np.ndarray) -> np.ndarray | None:
    """Return the disagreement (N,) of the members on the given rows, in nats; None for fewer than two members."""
    if len(member_rows) < 2:
        return None
    indices = {name: np.asarray(_row_indices(part, sample_ids)) for name, part in member_rows.items()}
    information = np.empty(len(sample_ids))
    for start in range(0, len(sample_ids), BLOCK):
        block = slice(start, start + BLOCK)
        logits = (np.asarray(part.logits[indices[name][block]]) for name, part in member_rows.items())
        information[block] = diversity.mutual_information(softmax(member_logits) for member_logits in logits)
    return information


def _row_indices(part: MemberRows, sample_ids: np.ndarray) -> list[int]:
    index = {sample_id: row for row, sample_id in enumerate(np.asarray(part.sample_ids).tolist())}
    missing = [sample_id for sample_id in sample_ids.tolist() if sample_id not in index]
    if missing:
        raise UserError(f"{part.split}: {len(missing)} evaluated row(s) are not stored, first {missing[0]}")
    return [index[sample_id] for sample_id in sample_ids.tolist()]


def _example(
    kind: str, split: str, predictions: LabelledPredictions, row: int, disagreement: np.ndarray | None = None
) -> ExampleImage:
    probabilities, label = predictions.probabilities[row], int(predictions.labels[row])
    predicted = int(probabilities.argmax())
    return ExampleImage(
        kind=kind,
        split=split,
        sample_id=str(predictions.sample_ids[row]),
        label=label,
        predicted=predicted,
        probability=float(probabilities[predicted]),
        label_probability=float(probabilities[label]),
        disagreement=None if disagreement is None else float(disagreement[row]),
    )


def _out_of_sample_predictions(
    focus: str, out_of_sample: Mapping[str, Sequence[MemberRows]], crossfit: Crossfit | None
) -> list[tuple[str, LabelledPredictions]]:
    """Return (split, predictions) of the focus on out-of-sample rows."""
    if crossfit is None:
        return [(part.split, LabelledPredictions.of_member(part)) for part in out_of_sample.get(focus, ())]
    parts = []
    for split in np.unique(crossfit.split):
        rows = np.flatnonzero((crossfit.split == split) & (crossfit.labels != UNKNOWN))
        predictions = LabelledPredictions(
            crossfit.sample_ids[rows], crossfit.labels[rows], crossfit.probabilities[rows]
        )
        parts.append((str(split), predictions))
    return parts


def _likely_mislabelled(parts: Sequence[tuple[str, LabelledPredictions]], count: int) -> list[ExampleImage]:
    """Return rows whose predicted class is not the label, by the difference of both probabilities, largest first."""
    items = []
    for split, predictions in parts:
        probabilities, labels = predictions.probabilities, predictions.labels
        margin = probabilities.max(axis=1) - probabilities[np.arange(len(labels)), labels]
        rows = np.flatnonzero(margin > 0).tolist()
        order = sorted(rows, key=lambda row: (-margin[row], str(predictions.sample_ids[row])))
        items += [_example("mislabelled", split, predictions, row) for row in order[:count]]
    return sorted(items, key=lambda item: (item.label_probability - item.probability, item.split, item.sample_id))[
        :count
    ]


def _with_members(item: ExampleImage, parts: Mapping[str, Mapping[str, MemberRows]]) -> ExampleImage:
    predictions = []
    for name, by_split in parts.items():
        part = by_split.get(item.split)
        if part is None:
            continue
        rows = np.flatnonzero(np.asarray(part.sample_ids) == item.sample_id)
        if len(rows):
            probabilities = softmax(np.asarray(part.logits[int(rows[0])])[None])[0]
            predicted = int(probabilities.argmax())
            predictions.append(MemberPrediction(name, predicted, float(probabilities[predicted])))
    return replace(item, member_predictions=tuple(predictions))
