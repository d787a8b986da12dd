"""Did distillation help? A student beside the same network trained alone and beside its teacher, on the same rows.

What the two others answered is kept by `distill` in `ensembles/distillation/<name>/`, for whoever scores the student.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from utils.core.artifacts import read_arrays, read_record, write_arrays
from utils.core.workspace import Workspace
from utils.numeric.metrics import accuracy, ece, log_loss, log_loss_per_row
from utils.numeric.statistics import bootstrap_means, ratio_interval

ALONE, TEACHER = "alone", "teacher"
AGAIN = "Distill again: python ensemble_orchestrator.py distill --force"


def keep(workspace: Workspace, name: str, answers: Mapping[str, Mapping[str, np.ndarray]]) -> None:
    """Keep {split: {alone, teacher: probabilities (N, C), labels (N,), sample_ids (N,)}} of a student's controls."""
    arrays = {f"{split}/{part}": array for split, parts in answers.items() for part, array in parts.items()}
    write_arrays(workspace.distillation(name) / "controls.npz", arrays)


def beside(
    workspace: Workspace, name: str, split: str, sample_ids: Sequence[str], probabilities: np.ndarray
) -> tuple[dict[str, Any], dict[str, str]]:
    """`controls` and `gain_kept` of a student's `metrics.json`, and the notes on them; nothing for what is no student.

    `probabilities` (N, C) are the student's on the rows that are scored.
    """
    record = read_record(workspace.distillation(name) / "record.json", remedy=AGAIN)
    path = workspace.distillation(name) / "controls.npz"
    if record is None or not path.is_file():
        return {}, {}
    arrays = read_arrays(path, remedy=AGAIN)
    place_of = {
        sample_id: row for row, sample_id in enumerate(arrays.get(f"{split}/sample_ids", np.array([])).tolist())
    }
    if any(sample_id not in place_of for sample_id in sample_ids):
        reason = f"the controls did not answer for these rows of {split}"
        return {"controls": None, "gain_kept": None}, {"controls": reason, "gain_kept": reason}
    rows = [place_of[sample_id] for sample_id in sample_ids]
    found = {who: arrays[f"{split}/{who}"][rows] for who in (ALONE, TEACHER)}
    labels = arrays[f"{split}/labels"][rows]
    controls = {who: record["costs"][who] | scores(each, labels) for who, each in found.items()}
    controls[TEACHER] |= {"name": record["teacher"], "agreement": agreement(probabilities, found[TEACHER])}
    kept, why = gain_kept(probabilities, found[ALONE], found[TEACHER], labels)
    said = verdict(scores(probabilities, labels), controls[ALONE], controls[TEACHER], kept)
    return {"controls": controls, "gain_kept": kept}, {"controls": said} | ({"gain_kept": why} if why else {})


def scores(probabilities: np.ndarray, labels: np.ndarray) -> dict[str, float]:
    """`{accuracy, log_loss, ece}` of probabilities (N, C)."""
    return {
        "accuracy": accuracy(probabilities, labels),
        "log_loss": log_loss(probabilities, labels),
        "ece": ece(probabilities, labels),
    }


def agreement(one: np.ndarray, other: np.ndarray) -> float:
    """Share of the rows on which two (N, C) name the same class."""
    return float((one.argmax(axis=1) == other.argmax(axis=1)).mean())


def gain_kept(
    student: np.ndarray, alone: np.ndarray, teacher: np.ndarray, labels: np.ndarray
) -> tuple[dict[str, Any], str]:
    """Share of the teacher's gain that the student keeps, and what is to be said of it.

    `(student - alone) / (teacher - alone)` in accuracy, `{value, ci95}`, and the same of log-loss under `log_loss`.
    Probabilities (N, C), labels (N,). The interval is that of the paired bootstrap, stratified by class; where the
    teacher may gain nothing, it has no bounds, since any share goes with that (Fieller 1954). `value` is null where the
    teacher is not better.
    """
    found, reasons = {}, []
    for name, of_rows in (("accuracy", _hits), ("log_loss", _losses)):
        sign, said = (1 if name == "accuracy" else -1), name.replace("_", "-")
        own, base, top = (sign * of_rows(each, labels) for each in (student, alone, teacher))
        gain, whole = float(own.mean() - base.mean()), float(top.mean() - base.mean())
        if whole <= 0:
            reasons.append(f"the teacher's {said} is not better than that of the network alone")
        bounds = ratio_interval(*bootstrap_means([own - base, top - base], labels))
        found[name] = {"value": gain / whole if whole > 0 else None, "ci95": bounds}
        if whole > 0 and None in found[name]["ci95"]:
            reasons.append(f"{len(labels)} rows do not show for certain that the teacher gains in {said}")
    return found["accuracy"] | {"log_loss": found["log_loss"]}, "; ".join(reasons)


def verdict(
    student: Mapping[str, float], alone: Mapping[str, float], teacher: Mapping[str, float], kept: Mapping[str, Any]
) -> str:
    """Whether distillation helped, in words, by scores and `gain_kept`."""
    better = [
        student["accuracy"] > alone["accuracy"],
        student["log_loss"] < alone["log_loss"],
    ]
    figures = (
        f"accuracy {student['accuracy']:.4f}, alone {alone['accuracy']:.4f}, teacher {teacher['accuracy']:.4f}; "
        f"log-loss {student['log_loss']:.4f}, alone {alone['log_loss']:.4f}, teacher {teacher['log_loss']:.4f}"
    )
    share = "" if kept["value"] is None else f"; {100 * kept['value']:.0f} % of the teacher's gain in accuracy kept"
    if all(better):
        said = "distillation helped"
    elif any(better):
        said = f"distillation helped in {'accuracy' if better[0] else 'log-loss'} alone"
    else:
        said = "distillation did not help: the same network trained alone is as good or better"
    return f"{said} ({figures}{share})"


def _hits(probabilities: np.ndarray, labels: np.ndarray) -> np.ndarray:
    return (probabilities.argmax(axis=1) == labels).astype(np.float64)


def _losses(probabilities: np.ndarray, labels: np.ndarray) -> np.ndarray:
    return log_loss_per_row(probabilities, labels)
