"""The base pipeline's training records of a backbone, and the problems with them."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from utils.core.artifacts import read_json
from utils.core.workspace import Workspace
from utils.predictions.catalog import LAST_EPOCH, VERIFY, Problem

DIFFERS = 0.005  # accuracies that differ by more than half a percentage point contradict each other
SLACK_S = 60.0  # a record older than its checkpoint by more seconds belongs to an earlier training
OUTPUT_NUMBER = re.compile("[0-9]{1,6}")
NO_METRICS = "no_metrics"
AGAIN = "Train the backbone again, or remove the file"


@dataclass(frozen=True)
class TrainingRecord:
    """The recorded metrics of one backbone; None for missing values."""

    path: Path | None
    """The metrics file, if there is one"""
    accuracy: float | None
    """Val accuracy of the member's checkpoint"""
    test_accuracy: float | None
    exports: tuple[str, ...]
    problems: tuple[Problem, ...]


def read(
    workspace: Workspace,
    backbone: str,
    *,
    stage: str,
    checkpoint: Path,
    checkpoint_accuracy: float | None,
    siblings: Mapping[str, Any],
) -> TrainingRecord:
    """Read the records of `checkpoint`, the backbone's checkpoint of `stage`.

    `checkpoint_accuracy` is recorded in the checkpoint, `siblings` {stage: accuracy} in those of the backbone's other
    stages. In the metrics file, only `final_accuracy` describes `final`; `best_accuracy` may belong to an epoch without
    a checkpoint. Raises UserError for a damaged record.
    """
    path = workspace.training_metrics(backbone)
    metrics = read_json(path, remedy=AGAIN)
    metrics = metrics if isinstance(metrics, dict) else None
    problems: list[Problem] = []
    accuracy = checkpoint_accuracy
    if metrics is None:
        message = f"no {path.name}, so what was measured in training is unknown"
        problems.append(Problem(NO_METRICS, "info", backbone, message, "nothing to do"))
    elif stage == "final":
        written = _number(metrics.get("final_accuracy"))
        stale = _stale(path, checkpoint, written, checkpoint_accuracy)
        if stale is not None:
            problems.append(Problem("stale_metrics", "warning", backbone, stale, f"{VERIFY} measures it"))
        else:
            accuracy = written
        best = _best_not_kept(metrics, accuracy, siblings, checkpoint)
        if best is not None:
            remedy = f"its ensembles are judged by what the file itself gives; {VERIFY} measures it"
            problems.append(Problem("best_accuracy_not_kept", "warning", backbone, best, remedy))
    kfold = kfold_over_all_images(workspace, backbone)
    problems += [kfold] if kfold is not None else []
    return TrainingRecord(
        path=path if metrics is not None else None,
        accuracy=accuracy,
        test_accuracy=_test_accuracy(workspace, backbone, metrics or {}),
        exports=_exports(workspace, backbone),
        problems=tuple(problems),
    )


def _number(value: object) -> float | None:
    return float(value) if isinstance(value, int | float) and not isinstance(value, bool) else None


def _stale(path: Path, checkpoint: Path, written: float | None, checkpoint_accuracy: float | None) -> str | None:
    """The reason why the metrics file does not describe the checkpoint; None if nothing contradicts it.

    The accuracy in the checkpoint is compared; modification times, which copying may change, only without it.
    """
    if checkpoint_accuracy is not None and written is not None:
        if abs(checkpoint_accuracy - written) <= DIFFERS:
            return None
        return (
            f"{path.name} has the accuracy {written:.4f}, {checkpoint.name} itself {checkpoint_accuracy:.4f}; "
            "the file's own counts"
        )
    older = checkpoint.stat().st_mtime - path.stat().st_mtime
    if older <= SLACK_S:
        return None
    return f"{path.name} is {older / 60:.0f} minutes older than {checkpoint.name}, so it describes another training"


def _best_not_kept(
    metrics: Mapping[str, Any], accuracy: float | None, siblings: Mapping[str, Any], checkpoint: Path
) -> str | None:
    if metrics.get("selection") == LAST_EPOCH:
        return None  # the last epoch is kept by design, regardless of val accuracies
    best = _number(metrics.get("best_accuracy"))
    if best is None or accuracy is None or abs(best - accuracy) <= DIFFERS:
        return None
    holders = [stage for stage, value in siblings.items() if value is not None and abs(value - best) < 1e-6]
    where = (
        f"{best:.4f} is that of {checkpoint.name.replace('_final', '_' + holders[0])}"
        if holders
        else f"{best:.4f} belongs to an epoch that was not kept"
    )
    return f"{checkpoint.name} holds the last epoch, whose accuracy is {accuracy:.4f}; {where}"


def _test_accuracy(workspace: Workspace, backbone: str, metrics: Mapping[str, Any]) -> float | None:
    """Test accuracy from the metrics file, else the summary of the last run, else the recovery state."""
    summary = read_json(workspace.pipeline_summary, remedy=AGAIN) or {}
    state = read_json(workspace.recovery_state, remedy=AGAIN) or {}
    records = (
        metrics,
        _inner(summary, "training_results", backbone, "final_metrics"),
        _inner(state, "results", backbone, "metrics"),
    )
    accuracies = (_number(record.get("test_accuracy")) for record in records)
    return next((accuracy for accuracy in accuracies if accuracy is not None), None)


def _inner(record: Any, *keys: str) -> dict[str, Any]:
    """The dictionary below `keys`, or an empty one if the record has another structure."""
    for key in keys:
        record = record.get(key) if isinstance(record, dict) else None
    return record if isinstance(record, dict) else {}


def _exports(workspace: Workspace, backbone: str) -> tuple[str, ...]:
    record = _inner(read_json(workspace.deployment / backbone / "export_status.json", remedy="Export again"))
    done = (form for form, entry in record.items() if isinstance(entry, dict) and entry.get("status") == "ok")
    return tuple(sorted(done))


def kfold_over_all_images(workspace: Workspace, backbone: str) -> Problem | None:
    """The problem of a K-fold record without predictions: it covers the raw folder, including val and test images."""
    path = workspace.kfold_results(backbone)
    record = read_json(path, remedy=AGAIN)
    if not isinstance(record, dict) or "oof_file" in record or "split_digest" in record:
        return None
    mean = _number(record.get("mean_accuracy"))
    figure = f"its mean accuracy {mean:.4f} " if mean is not None else "its accuracy "
    message = (
        f"its K-fold ({path.name}) ran over the raw folder, val and test images included, and kept no predictions; "
        f"{figure}is no estimate for this split"
    )
    return Problem("kfold_over_all_images", "info", backbone, message, "nothing to do; it is not used")


def class_mapping(workspace: Workspace, backbone: str) -> tuple[str, ...] | None:
    """Class names in the order of the outputs, from an export's record; None without a record or with placeholders."""
    record = read_json(workspace.class_mapping(backbone), remedy="Export again")
    if not isinstance(record, dict) or not all(OUTPUT_NUMBER.fullmatch(key) for key in record):
        return None
    names = tuple(str(record[key]) for key in sorted(record, key=int))
    placeholders = tuple(f"class_{number}" for number in range(len(names)))
    return None if names == placeholders or not names else names
