"""Rows of predictions: the outputs of one member on a split, and the aligned outputs of several members.

Rows are matched by (split, sample id) and columns by class name, never by position.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from utils.core.errors import UserError

logger = logging.getLogger("disease_pipeline")

UNKNOWN = -1  # label of a row of unknown class


@dataclass(frozen=True)
class MemberRows:
    """One member's outputs on rows of one split, in any order."""

    split: str
    classes: tuple[str, ...]
    sample_ids: np.ndarray
    """unicode (N,)"""
    labels: np.ndarray
    """int64 (N,), indices into `classes`, or UNKNOWN"""
    logits: np.ndarray
    """float32 (N, C)"""
    out_of_sample: np.ndarray
    """bool (N,): the network was not trained on the row"""
    embeddings: np.ndarray | None = None
    """float (N, D), the inputs of the network's last layer; None unless requested"""
    fold: np.ndarray | None = None
    """int64 (N,): the fold that each row was held out in; None for rows that are not out-of-fold"""

    def take(self, rows: np.ndarray) -> MemberRows:
        """Select rows by a mask (N,) or by indices."""
        return replace(
            self,
            sample_ids=self.sample_ids[rows],
            labels=self.labels[rows],
            logits=self.logits[rows],
            out_of_sample=self.out_of_sample[rows],
            embeddings=None if self.embeddings is None else self.embeddings[rows],
            fold=None if self.fold is None else self.fold[rows],
        )


@dataclass(frozen=True)
class Samples:
    """The samples of one split."""

    split: str
    sample_ids: tuple[str, ...]
    labels: np.ndarray
    """int64 (N,), indices into the classes, or UNKNOWN"""
    contents: tuple[str, ...] | None
    """SHA-256 of each image; None if there are no images"""


@dataclass(frozen=True)
class MemberOutputs:
    """The outputs of M members for N rows, for combiners that use embeddings; indexed like logits (M, N, C)."""

    logits: np.ndarray
    """float32 (M, N, C)"""
    embeddings: tuple[np.ndarray, ...]
    """M arrays float (N, D_m); the widths may differ"""

    @property
    def shape(self) -> tuple[int, ...]:
        """(M, N, C)"""
        return self.logits.shape

    def __getitem__(self, key: Any) -> MemberOutputs:
        """`outputs[members]` or `outputs[:, rows]`, with slices, masks or indices."""
        members, rows = key if isinstance(key, tuple) else (key, slice(None))
        indices = np.arange(len(self.embeddings))[members]
        return MemberOutputs(self.logits[members][:, rows], tuple(self.embeddings[index][rows] for index in indices))


@dataclass(frozen=True)
class Rows:
    """The outputs of M members on the N rows that all of them have; members and rows are sorted."""

    members: tuple[str, ...]
    classes: tuple[str, ...]
    split: np.ndarray
    """unicode (N,)"""
    sample_ids: np.ndarray
    """unicode (N,)"""
    labels: np.ndarray
    """int64 (N,), indices into `classes`; UNKNOWN if no member has the label"""
    logits: np.ndarray
    """float32 (M, N, C)"""
    out_of_sample: np.ndarray
    """bool (N,): out of sample for every member"""
    inference: str = "full"
    """Networks that predicted val and test: `full` (the full networks) or `folds` (the mean of the fold networks)"""
    embeddings: tuple[np.ndarray, ...] | None = None
    """M arrays float (N, D_m); None unless requested"""

    @property
    def outputs(self) -> np.ndarray | MemberOutputs:
        """The input of combiners: logits (M, N, C), or `MemberOutputs` if there are embeddings."""
        return self.logits if self.embeddings is None else MemberOutputs(self.logits, self.embeddings)

    def take(self, rows: np.ndarray) -> Rows:
        """Select rows by a mask (N,) or by indices."""
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
    """The samples of a split without images: the union of the samples of `parts`, {member: its rows of the split}.

    A label may come from any member that has it. Raises UserError for labels that disagree.
    """
    label_of: dict[str, int] = {}
    source_of: dict[str, str] = {}
    for member in sorted(parts):
        for part in parts[member]:
            labels = dict(zip(part.sample_ids.tolist(), part.labels.tolist(), strict=True))
            labelled = {key: label for key, label in labels.items() if label != UNKNOWN}
            differing = [key for key, label in labelled.items() if label_of.get(key, UNKNOWN) not in (UNKNOWN, label)]
            if differing:
                name = min(differing)
                source = source_of[name]
                raise UserError(
                    f"members {source} and {member}: {len(differing)} label(s) of {split} disagree, "
                    f"first {name}: {classes[label_of[name]]} for {source}, {classes[labels[name]]} for {member}"
                )
            label_of = labels | label_of | labelled
            source_of = dict.fromkeys(labelled, member) | source_of
    ids = tuple(sorted(label_of))
    return Samples(split, ids, np.array([label_of[key] for key in ids], dtype=np.int64), None)


def align(parts: Mapping[str, Sequence[MemberRows]], classes: tuple[str, ...]) -> Rows:
    """Align members: {member: its rows of one or more splits} -> the rows that all members have.

    Members are sorted by name, rows by (split, sample id), columns follow `classes`. A label may come from any member.
    Embeddings are included if every part has them. Omitted rows of a member are counted in a warning. Raises UserError
    for duplicate ids, other class sets, labels that disagree, logits that are not finite, or no common row.
    """
    members = tuple(sorted(parts))
    keyed = {member: _keyed(member, parts[member], classes) for member in members}
    common = set.intersection(*(set(rows) for rows, _, _ in keyed.values()))
    if not common:
        raise UserError(f"{', '.join(members)}: no row in common; were they run on the same split?")
    order = sorted(common)
    for member, (row_of, _, _) in keyed.items():
        left_out = len(row_of) - len(order)
        if left_out:
            logger.warning("%s: %d of %d rows are not shared by all members", member, left_out, len(row_of))
    logits = np.empty((len(members), len(order), len(classes)), dtype=np.float32)
    labels = np.empty((len(members), len(order)), dtype=np.int64)
    label = np.full(len(order), UNKNOWN)
    out_of_sample = np.ones(len(order), dtype=bool)
    has_embeddings = all(part.embeddings is not None for member_parts in parts.values() for part in member_parts)
    embeddings: list[np.ndarray] = []
    for index, member in enumerate(members):
        row_of, member_logits, (member_labels, member_out_of_sample) = keyed[member]
        rows = [row_of[key] for key in order]
        if has_embeddings:
            arrays = [part.embeddings for part in parts[member] if part.embeddings is not None]
            embeddings.append(np.concatenate(arrays)[rows])
        logits[index] = member_logits[rows]
        labels[index] = member_labels[rows]
        out_of_sample &= member_out_of_sample[rows]
        bad = np.flatnonzero(~np.isfinite(logits[index]).all(axis=1))
        if bad.size:
            raise UserError(f"member {member}: {bad.size} row(s) with NaN or infinity, first {order[bad[0]][1]}")
        differing = np.flatnonzero((labels[index] != label) & (labels[index] != UNKNOWN) & (label != UNKNOWN))
        if differing.size:
            source = members[int(np.argmax(labels[:index, differing[0]] != UNKNOWN))]
            raise UserError(
                f"members {source} and {member}: {differing.size} label(s) disagree, first {order[differing[0]][1]}"
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
        embeddings=tuple(embeddings) if has_embeddings else None,
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
        part_labels = np.asarray(part.labels)
        to_classes = np.array([classes.index(name) for name in part.classes])
        labels.append(np.where(part_labels == UNKNOWN, UNKNOWN, to_classes[part_labels]))
        out_of_sample.append(np.asarray(part.out_of_sample))
        keys += [(part.split, sample_id) for sample_id in part.sample_ids.tolist()]
    rows = {key: row for row, key in enumerate(keys)}
    if len(rows) < len(keys):
        repeated = next(key for key, count in Counter(keys).items() if count > 1)
        raise UserError(f"member {member}: the sample id {'/'.join(repeated)} occurs twice")
    return rows, np.concatenate(logits), (np.concatenate(labels), np.concatenate(out_of_sample))
