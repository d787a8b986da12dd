"""Checks between splits: their classes, and images that are in more than one of them."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from utils.predictions.catalog import Problem
from utils.predictions.image_splits import ImageSplit

NAMED_PAIRS = 20  # pairs of equal images that are listed individually


def split_problems(splits: Mapping[str, ImageSplit]) -> list[Problem]:
    """An error for each split whose classes differ from train's, and a warning for each image that is in two splits."""
    problems = []
    train = splits["train"]
    for name, split in splits.items():
        if split.classes != train.classes:
            message = f"{name} has the classes {', '.join(split.classes)}, train has {', '.join(train.classes)}"
            problems.append(Problem("split_classes", "error", None, message, "split the images again"))
    names = np.array([f"{split.split}/{sample_id}" for split in splits.values() for sample_id in split.sample_ids])
    where = np.concatenate([np.full(len(split.sample_ids), number) for number, split in enumerate(splits.values())])
    contents = np.array([content for split in splits.values() for content in split.contents])
    _, group = np.unique(contents, return_inverse=True)
    order = np.lexsort((np.arange(len(group)), group))
    starts = np.flatnonzero(np.r_[True, group[order][1:] != group[order][:-1]])
    first = order[np.repeat(starts, np.diff(np.r_[starts, len(order)]))]  # the earliest row of each row's group
    duplicates = np.flatnonzero(where[order] != where[first])
    for row in duplicates[:NAMED_PAIRS]:
        message = f"the same image in two splits: {names[first[row]]} and {names[order[row]]}"
        problems.append(Problem("duplicate_across_splits", "warning", None, message, "evaluate leaves it out"))
    if len(duplicates) > NAMED_PAIRS:
        message = f"{len(duplicates) - NAMED_PAIRS} more images are in two splits"
        problems.append(Problem("duplicate_across_splits", "warning", None, message, "split the images again"))
    return problems
