"""Reads prediction files of imported members and matches them with the workspace's samples and classes.

Writes nothing.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import combinations
from pathlib import Path
from typing import TypeVar

import numpy as np

from utils.core.array_archives import physical_memory
from utils.core.artifacts import array_headers
from utils.core.display_text import first_names
from utils.core.errors import UserError, did_you_mean
from utils.core.workspace import SPLITS
from utils.predictions import prediction_files
from utils.predictions.catalog import Problem
from utils.predictions.image_splits import ImageSplit
from utils.predictions.prediction_files import Predictions
from utils.predictions.rows import UNKNOWN, MemberRows, Samples

logger = logging.getLogger("disease_pipeline")

SPLIT_OF = {"oof": "train", "val": "val", "test": "test", "train": "train"}
"""{name of a file without suffix: split of its rows}; `train` holds in-sample rows."""
SHARING_CODES = ("rows_not_shared", "same_ids")
"""Codes of the problems that `sharing_problems` reports."""
LAYOUT = "DIR/<member>/{oof,val,test}.npz"
MOST_CLASSES = 20  # named in a message
MEND = "Mend the file, then import again"
T = TypeVar("T")


@dataclass(frozen=True)
class ImportedPart:
    """One file of a member: rows sorted by id, columns in the order of the workspace's classes."""

    rows: MemberRows
    kind: str
    """Contents of the file: logits, probabilities or half-precision probabilities."""
    fold: np.ndarray | None
    """int64 (N,), fold in which each row was held out"""
    embeddings: np.ndarray | None
    """float32 (N, D)"""

    def take(self, indices: np.ndarray, labels: np.ndarray) -> ImportedPart:
        """The rows at `indices`, with `labels` as labels."""
        rows, fold, embeddings = self.rows, self.fold, self.embeddings
        return ImportedPart(
            replace(
                rows,
                sample_ids=rows.sample_ids[indices],
                labels=labels,
                logits=rows.logits[indices],
                out_of_sample=rows.out_of_sample[indices],
            ),
            self.kind,
            None if fold is None else fold[indices],
            None if embeddings is None else embeddings[indices],
        )


def apply_to_each(names: Iterable[str], step: Callable[[str], T]) -> dict[str, T]:
    """{name: step(name)}. Raises one UserError with the messages of all failures."""
    results: dict[str, T] = {}
    refused = []
    for name in names:
        try:
            results[name] = step(name)
        except UserError as error:
            refused.append(str(error))
    if refused:
        raise UserError("\n".join(refused) + " (nothing was imported)")
    return results


# reading -------------------------------------------------------------------------------------------------


def read_folder(source: Path) -> dict[str, dict[str, Predictions]]:
    """{member: {oof, val, test, train: predictions}} of `source/<member>/*.npz`.

    Other folders and files are skipped with a warning. Raises one UserError for all invalid files.
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
    members = {name: paths for name, paths in files.items() if paths}
    if not members:
        is_member = any((source / f"{stem}.npz").is_file() for stem in SPLIT_OF)
        hint = f"; these are one member's files, so give the folder above: --from {source.parent}" if is_member else ""
        raise UserError(f"--from {source}: no predictions; expected {LAYOUT}{hint}")
    _require_memory(source, members)
    return apply_to_each(members, lambda name: _read_member(name, members[name]))


def _require_memory(source: Path, members: Mapping[str, Mapping[str, Path]]) -> None:
    """Raise UserError if all files, which are in memory at once, would need more than half of the machine's memory."""
    n_bytes = 0
    for path in (path for files in members.values() for path in files.values()):
        try:
            of_file = prediction_files.memory_needed(array_headers(path, remedy=MEND))
        except UserError:
            continue  # `_read_member` reports damaged and too large files
        n_bytes += of_file if of_file <= prediction_files.memory_limit() else 0
    limit = physical_memory() // 2
    if n_bytes > limit:
        raise UserError(
            f"--from {source}: the files of {len(members)} members take {n_bytes / 1e9:.1f} GB in memory at once, more "
            f"than {limit / 1e9:.1f} GB, half of this machine's. Import fewer members, or on a larger machine"
        )


def _read_member(name: str, files: Mapping[str, Path]) -> dict[str, Predictions]:
    if not {"oof", "val"} & files.keys():
        raise UserError(
            f"member {name}: neither oof.npz nor val.npz, so there is nothing to fit or choose on. Add one of them"
        )
    parts = {}
    for stem, path in files.items():
        needs = ("fold",) if stem == "oof" else ()
        parts[stem] = prediction_files.read(path, what=f"predictions of member {name}", remedy=MEND, needs=needs)
    widths = {part.embeddings.shape[1] for part in parts.values() if part.embeddings is not None}
    if len(widths) > 1:
        widths_text = " and ".join(map(str, sorted(widths)))
        raise UserError(f"member {name}: embeddings of {widths_text} numbers; expected the same in all files. {MEND}")
    return parts


# classes and samples ------------------------------------------------------------------------------------------------


def agree_on_classes(
    imports: Mapping[str, Mapping[str, Predictions]], classes: tuple[str, ...] | None, *, has_images: bool
) -> tuple[tuple[str, ...], list[Problem]]:
    """The ordered classes, and the problems with them.

    `classes` are those of the images or of existing members. If None, the names in most files are sorted; if no file
    has names, the columns are named 0 to C-1. Raises UserError for files with other classes.
    """
    files = {(name, stem): part for name, parts in imports.items() for stem, part in parts.items()}
    if classes is None:
        named = Counter(_ordered(part.classes) for part in files.values() if part.classes is not None)
        widest = max(part.logits.shape[1] for part in files.values())
        classes = min(named, key=lambda names: (-named[names], names)) if named else tuple(map(str, range(widest)))
    expected = classes

    def check(name: str) -> None:
        for stem, part in imports[name].items():
            names, columns = part.classes, part.logits.shape[1]
            if names is not None and set(names) != set(expected):
                raise UserError(
                    f"member {name}: {stem}.npz has the classes {first_names(names, MOST_CLASSES)}; "
                    f"expected {first_names(expected, MOST_CLASSES)}"
                )
            if columns != len(expected):
                raise UserError(
                    f"member {name}: {stem}.npz has {columns} columns and no `classes`; expected the {len(expected)} "
                    f"classes {first_names(expected, MOST_CLASSES)}"
                )

    apply_to_each(imports, check)
    unnamed = sorted({name for (name, _), part in files.items() if part.classes is None})
    if has_images or not unnamed:
        return expected, []
    columns = first_names(expected, MOST_CLASSES)
    message = f"no `classes` in the files of {first_names(unnamed, 6)}; their columns are taken to be {columns}"
    return expected, [Problem("classes_unnamed", "warning", None, message, "write `classes` if that is not so")]


def _ordered(names: Iterable[str]) -> tuple[str, ...]:
    """Sorted like class folders, except for the numbers 0 to C-1, which are sorted as numbers."""
    ordered = sorted(names)
    numbers = [str(number) for number in range(len(ordered))]
    return tuple(numbers if ordered == sorted(numbers) else ordered)


def to_workspace_order(predictions: Predictions, stem: str, classes: tuple[str, ...]) -> ImportedPart:
    """Rows sorted by id, columns and labels in the order of the workspace's classes."""
    rows = np.argsort(predictions.sample_ids, kind="stable")
    column_of = {name: index for index, name in enumerate(predictions.classes or classes)}
    columns = np.array([column_of[name] for name in classes])
    class_of = np.argsort(columns)  # class index of each column of the file
    labels = predictions.labels[rows]
    return ImportedPart(
        MemberRows(
            split=SPLIT_OF[stem],
            classes=classes,
            sample_ids=predictions.sample_ids[rows],
            labels=np.where(labels == UNKNOWN, UNKNOWN, class_of[labels]),
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
    """A member's rows of images in the splits, labelled by the class folders, and problems with the other rows.

    Raises UserError for a file without such rows, or with labels that differ from the class folders.
    """
    matched, problems = {}, []
    for stem, part in parts.items():
        matched[stem], part_problems = _match_images(name, stem, part, images[SPLIT_OF[stem]])
        problems += part_problems
    return matched, problems


def _match_images(name: str, stem: str, part: ImportedPart, images: ImageSplit) -> tuple[ImportedPart, list[Problem]]:
    ids, split = part.rows.sample_ids, images.split
    image_of = {sample_id: row for row, sample_id in enumerate(images.sample_ids)}
    image_rows = np.array([image_of.get(sample_id, -1) for sample_id in ids.tolist()])
    matched = np.flatnonzero(image_rows >= 0)
    if not matched.size:
        raise UserError(
            f"member {name}: {stem}.npz has nothing in common with the images of {split}; its first id is {ids[0]}, "
            f"the first image is {images.sample_ids[0]}. Ids are paths below the split's folder"
        )
    labels, file_labels = images.labels[image_rows[matched]], part.rows.labels[matched]
    mismatches = np.flatnonzero((file_labels != UNKNOWN) & (file_labels != labels))
    if mismatches.size:
        row, classes = mismatches[0], part.rows.classes
        raise UserError(
            f"member {name}: {mismatches.size} label(s) of {stem}.npz are not those of the class folders, first "
            f"{ids[matched[row]]}: {classes[file_labels[row]]} instead of {classes[labels[row]]}. {MEND}"
        )
    problems = []
    for count, total, words in (
        (len(ids) - len(matched), len(ids), f"rows of {stem}.npz are no images of {split} and are left out"),
        (len(image_of) - len(matched), len(image_of), f"images of {split} are missing in {stem}.npz"),
    ):
        if count:
            problems.append(Problem("rows_left_out", "warning", name, f"{count} of {total} {words}", MEND))
    return part.take(matched, labels), problems


def match_samples(
    name: str, parts: Mapping[str, ImportedPart], samples: Mapping[str, Samples]
) -> tuple[dict[str, ImportedPart], list[Problem]]:
    """A member's rows with labels from any member, and problems with the train and val rows without a label.

    Raises UserError for a file without labelled rows.
    """
    matched, problems = {}, []
    for stem, part in parts.items():
        matched[stem], part_problems = _match_samples(name, stem, part, samples[SPLIT_OF[stem]])
        problems += part_problems
    return matched, problems


def _match_samples(name: str, stem: str, part: ImportedPart, samples: Samples) -> tuple[ImportedPart, list[Problem]]:
    label_of = dict(zip(samples.sample_ids, samples.labels.tolist(), strict=True))
    labels = np.array([label_of[sample_id] for sample_id in part.rows.sample_ids.tolist()])
    used_rows = np.flatnonzero((labels != UNKNOWN) | (stem == "test"))
    if not used_rows.size:
        raise UserError(f"member {name}: no row of {stem}.npz has a label, in its file or another member's. {MEND}")
    problems = []
    if len(used_rows) < len(labels):
        message = f"{len(labels) - len(used_rows)} of {len(labels)} rows of {stem}.npz have no label and are left out"
        problems.append(Problem("unlabelled", "warning", name, message, MEND))
    elif UNKNOWN in labels:
        message = f"{int((labels == UNKNOWN).sum())} of {len(labels)} rows of {stem}.npz have no label"
        problems.append(Problem("unlabelled", "info", name, message, "they cannot be scored"))
    return part.take(used_rows, labels[used_rows]), problems


def require_rows_in_common(split: str, rows_of_members: Mapping[str, Sequence[MemberRows]]) -> None:
    """Raise UserError for a member that shares no out-of-sample row of a split with the others, {member: its rows}."""
    parts, n_members = _out_of_sample(rows_of_members)

    def check(name: str) -> None:
        ids = parts[name].sample_ids.tolist()
        if len(parts) > 1 and all(n_members[sample_id] == 1 for sample_id in ids):
            other_id = next(part.sample_ids[0] for other, part in parts.items() if other != name)
            raise UserError(
                f"member {name}: no row of {split} in common with the other members; its first id is {ids[0]}, "
                f"another's {other_id}. {MEND}"
            )

    apply_to_each(parts, check)


def sharing_problems(
    rows_of_splits: Mapping[str, Mapping[str, Sequence[MemberRows]]], samples: Mapping[str, Samples]
) -> list[Problem]:
    """Problems with the splits if there are no images; `rows_of_splits` is {split: {member: its rows}}."""
    problems = []
    for split in SPLITS:
        parts, n_members = _out_of_sample(rows_of_splits[split])
        sizes = [len(part.sample_ids) for part in parts.values()]
        shared = sum(count == len(parts) for count in n_members.values())
        if parts and shared < max(sizes):
            message = (
                f"the members have {min(sizes)} to {max(sizes)} rows of {split} and share {shared}, which are used"
            )
            remedy = "give the missing predictions if there are any"
            problems.append(Problem("rows_not_shared", "warning", None, message, remedy))
    return problems + _same_samples(samples)


def _out_of_sample(rows_of_members: Mapping[str, Sequence[MemberRows]]) -> tuple[dict[str, MemberRows], Counter[str]]:
    """The out-of-sample rows of the members that have any, and the number of members with a row of each sample."""
    parts = {name: part for name, rows in rows_of_members.items() for part in rows if part.out_of_sample.all()}
    return parts, Counter(sample_id for part in parts.values() for sample_id in part.sample_ids.tolist())


def _same_samples(samples: Mapping[str, Samples]) -> list[Problem]:
    """A warning for ids that are in two splits with equal labels: without images they may be the same samples."""
    problems = []
    for pair in combinations(SPLITS, 2):
        first, second = (
            dict(zip(samples[split].sample_ids, samples[split].labels.tolist(), strict=True)) for split in pair
        )
        shared = first.keys() & second.keys()
        if shared and all(first[key] == second[key] for key in shared):
            message = f"{len(shared)} ids are in {pair[0]} and in {pair[1]} with equal labels, such as {min(shared)}"
            remedy = "Without images it is unknown whether they are the same samples; give other ids if they are not"
            problems.append(Problem("same_ids", "warning", None, message, remedy))
    return problems
