"""What the distillation benchmark says of its outcomes: rows with intervals over the splits, and learning curves."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from reporting import interval, ratio_interval, row

ALONE, TEACHER = "alone", "teacher"
COLOURS = ("#b0532a", "#1f5f8b", "#3a8f5c", "#8a6bb0")
NONE = (None, None, None)  # neither goal nor peer


Outcome = Mapping[str, Mapping[str, Any]]
"""Who -> `scores`, `agreement` and `history` of a student, `scores`, `oof` and `entropy` of the teacher."""


def averaged(entries: Sequence[Outcome]) -> dict[str, dict[str, Any]]:
    """One outcome of several trainings on one split: means, and all learning curves under `history`."""
    found: dict[str, dict[str, Any]] = {}
    for who, first in entries[0].items():
        every = [entry[who] for entry in entries]
        metrics = first["scores"]
        found[who] = {**first, "scores": {name: _mean([one["scores"] for one in every], name) for name in metrics}}
        if who != TEACHER:
            found[who] |= {"agreement": _mean(every, "agreement"), "history": [one["history"] for one in every]}
    return found


def _mean(found: Sequence[Mapping[str, float]], name: str) -> float:
    return float(np.mean([one[name] for one in found]))


def score_rows(outcomes: Sequence[Outcome]) -> list[dict]:
    """Means over the splits, with Student's interval, and Fieller's of the shares."""
    splits, students = f"over {len(outcomes)} splits", _students(outcomes)
    found = []
    for metric, sign in (("accuracy", 1), ("log_loss", -1)):
        of = {who: np.array([entry[who]["scores"][metric] for entry in outcomes]) for who in outcomes[0]}
        whole = sign * (of[TEACHER] - of[ALONE])
        name, unit = metric.replace("_", "-"), "nats" if metric == "log_loss" else "share"
        found += [row(f"{name} {splits}: {who}", float(of[who].mean()), unit, *NONE) for who in of]
        found.append(
            row(f"{name}: gain of the teacher over the network alone", whole.mean(), unit, None, None, _gain(whole))
        )
        for who in students:
            gain = sign * (of[who] - of[ALONE])
            what = f"{name}: gain of the student ({who}) over the network alone"
            found.append(row(what, gain.mean(), unit, "> 0", bool(gain.mean() > 0), _gain(gain)))
            found.append(_share_row(f"{name}: share of the teacher's gain kept by the student ({who})", gain, whole))
    for who in (ALONE, *students):
        share = _mean([entry[who] for entry in outcomes], "agreement")
        found.append(row(f"agreement with the teacher: {who}", share, "share", *NONE))
    teachers = [entry[TEACHER] for entry in outcomes]
    for metric, unit in (("accuracy", "share"), ("log_loss", "nats")):
        what = f"{metric.replace('_', '-')} of the teacher's cross-fitted targets, train rows"
        found.append(row(what, _mean([one["oof"] for one in teachers], metric), unit, *NONE))
    return [*found, row("entropy of these targets", _mean(teachers, "entropy"), "nats", *NONE)]


def _students(outcomes: Sequence[Outcome]) -> list[str]:
    return [who for who in outcomes[0] if who not in (ALONE, TEACHER)]


def _gain(gain: np.ndarray) -> str:
    bounds = interval(gain.tolist())
    around = "no interval of one split" if bounds is None else f"95 % interval {bounds[0]:.4f} to {bounds[1]:.4f}"
    return f"{around}; better in {int((gain > 0).sum())} of {len(gain)}"


def _share_row(what: str, gain: np.ndarray, whole: np.ndarray) -> dict:
    if whole.mean() <= 0:
        return row(what, None, "", ">= 0.5", None, "the teacher gains nothing")
    share, bounds = gain.mean() / whole.mean(), ratio_interval(gain.tolist(), whole.tolist())
    beside = (
        "no bounds: the teacher does not gain for certain"
        if bounds is None
        else f"95 % interval {bounds[0]:.2f} to {bounds[1]:.2f}"
    )
    return row(what, share, "", ">= 0.5", bool(share >= 0.5), beside)


def draw(outcomes: Sequence[Outcome], file: Path, title: str) -> None:
    """Accuracy and log-loss on val by epoch: thin lines for trainings, thick ones for their mean."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, 2, figsize=(9, 3.4), dpi=110)
    for axis, key, label in zip(axes, ("val_accuracy", "val_log_loss"), ("accuracy", "log-loss, nats"), strict=True):
        for who, colour in zip((ALONE, *_students(outcomes)), COLOURS, strict=False):
            curves = [[epoch[key] for epoch in one] for entry in outcomes for one in entry[who]["history"]]
            for curve in curves:
                axis.plot(range(1, len(curve) + 1), curve, color=colour, alpha=0.2, linewidth=0.8)
            shortest = min(map(len, curves))
            mean = np.mean([curve[:shortest] for curve in curves], axis=0)
            axis.plot(range(1, shortest + 1), mean, color=colour, label=who)
        axis.set_xlabel("epoch")
        axis.set_ylabel(f"{label} on val")
    axes[1].set_yscale("log")
    axes[0].legend(frameon=False)
    figure.suptitle(title)
    figure.tight_layout()
    file.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(file)
