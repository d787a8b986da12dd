"""The workspace's cross-fitting folds: one assignment of the honest rows, made once and kept."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from utils import base_back
from utils.artifacts import digest_of, read_arrays, write_arrays
from utils.errors import UserError
from utils.predictions import AGAIN, Store

VERSION = 2  # raised whenever the same rows would be dealt out otherwise
CROSSFIT_FOLDS = 5


def crossfit_folds(store: Store) -> dict[tuple[str, str], int]:
    """{(split, sample id): fold} over the train and val rows: the workspace's one assignment, made once and kept.

    Stratified and seeded; rows of one group (`dataset.group_regex`) or of equal content share a fold. Five folds, fewer
    where a class has fewer groups. Made anew when images, seed or group rule change.
    """
    rule, seed = store.config.dataset.group_regex, store.config.seed
    digests = [store.catalog.splits[split]["digest"] for split in ("train", "val")]
    key = digest_of([VERSION, digests, rule, seed])
    path = store.workspace.crossfit_folds
    if path.is_file():
        arrays = read_arrays(path, remedy=AGAIN)
        if str(arrays["key"]) == key:
            return _fold_table(arrays)
    dealing = base_back.bundled("samples")
    images = [store.images("train"), store.images("val")]
    labels = np.concatenate([split.labels for split in images])
    ids = [sample_id for split in images for sample_id in split.sample_ids]
    contents = [content for split in images for content in split.contents]
    groups = dealing.group_indices(ids, contents, rule)
    fewest = min(len(np.unique(groups[labels == label])) for label in np.unique(labels))
    folds = min(CROSSFIT_FOLDS, fewest)
    if folds < 2:
        raise UserError(
            f"{store.workspace.split_dir}: a class has one group of images in train and val; cross-fitting needs two. "
            "Add images, or widen dataset.group_regex"
        )
    arrays = {
        "key": np.array(key),
        "split": np.concatenate([np.full(len(split.sample_ids), split.split) for split in images]),
        "sample_ids": np.array(ids),
        "fold": dealing.stratified_bins(labels, groups, [1 / folds] * folds, seed),
    }
    write_arrays(path, arrays)
    return _fold_table(arrays)


def _fold_table(arrays: Mapping[str, Any]) -> dict[tuple[str, str], int]:
    names = zip(arrays["split"].tolist(), arrays["sample_ids"].tolist(), strict=True)
    return dict(zip(names, arrays["fold"].tolist(), strict=True))
