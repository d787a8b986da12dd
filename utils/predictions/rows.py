"""Rows of predictions: what one member answers on a split, and several members brought together.

Rows are matched by (split, sample id) and columns by class name, never by position.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from utils.core.errors import UserError

logger = logging.getLogger("disease_pipeline")

UNKNOWN = -1  # the label of a row whose class nobody has said


@dataclass(frozen=True)
class MemberRows:
    """One member's outputs on rows of one split, in any order."""

    split: str
    classes: tuple[str, ...]
    sample_ids: np.ndarray
    """unicode (N,)"""
    labels: np.ndarray
    """int64 (N,), indices into `classes`; UNKNOWN where nobody has said it"""
    logits: np.ndarray
    """float32 (N, C)"""
    out_of_sample: np.ndarray
    """bool (N,): the network that answered has not seen the row"""
    embeddings: np.ndarray | None = None
    """float (N, D), what the network's last layer reads; None where they are not asked for"""


@dataclass(frozen=True)
class Samples:
    """The samples of one split."""

    split: str
    sample_ids: tuple[str, ...]
    labels: np.ndarray
    """int64 (N,); UNKNOWN where nobody has said it"""
    contents: tuple[str, ...] | None
    """SHA-256 of each image; None where there are no images"""


@dataclass(frozen=True)
class MemberOutputs:
    """What M members give for N rows, for combiners that read embeddings; indexed as logits (M, N, C) are."""

    logits: np.ndarray
    """float32 (M, N, C)"""
    embeddings: tuple[np.ndarray, ...]
    """M arrays float (N, D_m), each of a width of its own"""

    @property
    def shape(self) -> tuple[int, ...]:
        """(M, N, C)"""
        return self.logits.shape

    def __getitem__(self, key: Any) -> MemberOutputs:
        """`outputs[members]` or `outputs[:, rows]`, by slices, masks or places."""
        members, rows = key if isinstance(key, tuple) else (key, slice(None))
        places = np.arange(len(self.embeddings))[members]
        return MemberOutputs(self.logits[members][:, rows], tuple(self.embeddings[place][rows] for place in places))


@dataclass(frozen=True)
class Rows:
    """The outputs of M members on the N rows that all of them have, members and rows sorted, classes in one order."""

    members: tuple[str, ...]
    classes: tuple[str, ...]
    split: np.ndarray
    """unicode (N,)"""
    sample_ids: np.ndarray
    """unicode (N,)"""
    labels: np.ndarray
    """int64 (N,); UNKNOWN where no member says it"""
    logits: np.ndarray
    """float32 (M, N, C)"""
    out_of_sample: np.ndarray
    """bool (N,): out of sample for every member"""
    inference: str = "full"
    """What answered on val and test: the members' full networks, or the mean of their fold networks (`folds`)"""
    embeddings: tuple[np.ndarray, ...] | None = None
    """M arrays float (N, D_m); None where they were not asked for"""

    @property
    def outputs(self) -> np.ndarray | MemberOutputs:
        """What combiners get: logits and embeddings where these were asked for, else the logits alone."""
        return self.logits if self.embeddings is None else MemberOutputs(self.logits, self.embeddings)

    def take(self, rows: np.ndarray) -> Rows:
        """Some of the rows."""
        return replace(
            self,
            split=self.split[rows],
            sample_ids=self.sample_ids[rows],
            labels=self.labels[rows],
            logits=self.logits[:, rows],
            out_of_sample=self.out_of_sample[rows],
            embeddings=None if self.embeddings is None else tuple(part[rows] for part in self.embeddings),
        )


def collect_samples(split: str, classes: Sequence[str], parts: Mapping[str, Sequence[MemberRows]]) -> Samples:
    """Every sample that a member has a row of, where no images say which there are: {member: its rows of the split}.

    Labels come from whoever knows them. Raises UserError for labels that disagree.
    """
    label: dict[str, int] = {}
    giver: dict[str, str] = {}
    for member in sorted(parts):
        for part in parts[member]:
            own = dict(zip(part.sample_ids.tolist(), part.labels.tolist(), strict=True))
            known = {key: number for key, number in own.items() if number != UNKNOWN}
            differing = [key for key, number in known.items() if label.get(key, UNKNOWN) not in (UNKNOWN, number)]
            if differing:
                first = min(differing)
                raise UserError(
                    f"members {giver[first]} and {member}: {len(differing)} label(s) of {split} disagree, "
                    f"first {first}: {classes[label[first]]} for {giver[first]}, {classes[own[first]]} for {member}"
                )
            label = own | label | known
            giver = dict.fromkeys(known, member) | giver
    ids = tuple(sorted(label))
    return Samples(split, ids, np.array([label[key] for key in ids], dtype=np.int64), None)


def align(parts: Mapping[str, Sequence[MemberRows]], classes: tuple[str, ...]) -> Rows:
    """Bring members together: {member: its rows of one or more splits} -> the rows that all members have.

    Members are ordered by name, rows by (split, sample id), columns by `classes`; a label that one member does not know
    comes from another. Raises UserError for duplicate ids, other class sets, labels that disagree, logits that are not
    finite, or nothing in common; tells how many rows are left out. Embeddings come along where every part has them.
    """
    members = tuple(sorted(parts))
    keyed = {member: _keyed(member, parts[member], classes) for member in members}
    common = set.intersection(*(set(rows) for rows, _, _ in keyed.values()))
    if not common:
        raise UserError(f"{', '.join(members)}: no row in common; were they run on the same split?")
    order = sorted(common)
    for member, (rows, _, _) in keyed.items():
        if len(rows) > len(order):
            logger.warning("%s: %d of %d rows are not shared by all members", member, len(rows) - len(order), len(rows))
    logits = np.empty((len(members), len(order), len(classes)), dtype=np.float32)
    labels = np.empty((len(members), len(order)), dtype=np.int64)
    label = np.full(len(order), UNKNOWN)
    out_of_sample = np.ones(len(order), dtype=bool)
    embedded = all(part.embeddings is not None for given in parts.values() for part in given)
    embeddings: list[np.ndarray] = []
    for index, member in enumerate(members):
        rows, own_logits, facts = keyed[member]
        places = [rows[key] for key in order]
        if embedded:
            embeddings.append(np.concatenate([part.embeddings for part in parts[member]])[places])
        logits[index] = own_logits[places]
        labels[index], marks = facts[0][places], facts[1][places]
        out_of_sample &= marks
        bad = np.flatnonzero(~np.isfinite(logits[index]).all(axis=1))
        if bad.size:
            raise UserError(f"member {member}: {bad.size} row(s) with NaN or infinity, first {order[bad[0]][1]}")
        differing = np.flatnonzero((labels[index] != label) & (labels[index] != UNKNOWN) & (label != UNKNOWN))
        if differing.size:
            other = members[int(np.argmax(labels[:index, differing[0]] != UNKNOWN))]
            raise UserError(
                f"members {other} and {member}: {differing.size} label(s) disagree, first {order[differing[0]][1]}"
            )
        label = np.where(label == UNKNOWN, labels[index], label)
    return Rows(
        members=members,
        classes=classes,
        split=np.array([split for split, _ in order]),
        sample_ids=np.array([sample_id for _, sample_id in order]),
        labels=label,
        logits=logits,
        out_of_sample=out_of_sample,
        embeddings=tuple(embeddings) if embedded else None,
    )


def _keyed(
    member: str, parts: Sequence[MemberRows], classes: tuple[str, ...]
) -> tuple[dict[tuple[str, str], int], np.ndarray, tuple[np.ndarray, np.ndarray]]:
    """{(split, id): row}, logits and (labels, out_of_sample) of one member; columns in the order of `classes`."""
    logits, labels, out_of_sample = [], [], []
    keys: list[tuple[str, str]] = []
    for part in parts:
        if sorted(part.classes) != sorted(classes):
            raise UserError(f"member {member}: classes {', '.join(part.classes)}; expected {', '.join(classes)}")
        logits.append(np.asarray(part.logits)[:, [part.classes.index(name) for name in classes]])
        own = np.asarray(part.labels)
        labels.append(np.where(own == UNKNOWN, UNKNOWN, np.array([classes.index(name) for name in part.classes])[own]))
        out_of_sample.append(np.asarray(part.out_of_sample))
        keys += [(part.split, sample_id) for sample_id in part.sample_ids.tolist()]
    rows = {key: row for row, key in enumerate(keys)}
    if len(rows) < len(keys):
        seen: set[tuple[str, str]] = set()
        twice = next(key for key in keys if key in seen or seen.add(key))  # type: ignore[func-returns-value]
        raise UserError(f"member {member}: the sample id {'/'.join(twice)} occurs twice")
    return rows, np.concatenate(logits), (np.concatenate(labels), np.concatenate(out_of_sample))
