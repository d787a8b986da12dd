"""The most instructive images: where an ensemble is surely wrong, where members disagree, where a label looks wrong.

The first two come from the evaluated split; the third from honest rows, whose answers come from copies that read no
label of the row's fold (the idea of confident learning: Northcutt, Jiang and Chuang 2021).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from utils.building import ensembles
from utils.core.errors import UserError
from utils.numeric import diversity
from utils.numeric.metrics import softmax
from utils.predictions import fold_networks
from utils.predictions.catalog import Member
from utils.predictions.rows import UNKNOWN, MemberRows
from utils.predictions.store import Store

MOST = 20
SHARES = {"wrong": 8, "disputed": 6, "mislabelled": 6}
SLICE = 4096  # rows at a time, whatever the number of classes


@dataclass(frozen=True)
class Answers:
    """What one member or ensemble answers on labelled rows."""

    sample_ids: np.ndarray
    """unicode (N,)"""
    labels: np.ndarray
    """int64 (N,)"""
    probabilities: np.ndarray
    """(N, C)"""

    @classmethod
    def of_member(cls, rows: MemberRows, among: np.ndarray | None = None) -> Answers:
        """A member's rows that have a label; of them those whose ids are `among` the given ones."""
        kept = np.asarray(rows.labels) != UNKNOWN
        if among is not None:
            kept &= np.isin(rows.sample_ids, among)
        chosen = np.flatnonzero(kept)
        probabilities = softmax(np.asarray(rows.logits[chosen]))
        return cls(np.asarray(rows.sample_ids)[chosen], np.asarray(rows.labels)[chosen], probabilities)


@dataclass(frozen=True)
class Said:
    """What one member answers for an image."""

    member: str
    answer: int
    probability: float


@dataclass(frozen=True)
class Instructive:
    """One image that is worth a look."""

    kind: str
    """wrong, disputed or mislabelled"""
    split: str
    sample_id: str
    label: int
    answer: int
    """The ensemble's most probable class."""
    probability: float
    """Of that class."""
    of_label: float
    """The ensemble's probability of the class that the label says."""
    disagreement: float | None
    """Mutual information between the answer and the member that gives it, in nats."""
    said: tuple[Said, ...] = field(default=())


def choose(
    store: Store,
    split: str,
    focus: str,
    members: Sequence[Member],
    inference: str,
    answers: Answers | None,
    most: int = MOST,
) -> list[Instructive]:
    """Up to `most` images; each kind has its share, and what one kind leaves goes to the others.

    `answers` are those of the focus, a member or an ensemble of these members, on the evaluated rows.
    """
    rows = {member.name: fold_networks.rows(store, member, split, inference) for member in members}
    found: dict[str, list[Instructive]] = {kind: [] for kind in SHARES}
    if answers is not None:
        disagreement = mutual_information(rows, answers.sample_ids)
        found["wrong"] = surely_wrong(split, answers, disagreement, most)
        taken = {item.sample_id for item in found["wrong"][: SHARES["wrong"]]}
        found["disputed"] = disputed(split, answers, disagreement, most, taken)
    honest = store.out_of_sample_parts(members)
    found["mislabelled"] = _mislabelled(store, focus, honest, most)
    chosen = shared_out(found, most)
    outputs = {name: {part.split: part for part in parts} for name, parts in honest.items()}
    for name in rows:
        outputs[name][split] = rows[name]
    return [_with_members(item, outputs) for item in chosen]


def shared_out(found: Mapping[str, Sequence[Instructive]], most: int) -> list[Instructive]:
    """The first of each kind by its share; places that a kind leaves go to the next of the others."""
    count = {kind: min(len(found[kind]), share * most // MOST) for kind, share in SHARES.items()}
    for kind, items in found.items():
        count[kind] += min(len(items) - count[kind], most - sum(count.values()))
    return [item for kind, items in found.items() for item in items[: count[kind]]]


def surely_wrong(split: str, answers: Answers, disagreement: np.ndarray | None, most: int) -> list[Instructive]:
    """Rows with another answer than their label, the surest first."""
    top = answers.probabilities.max(axis=1)
    wrong = np.flatnonzero(answers.probabilities.argmax(axis=1) != answers.labels)
    order = sorted(wrong.tolist(), key=lambda row: (-top[row], str(answers.sample_ids[row])))
    return [_item("wrong", split, answers, row, disagreement) for row in order[:most]]


def disputed(
    split: str, answers: Answers, disagreement: np.ndarray | None, most: int, taken: Iterable[str]
) -> list[Instructive]:
    """Rows on which members disagree most, less those that are shown already; none where they all agree."""
    if disagreement is None:
        return []
    left = np.flatnonzero((disagreement > 1e-6) & ~np.isin(answers.sample_ids, list(taken)))
    order = sorted(left.tolist(), key=lambda row: (-disagreement[row], str(answers.sample_ids[row])))
    return [_item("disputed", split, answers, row, disagreement) for row in order[:most]]


def mutual_information(rows: Mapping[str, MemberRows], sample_ids: np.ndarray) -> np.ndarray | None:
    """How much members disagree on the given rows, in nats (N,); None for fewer than two members."""
    if len(rows) < 2:
        return None
    places = {name: _places(part, sample_ids) for name, part in rows.items()}
    found = np.empty(len(sample_ids))
    for start in range(0, len(sample_ids), SLICE):
        part = slice(start, start + SLICE)
        logits = (np.asarray(own.logits[np.asarray(places[name][part])]) for name, own in rows.items())
        found[part] = diversity.mutual_information(softmax(own) for own in logits)
    return found


def _places(part: MemberRows, sample_ids: np.ndarray) -> list[int]:
    place = {sample_id: row for row, sample_id in enumerate(np.asarray(part.sample_ids).tolist())}
    missing = [sample_id for sample_id in sample_ids.tolist() if sample_id not in place]
    if missing:
        raise UserError(f"{part.split}: {len(missing)} evaluated row(s) are not stored, first {missing[0]}")
    return [place[sample_id] for sample_id in sample_ids.tolist()]


def _item(kind: str, split: str, answers: Answers, row: int, disagreement: np.ndarray | None = None) -> Instructive:
    probabilities, label = answers.probabilities[row], int(answers.labels[row])
    answer = int(probabilities.argmax())
    return Instructive(
        kind=kind,
        split=split,
        sample_id=str(answers.sample_ids[row]),
        label=label,
        answer=answer,
        probability=float(probabilities[answer]),
        of_label=float(probabilities[label]),
        disagreement=None if disagreement is None else float(disagreement[row]),
    )


def _mislabelled(store: Store, focus: str, honest: Mapping[str, Sequence[MemberRows]], most: int) -> list[Instructive]:
    """Honest rows whose answer is another class than the label, the widest gap between the two first."""
    parts: list[tuple[str, Answers]] = []
    if store.workspace.ensemble(focus).joinpath("crossfit.npz").is_file():
        unseen = ensembles.load_crossfit(store.workspace, focus)
        for split in np.unique(unseen.split):
            rows = np.flatnonzero((unseen.split == split) & (unseen.labels != UNKNOWN))
            own = Answers(unseen.sample_ids[rows], unseen.labels[rows], unseen.probabilities[rows])
            parts.append((str(split), own))
    elif focus in honest:
        parts = [(part.split, Answers.of_member(part)) for part in honest[focus]]
    items = []
    for split, own in parts:
        gap = own.probabilities.max(axis=1) - own.probabilities[np.arange(len(own.labels)), own.labels]
        order = sorted(np.flatnonzero(gap > 0).tolist(), key=lambda row: (-gap[row], str(own.sample_ids[row])))
        items += [_item("mislabelled", split, own, row) for row in order[:most]]
    return sorted(items, key=lambda item: (item.of_label - item.probability, item.split, item.sample_id))[:most]


def _with_members(item: Instructive, outputs: Mapping[str, Mapping[str, MemberRows]]) -> Instructive:
    said = []
    for name, parts in outputs.items():
        part = parts.get(item.split)
        place = np.flatnonzero(np.asarray(part.sample_ids) == item.sample_id) if part is not None else ()
        if part is not None and len(place):
            probabilities = softmax(np.asarray(part.logits[int(place[0])])[None])[0]
            answer = int(probabilities.argmax())
            said.append(Said(name, answer, float(probabilities[answer])))
    return replace(item, said=tuple(said))
