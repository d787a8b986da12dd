"""Shortcut probes: how well border pixels, background colours, file properties or file names alone predict the classes.

A network whose accuracy relies on such features fails when they change (Geirhos et al. 2020; eight background pixels
alone reach 49% on PlantVillage, Noyan et al. 2022). Each probe is a ridge regression of the classes on an RBF map
(Nystroem) of its features, scored by cross-validation with whole groups in a fold. The chance level is that of the same
classifier with labels permuted between groups of equal size (permutation test, Phipson and Smyth 2010), so that copies
of an image are not counted as evidence.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from utils.auditing.image_signatures import FileFacts, Signatures
from utils.numeric.statistics import holm

FOLDS = 5
PERMUTATIONS = 499
LEVEL = 0.01  # family-wise significance level over the probes (Holm 1979)
COMPONENTS = 150  # dimension of the RBF map
RIDGE = 0.1
MOST_ROWS = 4000  # larger sets are subsampled
LEAST_PER_CLASS = 5  # minimum number of images per class for probes
MOST_PATTERNS = 24  # distinct patterns of file names
CHUNK = 1 << 24  # permuted target values in memory at a time


@dataclass(frozen=True)
class Probe:
    """Result of one kind of features."""

    name: str
    accuracy: float
    """Cross-validated accuracy of the features alone"""
    chance: float
    """Mean accuracy on permuted labels"""
    chance_95: float
    """95% quantile of the accuracy on permuted labels"""
    p_value: float
    stands_out: bool
    """Whether p_value is at most LEVEL after Holm's correction for all probes"""
    rows: int


def reason_for_none(labels: np.ndarray, groups: np.ndarray) -> str | None:
    """The reason why images with `labels` and `groups` (N,) cannot be probed, for example too few groups, or None."""
    counts = np.bincount(labels)
    counts = counts[counts > 0]
    if len(counts) < 2:
        return "fewer than two classes"
    if counts.min() < LEAST_PER_CLASS:
        return f"a class has {counts.min()} readable images; a probe needs {LEAST_PER_CLASS} of each"
    if len(np.unique(groups)) < 2 * FOLDS:
        return f"{len(np.unique(groups))} groups of images; a probe needs {2 * FOLDS}"
    return None


def run(
    features: Mapping[str, np.ndarray],
    labels: np.ndarray,
    groups: np.ndarray,
    *,
    seed: int,
    permutations: int = PERMUTATIONS,
) -> list[Probe]:
    """One probe for each entry of `features`, {name: (N, D)}; `labels` and `groups` are int64 (N,)."""
    rng = np.random.default_rng(seed)
    rows = _some_groups(groups, rng)
    truth = np.unique(labels[rows], return_inverse=True)[1]
    units = np.unique(groups[rows], return_inverse=True)[1]
    folds = _folds(units, rng)
    exchanged = _exchanged(truth, units, permutations, rng)
    by_probe = {}
    for name, values in features.items():
        scores = _accuracies(_mapped(values[rows], seed), np.concatenate([truth[None], exchanged]), folds)
        by_probe[name] = scores[0], scores[1:]
    p_values = {
        name: (1 + int((null >= accuracy).sum())) / (1 + len(null)) for name, (accuracy, null) in by_probe.items()
    }
    adjusted = holm(p_values)
    return [
        Probe(
            name,
            float(accuracy),
            float(null.mean()),
            float(np.quantile(null, 0.95)),
            p_values[name],
            adjusted[name] <= LEVEL,
            len(truth),
        )
        for name, (accuracy, null) in by_probe.items()
    ]


def _some_groups(groups: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Sorted rows of randomly selected groups, at most MOST_ROWS; the last group may be incomplete."""
    names, unit = np.unique(groups, return_inverse=True)
    if len(groups) <= MOST_ROWS:
        return np.arange(len(groups))
    rank = rng.permutation(len(names))[unit]
    order = np.argsort(rank, kind="stable")
    return np.sort(order[:MOST_ROWS])


def _folds(groups: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Fold of each row: whole groups, assigned at random without stratification."""
    fold_of: np.ndarray = rng.permutation(int(groups.max()) + 1)[groups] % FOLDS
    return fold_of


def _exchanged(labels: np.ndarray, groups: np.ndarray, count: int, rng: np.random.Generator) -> np.ndarray:
    """int64 (count, N): permuted labels, each group with those of another group of equal size."""
    order = np.argsort(groups, kind="stable")
    sizes = np.bincount(groups)
    starts = np.r_[0, np.cumsum(sizes)[:-1]]
    permuted = np.empty((count, len(labels)), dtype=np.int64)
    for size in np.unique(sizes):
        rows = order[starts[sizes == size][:, None] + np.arange(size)]  # (groups of this size, size)
        for permutation in permuted:
            permutation[rows] = labels[rows[rng.permutation(len(rows))]]
    return permuted


def _mapped(values: np.ndarray, seed: int) -> np.ndarray:
    """float32 (N, K + 1): RBF map of standardised features, and a constant."""
    from sklearn.kernel_approximation import Nystroem

    centred = values - values.mean(axis=0)
    spread = centred.std(axis=0)
    standardised = (centred / np.where(spread > 1e-9, spread, 1))[:, spread > 1e-9].clip(-5, 5)
    constant = np.ones((len(values), 1), dtype=np.float32)
    if not standardised.shape[1]:
        return constant
    count = min(COMPONENTS, max(2, len(values) // 4))
    kernel = Nystroem(gamma=0.5 / standardised.shape[1], n_components=count, random_state=seed)
    return np.concatenate([kernel.fit_transform(standardised).astype(np.float32), constant], axis=1)


def _accuracies(features: np.ndarray, labels: np.ndarray, folds: np.ndarray) -> np.ndarray:
    """Cross-validated accuracy (B,) of ridge regressions on B labellings int64 (B, N) of the same rows.

    All labellings share one factorisation per fold, so that hundreds of permutations cost little.
    """
    classes = int(labels.max()) + 1
    hits = np.zeros(len(labels))
    step = max(1, CHUNK // (labels.shape[1] * classes))
    for fold in range(FOLDS):
        held_out = folds == fold
        if not held_out.any() or held_out.all():
            continue
        train = features[~held_out]
        normal = (train.T @ train).astype(np.float64)
        maps = np.linalg.solve(normal + RIDGE * np.eye(len(normal)), train.T.astype(np.float64)).astype(np.float32)
        for start in range(0, len(labels), step):
            part = labels[start : start + step]
            targets = np.eye(classes, dtype=np.float32)[part[:, ~held_out]]  # (b, n, C)
            weights = maps @ targets.transpose(1, 0, 2).reshape(len(train), -1)
            scores = (features[held_out] @ weights).reshape(-1, len(part), classes)
            hits[start : start + step] += (part[:, held_out] == scores.argmax(axis=2).T).sum(axis=1)
    accuracies: np.ndarray = hits / labels.shape[1]
    return accuracies


# features ------------------------------------------------------------------------------------------------------------


def features(signatures: Signatures, file_names: Sequence[str], class_names: Sequence[str]) -> dict[str, np.ndarray]:
    """{probe: features, float64 (N, D)} of N images; `file_names` are the last components of their paths."""
    return {
        "border pixels": signatures.border.reshape(len(file_names), -1).astype(np.float64),
        "background colours": np.sqrt(signatures.background.astype(np.float64)),
        "file properties": _file_features(signatures.files),
        "file names": _one_hot([name_pattern(name, class_names) for name in file_names], MOST_PATTERNS),
    }


def _file_features(files: Sequence[FileFacts]) -> np.ndarray:
    pixels = np.array([max(1, file.width * file.height) for file in files], dtype=np.float64)
    sizes = np.array([max(1, file.bytes) for file in files], dtype=np.float64)
    numbers = np.stack(
        [
            np.log(sizes),
            np.log(sizes / pixels),
            np.log([max(1, file.width) for file in files]),
            np.log([max(1, file.height) for file in files]),
            np.log([max(1e-3, file.quantisation) for file in files]),
            [float(file.exif_tags) for file in files],
        ],
        axis=1,
    )
    words = [_one_hot([getattr(file, name) for file in files], 8) for name in ("format", "mode", "camera")]
    return np.concatenate([numbers, *words], axis=1)


def _one_hot(words: Sequence[str], most: int) -> np.ndarray:
    """float64 (N, K): one-hot encoding of each word among the `most` most frequent ones; K is at least 1."""
    frequent = [word for word, _ in sorted(Counter(words).items(), key=lambda item: (-item[1], item[0]))[:most]]
    return np.array([[float(word == other) for other in frequent] for word in words]).reshape(len(words), -1)


def name_pattern(file_name: str, class_names: Sequence[str]) -> str:
    """The file name with numbers replaced by `#` and class names by `<class>`: `canker_12.jpg` gives `<class>_#.jpg`.

    Numbers and class names in file names are common and do not indicate different sources of the classes.
    """
    folded = re.sub(r"[\s_.-]+", "_", file_name.casefold())
    for name in sorted(class_names, key=len, reverse=True):
        word = re.sub(r"[\s_.-]+", "_", name.casefold())
        folded = re.sub(rf"(?<![^\W_]){re.escape(word)}(?![^\W_])", "<class>", folded)
    return re.sub(r"\d+", "#", folded)
