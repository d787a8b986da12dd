"""Groups of samples that stay together in cross-fitting folds and in the bootstrap samples of an evaluation."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from utils import base_back
from utils.core.errors import ConfigError
from utils.predictions.store import Store


def group_indices(
    store: Store, sample_ids: Sequence[str], contents: Sequence[str], names: Sequence[str | None]
) -> np.ndarray:
    """Group index of each sample (N,), by `dataset.group_regex`, the recorded `names` of groups and equal `contents`.

    Raises ConfigError for an expression that takes too long to match.
    """
    samples = base_back.load_bundled("samples")
    try:
        groups: np.ndarray = samples.group_indices(sample_ids, contents, store.config.dataset.group_regex, names)
    except base_back.load_bundled("patterns").PatternError as error:
        raise ConfigError(f"dataset.group_regex: {error}") from error
    return groups
