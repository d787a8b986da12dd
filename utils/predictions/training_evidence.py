"""Evidence against the stated training data of a member: suspiciously good scores on rows stated to be unseen.

Unseen rows of different splits are equally difficult for a network, up to chance and the way the images were split.
Results are only reported. A network trained on all splits cannot be detected, since its scores do not differ.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from utils.core.workspace import SPLITS
from utils.predictions.catalog import Problem
from utils.predictions.training_data import ALL, TRAIN, TRAIN_VAL, command

CODE = "training_data_suspected"
ALPHA = 0.001
"""Probability of a false report for two splits, divided between the two tests (Bonferroni)."""
OUT_OF_FOLD = "out-of-fold"
NAMES = {split: f"rows of {split}" for split in SPLITS} | {OUT_OF_FOLD: "out-of-fold rows"}
STATEMENT_OF = {"train": TRAIN, "val": TRAIN_VAL, "test": ALL}
"""{split with suspiciously good scores: the statement that would explain them}"""


@dataclass(frozen=True)
class Scores:
    """Scores of a network on some rows."""

    n: int
    hits: int
    losses: np.ndarray | None = None
    """log-loss of each row in nats (N,), or mean of each group (G,); None if it was not stored"""
    units: int | None = None
    """Number of independent groups of the rows; None if every row is a group"""

    @property
    def accuracy(self) -> float:
        """Fraction of the rows whose most probable class is the true one."""
        return self.hits / self.n

    def independent(self) -> tuple[int, int]:
        """Numbers of independent rows and hits for exact tests; with groups, those of groups at the same accuracy."""
        return (self.n, self.hits) if self.units is None else (self.units, round(self.accuracy * self.units))


def problems(name: str, unseen: Mapping[str, Scores], out_of_fold: Scores | None = None) -> list[Problem]:
    """Contradictions between the scores of a member and its statement.

    `unseen` holds its scores on the splits that it was stated not to be trained on; `out_of_fold` those of its fold
    networks. For each pair of splits, accuracies are compared by Fisher's exact test and the rows' losses by the
    Mann-Whitney test, one-sided; a group counts as one row. Fold networks are trained on fewer images, so a split is
    suspected only if the whole interval of its error rate (Clopper and Pearson 1934) is below half of that of the
    out-of-fold rows.
    """
    reported = []
    for split, scores in unseen.items():
        for reference, other_scores in unseen.items():
            if split != reference and (reason := _too_good(scores, other_scores)):
                reported.append(_problem(name, split, reference, scores, other_scores, reason))
        if out_of_fold is not None and split != "train" and _halves_the_error(scores, out_of_fold):
            reason = f"less than half of the errors, each interval at {1 - ALPHA:.1%}"
            reported.append(_problem(name, split, OUT_OF_FOLD, scores, out_of_fold, reason))
    return reported


def _problem(name: str, split: str, reference: str, scores: Scores, others: Scores, reason: str) -> Problem:
    message = (
        f"its accuracy on the {scores.n} {NAMES[split]} is {scores.accuracy:.4f}, and {others.accuracy:.4f} on the "
        f"{others.n} {NAMES[reference]} ({reason}); it may have been trained on images of {split}"
    )
    remedy = (
        f"If it was: {command([name], STATEMENT_OF[split])}, or a file that lists them. If the images of {split} are "
        "easier, which shows with other members too, nothing has to be done"
    )
    return Problem(CODE, "warning", name, message, remedy)


def _too_good(scores: Scores, reference: Scores) -> str | None:
    """The test result by which the scores are significantly better than the reference; None if they are not."""
    from scipy.stats import hypergeom, mannwhitneyu

    (rows, hits), (other_rows, other_hits) = scores.independent(), reference.independent()
    p = float(hypergeom.sf(hits - 1, rows + other_rows, hits + other_hits, rows))
    if p < ALPHA / 2:
        return f"Fisher's exact p = {p:.1g}"
    if scores.losses is None or reference.losses is None:
        return None
    p = float(mannwhitneyu(scores.losses, reference.losses, alternative="less").pvalue)
    if p >= ALPHA / 2 or scores.losses.mean() >= reference.losses.mean():
        return None
    return f"log-loss {scores.losses.mean():.3f} and {reference.losses.mean():.3f}, Mann-Whitney p = {p:.1g}"


def _halves_the_error(scores: Scores, reference: Scores) -> bool:
    from scipy.stats import beta

    (rows, hits), (other_rows, other_hits) = scores.independent(), reference.independent()
    errors, other_errors = rows - hits, other_rows - other_hits
    highest = float(beta.ppf(1 - ALPHA / 2, errors + 1, hits)) if hits else 1.0
    lowest = float(beta.ppf(ALPHA / 2, other_errors, other_hits + 1)) if other_errors else 0.0
    return highest < lowest / 2
