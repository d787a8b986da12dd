"""Runs of an evaluation for experiment trackers: one per model in the ranking, or one for a named model."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from utils.building import ensembles
from utils.core.artifacts import digest_of, read_record
from utils.core.errors import UserError
from utils.core.workspace import Workspace
from utils.evaluation import score_plots
from utils.evaluation.evaluation_records import METRICS, RANKING

VERSION = 1  # incremented when the same scores would give different runs
REMEASURED = ("created", "latency_ms")  # keys of metrics.json that differ between evaluations with the same scores
MAX_NAME_LENGTH = 60  # characters of one part of a scalar's name; MLflow accepts 250 in total
_REMEDY = "Evaluate again with --force"


@dataclass(frozen=True)
class TrackedRun:
    """One model's evaluation."""

    name: str
    folder: str
    """Its folder below `metrics_output/ensembles`: the name, or for a member `members/<name>`."""
    tags: Mapping[str, str]
    scalars: Mapping[str, float]
    """{keys of `metrics.json` joined by `/`: number}; ends of intervals are `<key>/low` and `<key>/high`."""
    metrics_file: Path
    pictures: Mapping[str, Path]
    """{kind: PNG file}"""
    scores_digest: str
    """Digest of workspace, split, model and scores, without the keys that differ between evaluations (`REMEASURED`)."""


def of_evaluation(workspace: Workspace, split: str, model_name: str | None = None) -> list[TrackedRun]:
    """Return the runs of all models in the ranking, or of the member or ensemble `model_name`.

    Raises UserError for missing and damaged records.
    """
    if model_name is not None:
        kind = "ensemble" if model_name in ensembles.names(workspace) else "member"
        return [_run(workspace, split, model_name, kind, {})]
    ranking = _required(workspace.ranking(split), RANKING)
    recommended = {key: (ranking.get(key) or {}).get("name") for key in ("recommended", "recommended_fast")}
    runs = []
    for row in ranking["rows"]:
        tags = {key: str(row["name"] == name).lower() for key, name in recommended.items()}
        tags |= {"rank": "none" if row["rank"] is None else str(row["rank"])}
        runs.append(_run(workspace, split, row["name"], row["kind"], tags))
    return runs


def _run(workspace: Workspace, split: str, name: str, kind: str, tags: Mapping[str, str]) -> TrackedRun:
    is_ensemble = kind == "ensemble"
    folder = name if is_ensemble else f"members/{name}"
    path = (workspace.ensemble_metrics if is_ensemble else workspace.member_metrics)(name, split)
    record = _required(path, METRICS)
    pictures = [
        score_plots.Picture(plot, record, workspace.plot(folder, plot, split)) for plot in score_plots.kinds_of(record)
    ]
    pictures = [picture for picture in pictures if picture.path.is_file()]
    score_plots.draw_all(pictures)  # redraws pictures of an earlier version of the program
    scores = {key: value for key, value in record.items() if key not in REMEASURED}
    return TrackedRun(
        name,
        folder,
        {"workspace": str(workspace.root), "split": split, "model": name, "kind": kind, **tags},
        scalars(record),
        path,
        {picture.kind: picture.path for picture in pictures},
        digest_of([VERSION, str(workspace.root), folder, split, scores]),
    )


def _required(path: Path, form: Any) -> dict[str, Any]:
    record = read_record(path, remedy=_REMEDY, form=form)
    if record is None:
        raise UserError(f"{path}: missing. {_REMEDY}")
    return record


def scalars(record: Mapping[str, Any]) -> dict[str, float]:
    """Return every finite number of `metrics.json` and both ends of every interval, true as 1; no curves or matrices.

    Names consist of letters, digits, `_`, `.` and `-`, in parts joined by `/`. If names of classes become equal, the
    later ones get a number.
    """
    collected: dict[str, float] = {}
    _collect(record, "", collected)
    return collected


def _collect(values: Mapping[str, Any], prefix: str, collected: dict[str, float]) -> None:
    for part, key in zip(_names(values), values, strict=True):
        value = values[key]
        if isinstance(value, list) and len(value) == 2 and _is_interval(f"{prefix}{part}"):
            value = {"low": value[0], "high": value[1]}
        if isinstance(value, Mapping):
            _collect(value, f"{prefix}{part}/", collected)
        elif isinstance(value, int | float) and math.isfinite(value):
            collected[f"{prefix}{part}"] = float(value)


def _is_interval(name: str) -> bool:
    return any(part.endswith(("ci95", "interval")) for part in name.split("/"))


def _names(keys: Mapping[str, Any]) -> Iterator[str]:
    """Yield a distinct name for each key."""
    used: set[str] = set()
    for key in keys:
        name = plain = re.sub(r"[^\w.-]|^\.+$", "_", key)[:MAX_NAME_LENGTH] or "_"
        number = 1
        while name in used:
            number += 1
            name = f"{plain}_{number}"
        used.add(name)
        yield name
