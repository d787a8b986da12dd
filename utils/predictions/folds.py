"""The cross-fitting folds of a workspace: one stored assignment of the out-of-sample rows."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from utils import base_back
from utils.core.artifacts import digest_of, read_arrays, write_arrays
from utils.core.errors import UserError
from utils.predictions import grouping
from utils.predictions.rows import Samples
from utils.predictions.store import AGAIN, Store

VERSION = 3  # incremented whenever the assignment of the same rows changes
CROSSFIT_FOLDS = 5


def crossfit_folds(store: Store) -> dict[tuple[str, str], int]:
    """{(split, sample id): fold} over the train and val rows, which all combiners share.

    Stratified and seeded; rows of one group (`dataset.group_regex`, or recorded by the split) or of equal images share
    a fold. There are five folds, or one per group if there are fewer groups; a class may occur in only some of the
    folds, even in only one. The stored assignment is replaced when images, seed, group rule or recorded groups change.
    Raises UserError if all rows are of one group.
    """
    rule, seed = store.config.dataset.group_regex, store.config.seed
    digests = [store.catalog.splits[split]["digest"] for split in ("train", "val")]
    samples_module = base_back.load_bundled("samples")
    recorded = samples_module.recorded_groups(store.workspace.split_dir)
    key = digest_of([VERSION, digests, rule, seed, *([recorded] if recorded else [])])
    path = store.workspace.crossfit_folds
    if path.is_file():
        arrays = read_arrays(path, remedy=AGAIN)
        if str(arrays["key"]) == key:
            return _fold_table(arrays)
    splits = [store.samples("train"), store.samples("val")]
    labels = np.concatenate([samples.labels for samples in splits])
    ids = [sample_id for samples in splits for sample_id in samples.sample_ids]
    contents = [content for samples in splits for content in samples.contents or _names(samples)]
    names = [recorded.get(samples.split, {}).get(name) for samples in splits for name in samples.sample_ids]
    groups = grouping.group_indices(store, ids, contents, names)
    n_groups = len(np.unique(groups))
    if n_groups < 2:
        raise UserError(
            f"all {len(ids)} samples of train and val are one group; cross-fitting needs two. Narrow "
            f"dataset.group_regex ({rule}), or add samples"
        )
    arrays = {
        "key": np.array(key),
        "split": np.concatenate([np.full(len(samples.sample_ids), samples.split) for samples in splits]),
        "sample_ids": np.array(ids),
        "fold": _assigned(samples_module, labels, groups, seed) if n_groups > CROSSFIT_FOLDS else groups,
    }
    write_arrays(path, arrays)
    return _fold_table(arrays)


def _assigned(samples_module: Any, labels: np.ndarray, groups: np.ndarray, seed: int) -> np.ndarray:
    """The fold of each row, int64 (N,), for more groups than folds."""
    fewest = min(len(np.unique(groups[labels == label])) for label in np.unique(labels))
    folds: np.ndarray = samples_module.stratified_bins(
        labels, groups, [1 / CROSSFIT_FOLDS] * CROSSFIT_FOLDS, seed, rare=fewest < CROSSFIT_FOLDS
    )
    return folds


def _names(samples: Samples) -> list[str]:
    """Names that replace contents if there are no images: all samples count as different."""
    return [f"{samples.split}/{sample_id}" for sample_id in samples.sample_ids]


def _fold_table(arrays: Mapping[str, Any]) -> dict[tuple[str, str], int]:
    names = zip(arrays["split"].tolist(), arrays["sample_ids"].tolist(), strict=True)
    return dict(zip(names, arrays["fold"].tolist(), strict=True))
