"""The two controls of a student, its teacher and the same network trained without a teacher, on the same rows.

`distill` stores their predictions in `ensembles/distillation/<name>/`; `evaluate` scores the student against them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from utils.core.artifacts import read_arrays, read_record, write_arrays
from utils.core.workspace import Workspace
from utils.numeric.metrics import accuracy, ece, log_loss, log_loss_per_row
from utils.numeric.paired_comparison import CANNOT_TELL, compare_models
from utils.numeric.statistics import bootstrap_means, ratio_interval

ALONE, TEACHER = "alone", "teacher"
"""Keys of the controls: the same network trained without a teacher, and the teacher."""
REMEDY = "Distill again: python ensemble_orchestrator.py distill --force"


def write_controls(workspace: Workspace, name: str, predictions: Mapping[str, Mapping[str, np.ndarray]]) -> None:
    """Write {split: {alone, teacher: probabilities (N, C), labels (N,), sample_ids (N,)}} of a student's controls."""
    arrays = {f"{split}/{key}": array for split, parts in predictions.items() for key, array in parts.items()}
    write_arrays(workspace.distillation(name) / "controls.npz", arrays)


@dataclass(frozen=True)
class Controls:
    """What a student is compared with: its record, and the predictions of its teacher and of its baseline."""

    record: Mapping[str, Any]
    arrays: Mapping[str, np.ndarray]
    """{split/alone, split/teacher: probabilities (N, C); split/labels, split/sample_ids: (N,)}"""


def read_controls(workspace: Workspace, name: str) -> Controls | None:
    """The controls of a student; None for other ensembles."""
    record = read_record(workspace.distillation(name) / "record.json", remedy=REMEDY)
    path = workspace.distillation(name) / "controls.npz"
    if record is None or not path.is_file():
        return None
    return Controls(record, read_arrays(path, remedy=REMEDY))


def control_metrics(
    stored: Controls,
    split: str,
    sample_ids: Sequence[str],
    probabilities: np.ndarray,
    groups: np.ndarray | None = None,
) -> tuple[dict[str, Any], dict[str, str]]:
    """`controls` and `gain_kept` for a student's `metrics.json`, and the notes on them.

    `probabilities` (N, C) are the student's on the rows `sample_ids`, whose `groups` (N,) are independent.
    """
    record, arrays = stored.record, stored.arrays
    stored_ids = arrays.get(f"{split}/sample_ids", np.array([])).tolist()
    row_of = {sample_id: row for row, sample_id in enumerate(stored_ids)}
    if any(sample_id not in row_of for sample_id in sample_ids):
        reason = f"the controls have no predictions for these rows of {split}"
        return {"controls": None, "gain_kept": None}, {"controls": reason, "gain_kept": reason}
    rows = [row_of[sample_id] for sample_id in sample_ids]
    predictions = {key: arrays[f"{split}/{key}"][rows] for key in (ALONE, TEACHER)}
    labels = arrays[f"{split}/labels"][rows]
    controls = {key: record["costs"][key] | scores(each, labels) for key, each in predictions.items()}
    controls[TEACHER] |= {"name": record["teacher"], "agreement": agreement(probabilities, predictions[TEACHER])}
    gain, reason = gain_kept(probabilities, predictions[ALONE], predictions[TEACHER], labels, groups)
    text = verdict(probabilities, predictions[ALONE], predictions[TEACHER], labels, gain, groups)
    return {"controls": controls, "gain_kept": gain}, {"controls": text} | ({"gain_kept": reason} if reason else {})


def scores(probabilities: np.ndarray, labels: np.ndarray) -> dict[str, float]:
    """`{accuracy, log_loss, ece}` of probabilities (N, C)."""
    return {
        "accuracy": accuracy(probabilities, labels),
        "log_loss": log_loss(probabilities, labels),
        "ece": ece(probabilities, labels),
    }


def agreement(probabilities: np.ndarray, reference: np.ndarray) -> float:
    """Fraction of the rows for which two arrays (N, C) predict the same class."""
    return float((probabilities.argmax(axis=1) == reference.argmax(axis=1)).mean())


def gain_kept(
    student: np.ndarray, alone: np.ndarray, teacher: np.ndarray, labels: np.ndarray, groups: np.ndarray | None = None
) -> tuple[dict[str, Any], str]:
    """Fraction of the teacher's gain that the student keeps, and the reasons why it or its bounds are undefined.

    `(student - alone) / (teacher - alone)` in accuracy, `{value, ci95}`, and the same in log-loss under `log_loss`.
    Probabilities (N, C), labels (N,). The interval is that of the paired bootstrap of rows, stratified by class, or of
    groups (N,). It has no
    bounds where a gain of zero is within the teacher's interval, since any fraction is then possible (Fieller 1954).
    `value` is None where the teacher is not better than the network trained alone.
    """
    gains, reasons = {}, []
    for name, of_rows in (("accuracy", _hits), ("log_loss", log_loss_per_row)):
        sign, spoken = (1 if name == "accuracy" else -1), name.replace("_", "-")
        student_rows, alone_rows, teacher_rows = (sign * of_rows(each, labels) for each in (student, alone, teacher))
        student_gain = float(student_rows.mean() - alone_rows.mean())
        teacher_gain = float(teacher_rows.mean() - alone_rows.mean())
        if teacher_gain <= 0:
            reasons.append(f"the teacher's {spoken} is not better than that of the network trained without a teacher")
        differences = [student_rows - alone_rows, teacher_rows - alone_rows]
        bounds = ratio_interval(*bootstrap_means(differences, labels, groups))
        gains[name] = {"value": student_gain / teacher_gain if teacher_gain > 0 else None, "ci95": bounds}
        if teacher_gain > 0 and None in bounds:
            reasons.append(f"{len(labels)} rows are too few to establish that the teacher gains in {spoken}")
    return gains["accuracy"] | {"log_loss": gains["log_loss"]}, "; ".join(reasons)


def verdict(
    student: np.ndarray,
    alone: np.ndarray,
    teacher: np.ndarray,
    labels: np.ndarray,
    gain: Mapping[str, Any],
    groups: np.ndarray | None = None,
) -> str:
    """One sentence on whether distillation helped, from probabilities (N, C), labels (N,) and `gain_kept`.

    It helped, or harmed, in a metric whose paired interval does not contain 0; groups (N,) are independent.
    """
    compared = compare_models(student, alone, labels, groups)
    of_each = [scores(probabilities, labels) for probabilities in (student, alone, teacher)]
    figures = "; ".join(
        f"{name.replace('_', '-')} {values[0]:.4f}, alone {values[1]:.4f}, teacher {values[2]:.4f}"
        for name in ("accuracy", "log_loss")
        for values in ([model[name] for model in of_each],)
    )
    fraction = "" if gain["value"] is None else f"; {100 * gain['value']:.0f} % of the teacher's gain in accuracy kept"
    if compared.better:
        in_what = "" if len(compared.better) == 2 else f" in {compared.better[0]}"
        text = f"distillation helped{in_what}" + (f" and harmed in {compared.worse[0]}" if compared.worse else "")
    elif compared.worse:
        text = f"distillation harmed in {' and '.join(compared.worse)}: the same network trained alone is better"
    else:
        text = f"the student {CANNOT_TELL} from the same network trained alone"
    return f"{text} ({figures}{fraction})"


def _hits(probabilities: np.ndarray, labels: np.ndarray) -> np.ndarray:
    hits: np.ndarray = (probabilities.argmax(axis=1) == labels).astype(np.float64)
    return hits
