"""What the distillation benchmark says of its trainings: rows with intervals over the images, and learning curves."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from distillation_runs import ALONE, CONSISTENT, TEACHER, VIEWS

from reporting import interval, row

COLOURS = {ALONE: "#b0532a", CONSISTENT: "#1f5f8b", VIEWS: "#3a8f5c"}
METRICS = ("accuracy", "log_loss")
KEPT_GOAL = 0.6
TIME_GOALS = {CONSISTENT: 3.0, VIEWS: 1.3}
"""CPU seconds of a student's training, its teacher's passes included, in those of the network alone."""
NONE = (None, None, None)  # neither goal nor peer


@dataclass(frozen=True)
class Trained:
    """All trainings of one fold: of each arm one per seed, and of the teacher."""

    labels: Mapping[str, np.ndarray]
    """{val, test: labels (N,)}"""
    probabilities: Mapping[str, Mapping[str, np.ndarray]]
    """{alone, consistent, ..., teacher: {val, test: probabilities (K, N, C) of K seeds}}"""
    seconds: Mapping[str, Sequence[float]]
    """CPU seconds of each training"""
    curves: Mapping[str, Sequence[Mapping[str, np.ndarray]]]
    """val_accuracy and val_log_loss by epoch of each training"""


def image_scores(folds: Sequence[Trained], arm: str) -> dict[str, np.ndarray]:
    """Scores (N,) of the test images of all folds, means over the seeds: hits, and log-likelihoods in nats.

    Each training is calibrated by the temperature of least log-loss on the val images of its fold.
    """
    from utils.numeric.metrics import clipped_log, log_loss_per_row, softmax
    from utils.numeric.temperature import fit_temperature

    hits, likelihoods = [], []
    for fold in folds:
        of_arm, labels = fold.probabilities[arm], fold.labels
        pairs = list(zip(of_arm["val"], of_arm["test"], strict=True))
        hits.append(np.mean([test.argmax(axis=1) == labels["test"] for _, test in pairs], axis=0))
        scaled = [softmax(clipped_log(test) / fit_temperature(clipped_log(val), labels["val"])) for val, test in pairs]
        likelihoods.append(-np.mean([log_loss_per_row(each, labels["test"]) for each in scaled], axis=0))
    return {"accuracy": np.concatenate(hits), "log_loss": np.concatenate(likelihoods)}


def score_rows(name: str, folds: Sequence[Trained]) -> list[dict]:
    """Scores, gains over the network alone, fractions of the teacher's gain and times of one student."""
    arms = [arm for arm in folds[0].probabilities if arm not in (ALONE, TEACHER)]
    of_arm = {arm: image_scores(folds, arm) for arm in (ALONE, *arms, TEACHER)}
    n_images, seeds = len(of_arm[ALONE]["accuracy"]), min(len(fold.seconds[ALONE]) for fold in folds)
    rows = [row(f"{name}: test images in {len(folds)} folds, {seeds} seeds or more", n_images, "", *NONE)]
    for metric in METRICS:
        is_loss = metric == "log_loss"
        title, unit = ("calibrated log-loss", "nats") if is_loss else ("accuracy", "")
        for arm, scores in of_arm.items():
            rows.append(row(f"{name}, {title}: {arm}", float(scores[metric].mean()) * (-1) ** is_loss, unit, *NONE))
        teacher_gain = of_arm[TEACHER][metric] - of_arm[ALONE][metric]
        rows.append(_gain_row(f"{name}, {title}: gain of the teacher over the network alone", teacher_gain, unit, None))
        for arm in arms:
            gain = of_arm[arm][metric] - of_arm[ALONE][metric]
            what = f"{name}, {title}: gain of the student ({arm}) over the network alone"
            rows.append(_gain_row(what, gain, unit, "interval above 0"))
            rows.append(_kept_row(f"{name}, {title}: fraction of that gain kept ({arm})", gain, teacher_gain))
    for arm in arms:
        ratio = float(np.sum([fold.seconds[arm] for fold in folds]) / np.sum([fold.seconds[ALONE] for fold in folds]))
        goal = TIME_GOALS[arm]
        rows.append(row(f"{name}: CPU time ({arm}), in that of alone", ratio, "", f"<= {goal}", ratio <= goal, None))
    return rows


def _gain_row(what: str, gain: np.ndarray, unit: str, goal: str | None) -> dict:
    bounds = interval(gain.tolist())
    assert bounds is not None
    text = f"95% interval {bounds[0]:.4f} to {bounds[1]:.4f}"
    return row(what, float(gain.mean()), unit, goal, bool(bounds[0] > 0) if goal else None, text)


def _kept_row(what: str, gain: np.ndarray, teacher_gain: np.ndarray) -> dict:
    """The fraction has no figure where the interval of the teacher's gain contains 0."""
    from utils.numeric.means import ratio_interval

    bounds, goal = ratio_interval(gain, teacher_gain), f">= {KEPT_GOAL}"
    if bounds is None:
        return row(what, None, "", goal, None, "the interval of the teacher's gain contains 0")
    fraction = float(gain.mean() / teacher_gain.mean())
    text = f"95% interval {bounds[0]:.2f} to {bounds[1]:.2f} (Fieller)"
    return row(what, fraction, "", goal, fraction >= KEPT_GOAL, text)


def draw(folds: Sequence[Trained], file: Path, title: str) -> None:
    """Accuracy and log-loss on val by epoch: thin lines for trainings, thick ones for their mean."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, 2, figsize=(9, 3.4), dpi=110)
    for axis, key, label in zip(axes, ("val_accuracy", "val_log_loss"), ("accuracy", "log-loss, nats"), strict=True):
        for arm in folds[0].curves:
            curves = [curve[key] for fold in folds for curve in fold.curves[arm]]
            epochs = range(1, len(curves[0]) + 1)
            for curve in curves:
                axis.plot(epochs, curve, color=COLOURS[arm], alpha=0.2, linewidth=0.8)
            axis.plot(epochs, np.mean(curves, axis=0), color=COLOURS[arm], label=arm)
        axis.set_xlabel("epoch")
        axis.set_ylabel(f"{label} on val")
    axes[1].set_yscale("log")
    axes[0].legend(frameon=False)
    figure.suptitle(title)
    figure.tight_layout()
    file.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(file)
