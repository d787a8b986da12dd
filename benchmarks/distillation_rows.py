"""What the distillation benchmark says of its outcomes: rows with intervals over the splits, and learning curves."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from reporting import interval, ratio_interval, row

ALONE, TEACHER = "alone", "teacher"
COLOURS = ("#b0532a", "#1f5f8b", "#3a8f5c")
NONE = (None, None, None)  # neither goal nor peer


def averaged(entries: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """One outcome of several trainings on one split: means, and all learning curves."""
    first = entries[0]

    def mean(part: str, who: str, metric: str) -> float:
        return float(np.mean([entry[part][who][metric] for entry in entries]))

    return {
        **{name: first[name] for name in ("entropy", "oof")},
        "scores": {who: {name: mean("scores", who, name) for name in found} for who, found in first["scores"].items()},
        "agreement": {
            who: float(np.mean([entry["agreement"][who] for entry in entries])) for who in first["agreement"]
        },
        "history": {who: [entry["history"][who] for entry in entries] for who in first["history"]},
    }


def score_rows(outcomes: Sequence[Mapping[str, Any]]) -> list[dict]:
    """Means over the splits, with Student's interval, and Fieller's of the shares."""
    splits, students = f"over {len(outcomes)} splits", _students(outcomes)
    found = []
    for metric, sign in (("accuracy", 1), ("log_loss", -1)):
        of = {who: np.array([entry["scores"][who][metric] for entry in outcomes]) for who in outcomes[0]["scores"]}
        whole = sign * (of[TEACHER] - of[ALONE])
        name, unit = metric.replace("_", "-"), "nats" if metric == "log_loss" else "share"
        found += [row(f"{name} {splits}: {who}", float(of[who].mean()), unit, *NONE) for who in of]
        found.append(
            row(f"{name}: gain of the teacher over the network alone", whole.mean(), unit, None, None, _gain(whole))
        )
        for who in students:
            gain = sign * (of[who] - of[ALONE])
            what = f"{name}: gain of the {who} over the network alone"
            found.append(row(what, gain.mean(), unit, "> 0", bool(gain.mean() > 0), _gain(gain)))
            found.append(_share_row(f"{name}: share of the teacher's gain kept by the {who}", gain, whole))
    for who in (ALONE, *students):
        share = np.mean([entry["agreement"][who] for entry in outcomes])
        found.append(row(f"agreement with the teacher: {who}", share, "share", *NONE))
    for metric, unit in (("accuracy", "share"), ("log_loss", "nats")):
        mean = np.mean([entry["oof"][metric] for entry in outcomes])
        found.append(
            row(f"{metric.replace('_', '-')} of the teacher's targets (train rows, cross-fitted)", mean, unit, *NONE)
        )
    entropy = np.mean([entry["entropy"] for entry in outcomes])
    return [*found, row("entropy of the teacher's targets", entropy, "nats", *NONE)]


def _students(outcomes: Sequence[Mapping[str, Any]]) -> list[str]:
    return [who for who in outcomes[0]["scores"] if who not in (ALONE, TEACHER)]


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


def draw(outcomes: Sequence[Mapping[str, Any]], file: Path, title: str) -> None:
    """Accuracy and log-loss on val by epoch: thin lines for trainings, thick ones for their mean."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, 2, figsize=(9, 3.4), dpi=110)
    for axis, key, label in zip(axes, ("val_accuracy", "val_log_loss"), ("accuracy", "log-loss, nats"), strict=True):
        for who, colour in zip((ALONE, *_students(outcomes)), COLOURS, strict=False):
            curves = [[epoch[key] for epoch in one] for entry in outcomes for one in entry["history"][who]]
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
