"""The scores of every method in several workspaces, read from the records of `evaluate`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from utils.core.artifacts import read_record
from utils.core.errors import UserError
from utils.evaluation.evaluation_records import METRICS, RANKING

AGAIN = "Run evaluate --force in that workspace"
BEST_SINGLE, RECOMMENDED = "best_single", "recommended"
"""Methods of each workspace: its best single member, and its recommended model."""
MIN_WORKSPACES = 2


@dataclass(frozen=True)
class WorkspaceScores:
    """Scores of the methods in one workspace."""

    name: str
    folder: Path
    n_rows: int
    classes: tuple[str, ...]
    scores: Mapping[str, float | None]
    """{method: value of the metric}; None if it could not be measured"""
    chosen: Mapping[str, str]
    """{`best_single`, `recommended`: name of the model}"""


def read_workspaces(folders: Sequence[str], split: str, metric: str) -> list[WorkspaceScores]:
    """Read each workspace once.

    Raises UserError for fewer than two, for a repeated one, and for one that is not evaluated.
    """
    paths = [Path(folder).expanduser().absolute() for folder in folders]
    for path in paths:
        if [other.resolve() for other in paths].count(path.resolve()) > 1:
            raise UserError(f"{path}: given twice; expected different workspaces, each once")
    if len(paths) < MIN_WORKSPACES:
        raise UserError(
            f"compare {' '.join(folders)}: one workspace; expected two or more that hold the same methods. Within one "
            "workspace, `evaluate` compares its methods"
        )
    names = _names(paths)
    return [_read(path, name, split, metric) for path, name in zip(paths, names, strict=True)]


def _names(paths: Sequence[Path]) -> list[str]:
    """Return the last parts of the paths, as few as make the names distinct."""
    for parts in range(1, max(len(path.parts) for path in paths)):
        names = ["/".join(path.parts[-parts:]) for path in paths]
        if len(set(names)) == len(names):
            return names
    return [str(path) for path in paths]


def _read(folder: Path, name: str, split: str, metric: str) -> WorkspaceScores:
    suffix = "" if split == "test" else f"_{split}"
    folders = [folder / "metrics_output" / "ensembles", folder]
    scores = next((path for path in folders if (path / f"ranking{suffix}.json").is_file()), None)
    if scores is None:
        raise UserError(
            f"{folders[0] / f'ranking{suffix}.json'}: no such file; expected a workspace whose {split} split is "
            f"evaluated. Run: python ensemble_orchestrator.py evaluate --workspace {folder}"
            f"{'' if split == 'test' else f' --split {split}'}"
        )
    ranking = read_record(scores / f"ranking{suffix}.json", remedy=AGAIN, form=RANKING)
    assert ranking is not None, "the file is there"
    records = {row["name"]: _record(scores, row, suffix) for row in ranking["rows"] if row["rank"] is not None}
    if not records:
        raise UserError(f"{scores / f'ranking{suffix}.json'}: no ranked model; expected at least two. {AGAIN}")
    chosen = {BEST_SINGLE: ranking["peers"].get("best_single"), RECOMMENDED: ranking["recommended"]["name"]}
    chosen = {method: model for method, model in chosen.items() if model in records}
    models = {**{model: model for model in records}, **chosen}
    first = next(iter(records.values()))
    return WorkspaceScores(
        name,
        folder,
        first["n_samples"],
        tuple(first["per_class"]),
        {method: _value(records[model], metric, scores) for method, model in models.items()},
        chosen,
    )


def _record(scores: Path, row: Mapping[str, Any], suffix: str) -> dict[str, Any]:
    folder = scores / row["name"] if row["kind"] == "ensemble" else scores / "members" / row["name"]
    record = read_record(folder / f"metrics{suffix}.json", remedy=AGAIN, form=METRICS)
    if record is None:
        raise UserError(f"{folder / f'metrics{suffix}.json'}: no such file, though ranked. {AGAIN}")
    return record


def _value(record: Mapping[str, Any], metric: str, scores: Path) -> float | None:
    if metric not in record:
        raise UserError(f"{scores}: {record['name']} has no {metric}, as evaluated by an earlier version. {AGAIN}")
    return None if record[metric] is None else float(record[metric])
