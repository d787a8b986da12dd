"""Proposes a split that keeps every group of copies on one side, as a CSV manifest for the base pipeline."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from utils.core.errors import UserError
from utils.core.workspace import SPLITS
from utils.evaluation.table_formats import csv_text


def proposed_splits(splits: Sequence[str], groups: np.ndarray) -> list[str]:
    """The split of each image (N,): that of the group's first image in the order train, val, test.

    No image moves towards test, so the remaining images of val and test have no copy in the training data of existing
    networks.
    """
    order = np.array([SPLITS.index(split) for split in splits], dtype=np.int64)
    earliest = np.full(int(groups.max()) + 1 if len(groups) else 0, len(SPLITS))
    np.minimum.at(earliest, groups, order)
    return [SPLITS[index] for index in earliest[groups]]


def manifest(
    path: Path, images: Sequence[Path], labels: Sequence[str], splits: Sequence[str], groups: np.ndarray
) -> str:
    """The text of a manifest `file_name,label,split,group` at `path`; an image alone in its group has no group name.

    `groups` (N,) are the groups of the N images. Raises UserError for an image outside the manifest's folder, which the
    base pipeline does not allow.
    """
    folder = Path(os.path.abspath(path.parent))
    sizes = np.bincount(groups) if len(groups) else np.zeros(0, dtype=np.int64)
    rows = []
    for image, label, split, group in zip(images, labels, splits, groups.tolist(), strict=True):
        if not image.is_relative_to(folder):
            raise UserError(
                f"--write-split {path}: the images are in {os.path.commonpath([str(image) for image in images])}; a "
                "manifest lists paths below its own folder. Name a file in a folder that holds them"
            )
        name = image.relative_to(folder).as_posix()
        rows.append((name, label, split, f"group-{group}" if sizes[group] > 1 else ""))
    return csv_text(("file_name", "label", "split", "group"), rows)
