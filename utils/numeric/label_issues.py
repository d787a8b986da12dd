"""Labels that are likely to be wrong: confident learning (Northcutt et al. 2021) on cross-fitted predictions.

A row counts for the class that it has more probability of than the rows labelled so have on average. A row that counts
for another class than its label is an issue.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from utils.numeric.metrics import ROUNDING, check_probabilities

COLUMNS = ("rank", "split", "sample_id", "image", "label", "suggested", "p_label", "p_suggested", "margin")


@dataclass(frozen=True)
class LabelIssues:
    """What confident learning finds among N rows of C classes."""

    rows: NDArray[np.int64]
    """(n,): rows whose label is in doubt, the most doubtful first"""
    suggested: NDArray[np.int64]
    """(n,): the class that each counts for"""
    margins: NDArray[np.float64]
    """(n,): probability of the label less that of the suggestion; the lower, the more doubtful"""
    thresholds: NDArray[np.float64]
    """(C,): mean probability of a class over the rows labelled so; NaN for a class without rows"""
    counts: NDArray[np.int64]
    """(C, C), the confident joint: rows labelled i that count for class j"""


def find_label_issues(probabilities: ArrayLike, labels: ArrayLike) -> LabelIssues:
    """Look for wrong labels (N,) by probabilities (N, C) of networks that have not seen them.

    Rows that reach no class's threshold count for none. UserError for what cannot be scored.
    """
    scores, truth = check_probabilities(probabilities, labels)
    everywhere, classes = np.arange(len(truth)), scores.shape[1]
    support = np.bincount(truth, minlength=classes)
    sums = np.bincount(truth, weights=scores[everywhere, truth], minlength=classes)
    thresholds = np.divide(sums, support, out=np.full(classes, np.nan), where=support > 0)
    reached = scores >= np.where(support > 0, thresholds, np.inf) - ROUNDING
    counted = np.where(reached, scores, -1).argmax(axis=1)
    some = reached.any(axis=1)
    counts = np.bincount(truth[some] * classes + counted[some], minlength=classes**2).reshape(classes, classes)
    rows = np.flatnonzero(some & (counted != truth))
    margins = scores[rows, truth[rows]] - scores[rows, counted[rows]]
    order = np.argsort(margins, kind="stable")
    rows = rows[order]
    return LabelIssues(rows, counted[rows], margins[order], thresholds, counts)


def issues_csv(
    issues: LabelIssues,
    probabilities: NDArray[np.floating],
    labels: NDArray[np.int64],
    splits: Sequence[str],
    sample_ids: Sequence[str],
    images: Sequence[str],
    classes: Sequence[str],
) -> str:
    """CSV with one line per issue, the most doubtful first; `images` (N,) are paths, empty where there is none."""
    stream = io.StringIO()
    lines = csv.writer(stream, lineterminator="\n")
    lines.writerow(COLUMNS)
    found = zip(issues.rows.tolist(), issues.suggested.tolist(), issues.margins.tolist(), strict=True)
    for rank, (row, suggested, margin) in enumerate(found, start=1):
        label = int(labels[row])
        numbers = [probabilities[row, label], probabilities[row, suggested], margin]
        names = [splits[row], sample_ids[row], images[row], classes[label], classes[suggested]]
        lines.writerow([rank, *map(_writable, names), *(f"{value:.6f}" for value in numbers)])
    return stream.getvalue()


def _writable(name: str) -> str:
    """Bytes of a file name that are no UTF-8 as `\\udcff`."""
    return name.encode("utf-8", "backslashreplace").decode()
