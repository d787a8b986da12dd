"""Members as prediction files give them: read and brought into the workspace's terms; nothing is written here."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import combinations
from pathlib import Path
from typing import TypeVar

import numpy as np

from utils.core.errors import UserError, did_you_mean
from utils.core.workspace import SPLITS
from utils.predictions import prediction_files
from utils.predictions.catalog import Problem
from utils.predictions.image_splits import ImageSplit
from utils.predictions.prediction_files import Predictions
from utils.predictions.rows import UNKNOWN, MemberRows, Samples

logger = logging.getLogger("disease_pipeline")

SPLIT_OF = {"oof": "train", "val": "val", "test": "test", "train": "train"}
"""What a member's folder may hold, and of which split it is; `train` is in-sample."""
SHARING_CODES = ("rows_not_shared", "same_ids")
"""Codes of what `sharing_problems` says."""
LAYOUT = "DIR/<member>/{oof,val,test}.npz"
MEND = "Mend the file, then import again"
T = TypeVar("T")


@dataclass(frozen=True)
class ImportedPart:
    """One file of a member in the workspace's terms: rows sorted by id, columns in the order of its classes."""

    rows: MemberRows
    kind: str
    """What the file held: logits, probabilities or half-precision probabilities."""
    fold: np.ndarray | None
    """int64 (N,)"""
    embeddings: np.ndarray | None
    """float32 (N, D)"""

    def take(self, places: np.ndarray, labels: np.ndarray) -> ImportedPart:
        """Some of the rows, with these labels."""
        rows, fold, embeddings = self.rows, self.fold, self.embeddings
        ids, logits, honest = rows.sample_ids[places], rows.logits[places], rows.out_of_sample[places]
        return ImportedPart(
            replace(rows, sample_ids=ids, labels=labels, logits=logits, out_of_sample=honest),
            self.kind,
            None if fold is None else fold[places],
            None if embeddings is None else embeddings[places],
        )


def apply_to_each(names: Iterable[str], step: Callable[[str], T]) -> dict[str, T]:
    """`step` of every name. Raises one UserError with all refusals, so that they can be mended at once."""
    done: dict[str, T] = {}
    refused = []
    for name in names:
        try:
            done[name] = step(name)
        except UserError as error:
            refused.append(str(error))
    if refused:
        raise UserError("\n".join(refused) + " (nothing was imported)")
    return done


# what the files say -------------------------------------------------------------------------------------------------


def read_folder(source: Path) -> dict[str, dict[str, Predictions]]:
    """{member: {oof, val, test, train: predictions}} of `source/<member>/*.npz`. Raises UserError, all refusals in one.

    Folders and files that are not part of the form are named and passed over.
    """
    if not source.is_dir():
        raise UserError(f"--from {source}: no such folder; expected {LAYOUT}")
    files = {}
    for folder in sorted(path for path in source.iterdir() if path.is_dir() and not path.name.startswith(".")):
        files[folder.name] = {path.stem: path for path in sorted(folder.glob("*.npz")) if path.stem in SPLIT_OF}
        for path in sorted(folder.glob("*.npz")):
            if path.stem not in SPLIT_OF:
                logger.warning("%s is passed over%s", path, did_you_mean(path.stem, SPLIT_OF))
        if not files[folder.name]:
            logger.warning("%s is passed over: none of %s.npz is in it", folder, ".npz, ".join(SPLIT_OF))
    found = {name: paths for name, paths in files.items() if paths}
    if not found:
        own = any((source / f"{stem}.npz").is_file() for stem in SPLIT_OF)
        hint = f"; these are one member's files, so give the folder above: --from {source.parent}" if own else ""
        raise UserError(f"--from {source}: no predictions; expected {LAYOUT}{hint}")
    return apply_to_each(found, lambda name: _read_member(name, found[name]))


def _read_member(name: str, files: Mapping[str, Path]) -> dict[str, Predictions]:
    if not {"oof", "val"} & files.keys():
        raise UserError(
            f"member {name}: neither oof.npz nor val.npz, so there is nothing to fit or choose on. Add one of them"
        )
    found = {}
    for stem, path in files.items():
        needs = ("fold",) if stem == "oof" else ()
        found[stem] = prediction_files.read(path, what=f"predictions of member {name}", remedy=MEND, needs=needs)
    widths = {part.embeddings.shape[1] for part in found.values() if part.embeddings is not None}
    if len(widths) > 1:
        shown = " and ".join(map(str, sorted(widths)))
        raise UserError(f"member {name}: embeddings of {shown} numbers; expected the same in all files. {MEND}")
    return found


# classes and samples ------------------------------------------------------------------------------------------------


def agree_on_classes(
    given: Mapping[str, Mapping[str, Predictions]], known: tuple[str, ...] | None, *, has_images: bool
) -> tuple[tuple[str, ...], list[Problem]]:
    """The order of the classes, and what is to be said of it.

    `known` are those of the images or of members that are there already. Without any, the names that most files have
    are sorted, and where no file has names the columns are called 0 to C-1. Raises UserError for files that differ.
    """
    files = {(name, stem): part for name, parts in given.items() for stem, part in parts.items()}
    if known is None:
        named = Counter(_ordered(part.classes) for part in files.values() if part.classes is not None)
        widest = max(part.logits.shape[1] for part in files.values())
        known = min(named, key=lambda names: (-named[names], names)) if named else tuple(map(str, range(widest)))

    def check(name: str) -> None:
        for stem, part in given[name].items():
            own, columns = part.classes, part.logits.shape[1]
            if own is not None and set(own) != set(known):
                raise UserError(f"member {name}: {stem}.npz has the classes {_shown(own)}; expected {_shown(known)}")
            if columns != len(known):
                raise UserError(
                    f"member {name}: {stem}.npz has {columns} columns and no `classes`; expected the {len(known)} "
                    f"classes {_shown(known)}"
                )

    apply_to_each(given, check)
    unnamed = sorted({name for (name, _), part in files.items() if part.classes is None})
    if has_images or not unnamed:
        return known, []
    message = f"no `classes` in the files of {', '.join(unnamed)}; their columns are taken to be {_shown(known)}"
    return known, [Problem("classes_unnamed", "warning", None, message, "write `classes` if that is not so")]


def _ordered(names: Iterable[str]) -> tuple[str, ...]:
    """Sorted, as class folders are; but the numbers from 0 on by their size, as columns without names are."""
    found = sorted(names)
    numbers = [str(number) for number in range(len(found))]
    return tuple(numbers if found == sorted(numbers) else found)


def _shown(classes: Sequence[str]) -> str:
    return ", ".join(classes[:20]) + (f" and {len(classes) - 20} more" if len(classes) > 20 else "")


def to_workspace_order(predictions: Predictions, stem: str, classes: tuple[str, ...]) -> ImportedPart:
    """Rows sorted by id, columns by the workspace's classes, labels as its numbers."""
    own = predictions.classes or classes
    rows = np.argsort(predictions.sample_ids, kind="stable")
    column = {name: place for place, name in enumerate(own)}
    columns = np.array([column[name] for name in classes])
    number = np.argsort(columns)  # of each of the file's columns in the workspace's order
    labels = predictions.labels[rows]
    return ImportedPart(
        MemberRows(
            split=SPLIT_OF[stem],
            classes=classes,
            sample_ids=predictions.sample_ids[rows],
            labels=np.where(labels == UNKNOWN, UNKNOWN, number[labels]),
            logits=np.ascontiguousarray(predictions.logits[rows][:, columns]),
            out_of_sample=np.full(len(rows), stem != "train"),
        ),
        predictions.kind,
        None if predictions.fold is None else predictions.fold[rows],
        None if predictions.embeddings is None else predictions.embeddings[rows],
    )


def match_images(
    name: str, parts: Mapping[str, ImportedPart], images: Mapping[str, ImageSplit]
) -> tuple[dict[str, ImportedPart], list[Problem]]:
    """A member's rows that are images of the splits, labelled by the class folders, and what is left out.

    Raises UserError for a file without such rows, or with labels that are not those of the folders.
    """
    fitted, problems = {}, []
    for stem, part in parts.items():
        fitted[stem], found = _on_images(name, stem, part, images[SPLIT_OF[stem]])
        problems += found
    return fitted, problems


def _on_images(name: str, stem: str, part: ImportedPart, images: ImageSplit) -> tuple[ImportedPart, list[Problem]]:
    ids, split = part.rows.sample_ids, images.split
    place = {sample_id: row for row, sample_id in enumerate(images.sample_ids)}
    places = np.array([place.get(sample_id, -1) for sample_id in ids.tolist()])
    kept = np.flatnonzero(places >= 0)
    if not kept.size:
        raise UserError(
            f"member {name}: {stem}.npz has nothing in common with the images of {split}; its first id is {ids[0]}, "
            f"the first image is {images.sample_ids[0]}. Ids are paths below the split's folder"
        )
    labels, own = images.labels[places[kept]], part.rows.labels[kept]
    wrong = np.flatnonzero((own != UNKNOWN) & (own != labels))
    if wrong.size:
        row, classes = wrong[0], part.rows.classes
        raise UserError(
            f"member {name}: {wrong.size} label(s) of {stem}.npz are not those of the class folders, first "
            f"{ids[kept[row]]}: {classes[own[row]]} instead of {classes[labels[row]]}. {MEND}"
        )
    problems = []
    for count, total, words in (
        (len(ids) - len(kept), len(ids), f"rows of {stem}.npz are no images of {split} and are left out"),
        (len(place) - len(kept), len(place), f"images of {split} are missing in {stem}.npz"),
    ):
        if count:
            problems.append(Problem("rows_left_out", "warning", name, f"{count} of {total} {words}", MEND))
    return part.take(kept, labels), problems


def match_samples(
    name: str, parts: Mapping[str, ImportedPart], samples: Mapping[str, Samples]
) -> tuple[dict[str, ImportedPart], list[Problem]]:
    """A member's rows with the labels that any member knows, and what is left out: train and val rows without one.

    Raises UserError for a file of which nothing is left.
    """
    fitted, problems = {}, []
    for stem, part in parts.items():
        fitted[stem], found = _on_samples(name, stem, part, samples[SPLIT_OF[stem]])
        problems += found
    return fitted, problems


def _on_samples(name: str, stem: str, part: ImportedPart, samples: Samples) -> tuple[ImportedPart, list[Problem]]:
    label = dict(zip(samples.sample_ids, samples.labels.tolist(), strict=True))
    labels = np.array([label[sample_id] for sample_id in part.rows.sample_ids.tolist()])
    kept = np.flatnonzero((labels != UNKNOWN) | (stem == "test"))
    if not kept.size:
        raise UserError(f"member {name}: no row of {stem}.npz has a label, in its file or another member's. {MEND}")
    problems = []
    if len(kept) < len(labels):
        message = f"{len(labels) - len(kept)} of {len(labels)} rows of {stem}.npz have no label and are left out"
        problems.append(Problem("unlabelled", "warning", name, message, MEND))
    elif UNKNOWN in labels:
        message = f"{int((labels == UNKNOWN).sum())} of {len(labels)} rows of {stem}.npz have no label"
        problems.append(Problem("unlabelled", "info", name, message, "they cannot be scored"))
    return part.take(kept, labels[kept]), problems


def require_rows_in_common(split: str, held: Mapping[str, Sequence[MemberRows]]) -> None:
    """UserError for a member that shares no honest row of a split with the others: {member: its rows}."""
    parts, holders = _honest(held)

    def check(name: str) -> None:
        ids = parts[name].sample_ids.tolist()
        if len(parts) > 1 and all(holders[sample_id] == 1 for sample_id in ids):
            others = next(part.sample_ids[0] for other, part in parts.items() if other != name)
            raise UserError(
                f"member {name}: no row of {split} in common with the other members; its first id is {ids[0]}, "
                f"another's {others}. {MEND}"
            )

    apply_to_each(parts, check)


def sharing_problems(
    held: Mapping[str, Mapping[str, Sequence[MemberRows]]], samples: Mapping[str, Samples]
) -> list[Problem]:
    """What is to be said of the splits where there are no images: {split: {member: its rows}}, {split: samples}."""
    problems = []
    for split in SPLITS:
        parts, holders = _honest(held[split])
        sizes = [len(part.sample_ids) for part in parts.values()]
        shared = sum(count == len(parts) for count in holders.values())
        if parts and shared < max(sizes):
            message = (
                f"the members have {min(sizes)} to {max(sizes)} rows of {split} and share {shared}, which are used"
            )
            remedy = "give the missing predictions if there are any"
            problems.append(Problem("rows_not_shared", "warning", None, message, remedy))
    return problems + _same_samples(samples)


def _honest(held: Mapping[str, Sequence[MemberRows]]) -> tuple[dict[str, MemberRows], Counter[str]]:
    """The honest rows of those who have some, and how many members have a row of each sample."""
    parts = {name: part for name, rows in held.items() for part in rows if part.out_of_sample.all()}
    return parts, Counter(sample_id for part in parts.values() for sample_id in part.sample_ids.tolist())


def _same_samples(samples: Mapping[str, Samples]) -> list[Problem]:
    """Ids that stand in two splits with the same labels throughout: perhaps the same samples; images would tell."""
    problems = []
    for one, other in combinations(SPLITS, 2):
        first, second = (
            dict(zip(samples[split].sample_ids, samples[split].labels.tolist(), strict=True)) for split in (one, other)
        )
        shared = first.keys() & second.keys()
        if shared and all(first[key] == second[key] for key in shared):
            message = f"{len(shared)} ids stand in {one} and in {other} with equal labels, such as {min(shared)}"
            remedy = (
                "Without images it cannot be told whether they are the same samples; give other ids if they are not"
            )
            problems.append(Problem("same_ids", "warning", None, message, remedy))
    return problems
