"""The raw images are split once: stratified, seeded, groups and equal contents kept together, and recorded.

`split_dataset/split_manifest.json` says what was split into what. A later run with other raw images does not reuse
the split in silence.
"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from config.settings import GROUP_REGEX, IMAGE_CACHE_DIR, IMG_SIZE, RAW_DIR, SEED, SPLIT_DIR
from utils import logger
from utils.files import read_json, write_json
from utils.image_cache import UnreadableImages, open_images
from utils.resizing import evaluation_resizing
from utils.samples import (
    Sample,
    class_folders,
    content_digests,
    digest_of_contents,
    group_indices,
    scan,
    stratified_bins,
)

SPLITS = ("train", "val", "test")
MANIFEST = "split_manifest.json"


class SplitError(ValueError):
    """The raw images cannot be split, or the split at hand does not fit them; the text says how to go on."""


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
    """Copy the images of `raw_dir` into `split_dir/{train,val,test}/<class>/`, each image once, whole or not at all.

    Returns at once when a split of the same images exists. Unreadable images are left out, named and recorded.
    Raises FileNotFoundError without raw folder, `SplitError` (a ValueError) below two classes, for an empty class, a
    class too small for three splits, or a split made from other images.
    """
    raw_dir, split_dir = Path(raw_dir or RAW_DIR), Path(split_dir or SPLIT_DIR)
    ratios = (train_ratio, val_ratio, test_ratio)
    if min(ratios) <= 0 or abs(sum(ratios) - 1) > 1e-6:
        raise SplitError(f"ratios {ratios}: expected three fractions above 0 that sum to 1")
    if split_dir.is_dir() and any(split_dir.iterdir()):
        _check_existing(raw_dir, split_dir)
        return
    classes, samples = _scan_raw(raw_dir)
    digests = content_digests(samples)
    readable, left_out = _readable(samples, digests, progress)
    contents = [digests[sample.sample_id][2] for sample in readable]
    groups = group_indices([sample.sample_id for sample in readable], contents, GROUP_REGEX)
    labels = np.array([sample.label for sample in readable])
    _check_sizes(classes, labels, groups, raw_dir)
    split_of = stratified_bins(labels, groups, ratios, seed)
    manifest = {
        "schema": 1,
        "raw_dir": str(raw_dir),
        "raw_digest": digest_of_contents({name: entry[2] for name, entry in digests.items()}),
        "raw_files": digests,
        "seed": seed,
        "ratios": list(ratios),
        "group_regex": GROUP_REGEX,
        "classes": classes,
        "left_out": [{"path": path, "reason": reason} for path, reason in left_out],
        "repeated": _repeated(readable, contents),
    }
    _copy(readable, split_of, manifest, split_dir)
    counts = np.bincount(split_of, minlength=3)
    logger.info(
        "split: %d images of %d classes into train %d, val %d, test %d", len(readable), len(classes), *counts.tolist()
    )


def read_manifest(split_dir: Path | None = None) -> dict[str, Any] | None:
    """What `prepare_optimized_datasets` recorded; None for a split that somebody else made."""
    return read_json(Path(split_dir or SPLIT_DIR) / MANIFEST)


def verify_dataset_split(split_dir: Path = SPLIT_DIR) -> bool:
    """Whether the three splits exist, hold the same classes and are not empty."""
    found = [class_folders(Path(split_dir) / split) for split in SPLITS]
    return bool(found[0]) and all(classes == found[0] for classes in found)


def split_contents(split_dir: Path, split: str) -> tuple[list[str], list[Sample], dict[str, str]]:
    """Classes, samples and {sample id: SHA-256} of one split as it lies on disk.

    The manifest's digests are believed for files that have not changed since; anything else is read.
    """
    classes, samples = scan(Path(split_dir) / split)
    manifest = read_manifest(split_dir)
    digests = content_digests(samples, manifest["samples"][split] if manifest else None)
    return classes, samples, {name: entry[2] for name, entry in digests.items()}


def _scan_raw(raw_dir: Path) -> tuple[list[str], list[Sample]]:
    try:
        classes, samples = scan(raw_dir)
    except FileNotFoundError as error:
        raise FileNotFoundError(f"{error}; put the images there or name their folder with --data DIR") from error
    except ValueError as error:
        raise SplitError(str(error)) from error
    if len(classes) < 2:
        found = f"one class only ({classes[0]!r})" if classes else "no class folder"
        raise SplitError(f"{raw_dir}: found {found}; expected one folder per class and at least two classes")
    return classes, samples


def _readable(
    samples: list[Sample], digests: dict[str, list], progress: Callable[[int, int], None] | None
) -> tuple[list[Sample], list[tuple[str, str]]]:
    paths = [sample.path for sample in samples]
    contents = [digests[sample.sample_id][2] for sample in samples]
    try:
        open_images(paths, contents, evaluation_resizing(IMG_SIZE), IMAGE_CACHE_DIR, progress=progress)
    except UnreadableImages as error:
        content_of = dict(zip(paths, contents, strict=True))
        reason_of = {content_of[path]: reason for path, reason in error.problems}
        left_out = [
            (sample.sample_id, reason_of[content])
            for sample, content in zip(samples, contents, strict=True)
            if content in reason_of
        ]
        for sample_id, reason in left_out:
            logger.warning("split: %s left out: %s", sample_id, reason)
        names = {sample_id for sample_id, _ in left_out}
        return [sample for sample in samples if sample.sample_id not in names], left_out
    return samples, []


def _check_sizes(classes: list[str], labels: np.ndarray, groups: np.ndarray, raw_dir: Path) -> None:
    problems = []
    for label, name in enumerate(classes):
        images, parts = int((labels == label).sum()), len(np.unique(groups[labels == label]))
        if parts < len(SPLITS):
            problems.append(f"class {name!r} has {images} readable image(s) in {parts} group(s)")
    if problems:
        raise SplitError(
            f"{raw_dir}: {'; '.join(problems)}; expected at least 3, one for each of train, val and test: add images "
            "or remove the class folder"
        )


def _repeated(samples: list[Sample], contents: list[str]) -> list[list[str]]:
    """Sample ids with equal content, one list per content; classes that contradict each other are named."""
    by_content: dict[str, list[Sample]] = {}
    for sample, content in zip(samples, contents, strict=True):
        by_content.setdefault(content, []).append(sample)
    repeated = [same for same in by_content.values() if len(same) > 1]
    for same in repeated:
        if len({sample.label for sample in same}) > 1:
            logger.warning("split: the same image in several classes: %s", ", ".join(s.sample_id for s in same))
    if repeated:
        logger.warning("split: %d image(s) occur more than once; equal images stay in one split", len(repeated))
    return [[sample.sample_id for sample in same] for same in repeated]


def _copy(samples: list[Sample], split_of: np.ndarray, manifest: dict[str, Any], split_dir: Path) -> None:
    split_dir.parent.mkdir(parents=True, exist_ok=True)
    partial = Path(tempfile.mkdtemp(prefix=f".{split_dir.name}.partial", dir=split_dir.parent))
    try:
        for sample, place in zip(samples, split_of, strict=True):
            target = partial / SPLITS[place] / sample.sample_id
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(sample.path, target)
        splits = {split: content_digests(scan(partial / split)[1]) for split in SPLITS}
        write_json(partial / MANIFEST, manifest | {"samples": splits})
        partial.chmod(0o755)
        if split_dir.is_dir():
            split_dir.rmdir()  # empty, or we would not be here
        partial.rename(split_dir)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _check_existing(raw_dir: Path, split_dir: Path) -> None:
    """Say whether the split at hand was made from the raw images at hand; raises `SplitError` when it was not."""
    if not verify_dataset_split(split_dir):
        raise SplitError(
            f"{split_dir}: expected train, val and test with the same class folders; move the folder away to split "
            "again"
        )
    manifest = read_manifest(split_dir)
    if manifest is None:
        logger.warning("split: %s has no %s; the split is used unchanged", split_dir, MANIFEST)
        return
    if not raw_dir.is_dir():
        return  # the raw images may be gone once they are split
    digests = content_digests(_scan_raw(raw_dir)[1], manifest["raw_files"])
    found = {name: entry[2] for name, entry in digests.items()}
    if digest_of_contents(found) == manifest["raw_digest"]:
        return
    known = {name: entry[2] for name, entry in manifest["raw_files"].items()}
    added, removed = sorted(found.keys() - known.keys()), sorted(known.keys() - found.keys())
    changed = sorted(name for name in found.keys() & known.keys() if found[name] != known[name])
    examples = ", ".join((added + removed + changed)[:3])
    raise SplitError(
        f"{split_dir} was made from other images than {raw_dir} holds now: {len(added)} added, {len(removed)} removed, "
        f"{len(changed)} changed ({examples}); move {split_dir.name} away to split again (which repeats all training), "
        "or use another --workspace"
    )
