"""Class imbalance of the train split."""

from __future__ import annotations

import numpy as np

from utils.predictions.catalog import Problem
from utils.predictions.image_splits import ImageSplit

REPORTED_RATIO = 3.0


def problem(train: ImageSplit) -> Problem | None:
    """The imbalance ratio, largest class over smallest, with the options to type; None up to `REPORTED_RATIO`."""
    counts = np.bincount(train.labels, minlength=len(train.classes))
    largest, smallest = int(counts.argmax()), int(counts.argmin())
    if counts[largest] <= REPORTED_RATIO * counts[smallest]:
        return None
    counts_by_class = [f"{train.classes[index]} has {counts[index]} images" for index in (largest, smallest)]
    ratio = f"{counts[largest] / counts[smallest]:.1f}" if counts[smallest] else "infinite"
    return Problem(
        "class_imbalance",
        "info",
        None,
        f"the classes of train differ in size: {', '.join(counts_by_class)}, imbalance ratio {ratio}",
        "if rare classes matter as much: python BASE-BACK/src/main.py --class-weights balanced, or --sampling balanced",
    )
