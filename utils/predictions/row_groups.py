"""Groups of dependent rows: rows of equal images, and rows grouped by `dataset.group_regex` or by the split.

Rows of one group are not independent, so standard errors, tests and thresholds count groups.
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np

from utils import base_back
from utils.core.workspace import Workspace
from utils.predictions import grouping
from utils.predictions.image_splits import ImageSplit
from utils.predictions.store import Store


def row_groups(store: Store, keys: Iterable[tuple[str, str]]) -> np.ndarray | None:
    """Group index, int64 (N,), of each row (split, sample id) in `keys`; None if every row is a group by itself.

    A group may have rows of several splits. Without images, no rows count as equal.
    """
    rows = list(keys)
    recorded = base_back.load_bundled("samples").recorded_groups(store.workspace.split_dir)
    content_of: dict[tuple[str, str], str] = {}
    for split in dict.fromkeys(split for split, _ in rows) if store.catalog.has_images else ():
        images = store.images(split)
        pairs = zip(images.sample_ids, images.contents, strict=True)
        content_of |= {(split, sample_id): content for sample_id, content in pairs}
    groups = grouping.group_indices(
        store,
        [sample_id for _, sample_id in rows],
        [content_of.get(key, "/".join(key)) for key in rows],
        [recorded.get(split, {}).get(sample_id) for split, sample_id in rows],
    )
    return groups if len(np.unique(groups)) < len(groups) else None


def row_groups_of(workspace: Workspace, group_regex: str | None, images: ImageSplit) -> np.ndarray | None:
    """Group index, int64 (N,), of each image of one split; None if every image is a group by itself."""
    grouping = base_back.load_bundled("samples")
    recorded = grouping.recorded_groups(workspace.split_dir).get(images.split, {})
    names = [recorded.get(sample_id) for sample_id in images.sample_ids]
    groups: np.ndarray = grouping.group_indices(images.sample_ids, images.contents, group_regex, names)
    return groups if len(np.unique(groups)) < len(groups) else None


def count_groups(workspace: Workspace, group_regex: str | None, images: ImageSplit) -> int | None:
    """Number of groups of the images of one split; None if every image is a group by itself."""
    groups = row_groups_of(workspace, group_regex, images)
    return None if groups is None else len(np.unique(groups))
