"""Splits the images once: stratified, seeded, with groups and equal contents kept together, and recorded.

Existing splits of the images are kept. `split_dataset/split_manifest.json` records the images and their splits. A later
run with other images raises an error instead of reusing the split.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from config.settings import GROUP_REGEX, IMAGE_CACHE_DIR, IMG_SIZE, RAW_DIR, SEED, SPLIT_DIR
from utils import logger
from utils.files import read_json, write_json
from utils.image_cache import UnreadableImages, open_images
from utils.image_sets import CLASS_FOLDERS, ImageSet, open_image_set
from utils.image_sets import MANIFEST as MANIFEST_LAYOUT
from utils.resizing import evaluation_resizing
from utils.samples import (
    MANIFEST,
    RECORD,
    SUFFIXES,
    Sample,
    class_folders,
    content_digests,
    digest_of_contents,
    group_indices,
    scan,
    stratified_bins,
)

SPLITS = ("train", "val", "test")
FIRST_SUFFIXES = [".jpg", ".jpeg", ".png", ".bmp"]  # image suffixes of splits that do not record them


class SplitError(ValueError):
    """The raw images cannot be split, or the existing split does not match them; the message names the remedy."""


def prepare_optimized_datasets(
    raw_dir: Path | None = None,
    split_dir: Path | None = None,
    train_ratio: float = 0.8,
    val_ratio: float = 0.1,
    test_ratio: float = 0.1,
    seed: int = SEED,
    *,
    progress: Callable[[int, int], None] | None = None,
) -> None:
    """Split the images of `raw_dir` into `split_dir/{train,val,test}/<class>/`, atomically, each image once.

    `raw_dir` is a folder of class folders, whose images are copied, or a folder with splits or a CSV manifest, whose
    images are linked. Its splits are kept; a missing val or test is made from train. Returns at once if a split of the
    same images exists. Unreadable images are omitted, logged and recorded. Raises FileNotFoundError if `raw_dir` does
    not exist, `SplitError` (a ValueError) for fewer than two classes, an empty class, a class too small for three
    splits, or a split made from other images.
    """
    raw_dir, split_dir = Path(raw_dir or RAW_DIR), Path(split_dir or SPLIT_DIR)
    ratios = (train_ratio, val_ratio, test_ratio)
    if min(ratios) <= 0 or abs(sum(ratios) - 1) > 1e-6:
        raise SplitError(f"ratios {ratios}: expected three fractions above 0 that sum to 1")
    if split_dir.is_dir() and any(split_dir.iterdir()):
        _check_existing(raw_dir, split_dir)
        return
    images = _open(raw_dir)
    _check_sizes(images, _groups(images.samples, images.names), raw_dir)  # checked before anything is written
    digests = content_digests(images.named_samples())
    _check_labels(images, digests, raw_dir)
    readable, left_out = _readable(images, digests, progress)
    contents = [digests[name][2] for name in readable.names]
    groups = _groups(readable.samples, contents)
    _check_sizes(readable, groups, raw_dir)
    for note in images.notes:
        logger.warning("split: %s", note)
    _warn_of_shared_groups(readable, groups)
    split_of = _assign_splits(readable, groups, ratios, seed)
    manifest = {
        "schema": 1,
        "raw_dir": str(raw_dir),
        "layout": images.layout,
        "suffixes": list(SUFFIXES),
        "raw_digest": digest_of_contents({name: entry[2] for name, entry in digests.items()}),
        "raw_files": digests,
        "seed": seed,
        "ratios": list(ratios),
        "group_regex": GROUP_REGEX,
        "classes": images.classes,
        "left_out": [{"path": path, "reason": reason} for path, reason in left_out],
        "repeated": _repeated(readable, contents),
    }
    if images.layout != CLASS_FOLDERS:
        manifest["assignment_digest"] = images.assignment_digest()
    _fill(readable, split_of, digests, manifest, split_dir)
    counts = np.bincount(split_of, minlength=3)
    logger.info(
        "split: %d images of %d classes into train %d, val %d, test %d",
        *(len(readable.samples), len(images.classes), *counts.tolist()),
    )


def read_manifest(split_dir: Path | None = None) -> dict[str, Any] | None:
    """The record of `prepare_optimized_datasets`; None for a split from another source."""
    return read_json(Path(split_dir or SPLIT_DIR) / MANIFEST)


def verify_dataset_split(split_dir: Path = SPLIT_DIR) -> bool:
    """Whether the three splits exist, have the same classes and are not empty."""
    classes_of_splits = [class_folders(Path(split_dir) / split) for split in SPLITS]
    train_classes = classes_of_splits[0]
    return bool(train_classes) and all(classes == train_classes for classes in classes_of_splits)


def split_contents(split_dir: Path, split: str) -> tuple[list[str], list[Sample], dict[str, str]]:
    """Classes, samples and {sample id: SHA-256} of one split on disk.

    Digests come from the manifest for files that have not changed since; other files are read.
    """
    classes, samples = scan(Path(split_dir) / split)
    manifest = read_manifest(split_dir)
    digests = content_digests(samples, manifest["samples"][split] if manifest else None)
    return classes, samples, {name: entry[2] for name, entry in digests.items()}


def fold_groups(samples: Sequence[Sample], contents: Sequence[str], folds: int) -> np.ndarray:
    """Group of each train row, int64 (N,). Raises `SplitError` when there are fewer groups than folds."""
    groups = _groups(samples, contents)
    count = int(groups.max()) + 1
    if count < folds:
        raise SplitError(
            f"--folds: {folds} folds need as many images or groups of images; the train split has {count}. Add images, "
            f"or pass --folds {max(2, count)}"
        )
    return groups


def _open(raw_dir: Path) -> ImageSet:
    try:
        return open_image_set(raw_dir)
    except FileNotFoundError as error:
        raise FileNotFoundError(
            f"{error}; put the images there or name their folder or manifest with --data"
        ) from error
    except ValueError as error:
        raise SplitError(str(error)) from error


def _groups(samples: Sequence[Sample], contents: Sequence[str]) -> np.ndarray:
    return group_indices([s.sample_id for s in samples], contents, GROUP_REGEX, [s.group for s in samples])


def _readable(
    images: ImageSet, digests: dict[str, list], progress: Callable[[int, int], None] | None
) -> tuple[ImageSet, list[tuple[str, str]]]:
    paths = [sample.path for sample in images.samples]
    contents = [digests[name][2] for name in images.names]
    try:
        open_images(paths, contents, evaluation_resizing(IMG_SIZE), IMAGE_CACHE_DIR, progress=progress)
    except UnreadableImages as error:
        content_of = dict(zip(paths, contents, strict=True))
        reason_of = {content_of[path]: reason for path, reason in error.problems}
        left_out = [
            (name, reason_of[content])
            for name, content in zip(images.names, contents, strict=True)
            if content in reason_of
        ]
        for name, reason in left_out:
            logger.warning("split: %s left out: %s", name, reason)
        return images.take([row for row, content in enumerate(contents) if content not in reason_of]), left_out
    return images, []


def _check_sizes(images: ImageSet, groups: np.ndarray, raw_dir: Path) -> None:
    """Raise `SplitError` for a class too small to be in train, val and test."""
    labels = np.array([sample.label for sample in images.samples])
    assigned = np.array([split or "" for split in images.splits])
    missing = _missing_splits(images)
    problems = []
    for label, name in enumerate(images.classes):
        for split in SPLITS:
            if split in missing:
                continue
            of_split = (labels == label) & ((assigned == split) | (assigned == ""))
            parts, required = len(np.unique(groups[of_split])), 1 + len(missing) if split == "train" else 1
            if parts < required:
                where = f" of {split}" if len(missing) < 2 else ""
                count = int(of_split.sum())
                problems.append(f"class {name!r} has {count} readable image(s){where} in {parts} group(s)")
    if not problems:
        return
    if len(missing) == 2:
        expected = "expected at least 3, one for each of train, val and test"
    elif missing:
        expected = f"expected at least one in each split, and one more in train for {missing[0]}"
    else:
        expected = "expected at least one in each split"
    remedy = "move the class folder away" if images.layout != MANIFEST_LAYOUT else "leave the rows of the class out"
    raise SplitError(f"{raw_dir}: {'; '.join(problems)}; {expected}: add images or {remedy}")


def _missing_splits(images: ImageSet) -> list[str]:
    """Those of val and test that the source does not define."""
    return [split for split in SPLITS[1:] if split not in images.splits]


def _check_labels(images: ImageSet, digests: dict[str, list], raw_dir: Path) -> None:
    """Raise `SplitError` if a manifest labels equal images differently; class folders only cause a warning."""
    if images.lines is None:
        return
    first: dict[str, int] = {}
    for row in np.argsort(images.lines):
        other = first.setdefault(digests[images.names[row]][2], int(row))
        labels = [images.classes[images.samples[at].label] for at in (other, row)]
        if labels[0] != labels[1]:
            raise SplitError(
                f"{raw_dir}, line {images.lines[row]}: {images.names[row]!r} has the label {labels[1]!r}; the equal "
                f"image {images.names[other]!r} of line {images.lines[other]} has {labels[0]!r}. Expected one label "
                "for equal images: correct one, or remove both rows"
            )


def _assign_splits(images: ImageSet, groups: np.ndarray, ratios: Sequence[float], seed: int) -> np.ndarray:
    """Index into SPLITS of each image, int64 (N,): as in the source, else stratified by `ratios` in whole groups."""
    labels = np.array([sample.label for sample in images.samples])
    missing = _missing_splits(images)
    if len(missing) == 2 and "train" not in images.splits:
        return stratified_bins(labels, groups, ratios, seed)
    split_of = np.array([SPLITS.index(split or "train") for split in images.splits])
    if missing:
        indices = [0, *(SPLITS.index(split) for split in missing)]
        shares = np.array([ratios[index] for index in indices])
        rows = np.flatnonzero(split_of == 0)
        within = np.unique(groups[rows], return_inverse=True)[1]
        split_of[rows] = np.array(indices)[stratified_bins(labels[rows], within, shares / shares.sum(), seed)]
        counts = ", ".join(f"{split} ({int((split_of == SPLITS.index(split)).sum())} images)" for split in missing)
        logger.info("split: the images have no %s, made from train: %s", " and no ".join(missing), counts)
    return split_of


def _warn_of_shared_groups(images: ImageSet, groups: np.ndarray) -> None:
    """Log a warning if a group, or a set of equal images, is in several of the source's splits."""
    first: dict[int, int] = {}
    shared: dict[int, tuple[int, int]] = {}
    for row, group in enumerate(groups.tolist()):
        other = first.setdefault(group, row)
        if images.splits[other] != images.splits[row]:
            shared.setdefault(group, (other, row))
    if shared:
        names = [images.names[row] for row in next(iter(shared.values()))]
        logger.warning(
            "split: %d set(s) of equal images or groups lie in more than one of the given splits, first %s and %s",
            *(len(shared), *names),
        )


def _repeated(images: ImageSet, contents: list[str]) -> list[list[str]]:
    """Names of images with equal content, one list per content; logs those with contradictory classes."""
    by_content: dict[str, list[int]] = {}
    for row, content in enumerate(contents):
        by_content.setdefault(content, []).append(row)
    repeated = [rows for rows in by_content.values() if len(rows) > 1]
    for rows in repeated:
        if len({images.samples[row].label for row in rows}) > 1:
            names = ", ".join(images.names[row] for row in rows)
            logger.warning("split: the same image in several classes: %s", names)
    if repeated:
        stay = "" if "train" in images.splits else "; equal images stay in one split"
        logger.warning("split: %d image(s) occur more than once%s", len(repeated), stay)
    return [[images.names[row] for row in rows] for rows in repeated]


def _fill(
    images: ImageSet, split_of: np.ndarray, digests: dict[str, list], manifest: dict[str, Any], split_dir: Path
) -> None:
    split_dir.parent.mkdir(parents=True, exist_ok=True)
    partial = Path(tempfile.mkdtemp(prefix=f".{split_dir.name}.partial", dir=split_dir.parent))
    put = shutil.copyfile if images.layout == CLASS_FOLDERS else _link
    entries: dict[str, dict[str, list]] = {split: {} for split in SPLITS}
    groups: dict[str, dict[str, str]] = {split: {} for split in SPLITS}
    try:
        for sample, name, index in zip(images.samples, images.names, split_of, strict=True):
            target = partial / SPLITS[index] / sample.sample_id
            target.parent.mkdir(parents=True, exist_ok=True)
            put(sample.path.absolute(), target)
            entries[SPLITS[index]][sample.sample_id] = digests[name]
            if sample.group is not None:
                groups[SPLITS[index]][sample.sample_id] = sample.group
        if images.is_ordered or any(groups.values()):
            write_json(partial / RECORD, {"classes": images.classes, "groups": groups})
        # A link has the size and time of its image, so only copies are read again.
        splits = {split: content_digests(scan(partial / split)[1], entries[split]) for split in SPLITS}
        write_json(partial / MANIFEST, manifest | {"samples": splits})
        partial.chmod(0o755)
        if split_dir.is_dir():
            split_dir.rmdir()  # known to be empty here
        partial.rename(split_dir)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _link(source: Path, target: Path) -> None:
    """Create a symbolic link to an image; if not supported, a hard link; else a copy."""
    try:
        target.symlink_to(source)
    except OSError:
        try:
            os.link(source, target)
        except OSError:
            logger.warning("split: images are copied, since %s takes no links", target.parents[2], dedupe=True)
            shutil.copy2(source, target)


def _check_existing(raw_dir: Path, split_dir: Path) -> None:
    """Check that the existing split was made from the existing raw images; raises `SplitError` if it was not."""
    if not verify_dataset_split(split_dir):
        raise SplitError(
            f"{split_dir}: expected train, val and test with the same class folders; move the folder away to split "
            "again"
        )
    manifest = read_manifest(split_dir)
    if manifest is None:
        logger.warning("split: %s has no %s; the split is used unchanged", split_dir, MANIFEST)
        return
    if not raw_dir.exists():
        return  # the raw images may be removed after the split
    images = _open(raw_dir)
    suffixes = manifest.get("suffixes", FIRST_SUFFIXES)
    images = images.take([row for row, s in enumerate(images.samples) if s.path.suffix.lower() in suffixes])
    digests = content_digests(images.named_samples(), manifest["raw_files"])
    contents = {name: entry[2] for name, entry in digests.items()}
    assignment = manifest.get("assignment_digest")
    is_assigned_equally = assignment is None or assignment == images.assignment_digest()
    if digest_of_contents(contents) == manifest["raw_digest"] and is_assigned_equally:
        return
    recorded = {name: entry[2] for name, entry in manifest["raw_files"].items()}
    added, removed = sorted(contents.keys() - recorded.keys()), sorted(recorded.keys() - contents.keys())
    changed = sorted(name for name in contents.keys() & recorded.keys() if contents[name] != recorded[name])
    examples = ", ".join((added + removed + changed)[:3]) or "labels, splits or groups were edited"
    raise SplitError(
        f"{split_dir} was made from other images than {raw_dir} holds now: {len(added)} added, {len(removed)} removed, "
        f"{len(changed)} changed ({examples}); move {split_dir.name} away to split again (which repeats all training), "
        "or use another --workspace"
    )
