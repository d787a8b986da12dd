"""Find labels that are likely to be wrong: confident learning (Northcutt et al. 2021) on cross-fitted predictions.

The threshold of a class is its mean probability over the rows with this label. A row is assigned to the most probable
class among those whose threshold its probability reaches. A row assigned to a class other than its label is an issue.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from utils.numeric.metrics import MAX_LISTED_CLASSES, ROUNDING, check_probabilities

COLUMNS = ("rank", "split", "sample_id", "image", "label", "suggested", "p_label", "p_suggested", "margin")


@dataclass(frozen=True)
class LabelIssues:
    """Label issues among N rows of C classes."""

    rows: NDArray[np.int64]
    """(n,): rows with a label issue, the lowest margin first"""
    suggested: NDArray[np.int64]
    """(n,): the class that each of these rows is assigned to"""
    margins: NDArray[np.float64]
    """(n,): probability of the label minus that of the suggested class"""
    thresholds: NDArray[np.float64]
    """(C,): mean probability of a class over the rows with this label; NaN for a class without rows"""
    counts: NDArray[np.int64] | None
    """(C, C), the confident joint: number of rows with label i that are assigned to class j; None for more than
    `MAX_LISTED_CLASSES` classes"""


def find_label_issues(probabilities: ArrayLike, labels: ArrayLike) -> LabelIssues:
    """Find label issues from labels (N,) and out-of-sample probabilities (N, C).

    Rows that reach no threshold are assigned to no class. Raises UserError as `metrics.check_probabilities` does.
    """
    scores, truth = check_probabilities(probabilities, labels)
    all_rows, classes = np.arange(len(truth)), scores.shape[1]
    support = np.bincount(truth, minlength=classes)
    sums = np.bincount(truth, weights=scores[all_rows, truth], minlength=classes)
    thresholds = np.divide(sums, support, out=np.full(classes, np.nan), where=support > 0)
    is_reached = scores >= np.where(support > 0, thresholds, np.inf) - ROUNDING
    assigned = np.where(is_reached, scores, -1).argmax(axis=1)
    is_assigned = is_reached.any(axis=1)
    counts = None
    if classes <= MAX_LISTED_CLASSES:
        pairs = truth[is_assigned] * classes + assigned[is_assigned]
        counts = np.bincount(pairs, minlength=classes**2).reshape(classes, classes)
    rows = np.flatnonzero(is_assigned & (assigned != truth))
    margins = scores[rows, truth[rows]] - scores[rows, assigned[rows]]
    order = np.argsort(margins, kind="stable")
    rows = rows[order]
    return LabelIssues(rows, assigned[rows], margins[order], thresholds, counts)


def issues_csv(
    issues: LabelIssues,
    probabilities: NDArray[np.floating],
    labels: NDArray[np.int64],
    splits: Sequence[str],
    sample_ids: Sequence[str],
    images: Sequence[str],
    classes: Sequence[str],
) -> str:
    """Return CSV text with one line per issue, the lowest margin first.

    `probabilities` (N, C), `labels`, `splits`, `sample_ids` and `images` (N,) describe all rows; `images` are paths,
    empty for a row without one. `classes` (C,) are names.
    """
    stream = io.StringIO()
    writer = csv.writer(stream, lineterminator="\n")
    writer.writerow(COLUMNS)
    entries = zip(issues.rows.tolist(), issues.suggested.tolist(), issues.margins.tolist(), strict=True)
    for rank, (row, suggested, margin) in enumerate(entries, start=1):
        label = int(labels[row])
        numbers = [probabilities[row, label], probabilities[row, suggested], margin]
        names = [splits[row], sample_ids[row], images[row], classes[label], classes[suggested]]
        writer.writerow([rank, *map(_escaped, names), *(f"{value:.6f}" for value in numbers)])
    return stream.getvalue()


def _escaped(name: str) -> str:
    """Escape the bytes of a file name that are not valid UTF-8, such as `\\udcff`."""
    return name.encode("utf-8", "backslashreplace").decode()
