"""Predictions as another tool writes them: small, made by hand, right on most rows."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from utils.core.config_file import load_config
from utils.core.results import Result
from utils.core.workspace import Workspace
from utils.discovery import import_predictions
from utils.predictions import catalog
from utils.predictions.store import Store

CONFIG = load_config(Path(__file__).resolve().parents[2] / "configs" / "votes.yaml")
NAMES = ("bayes", "forest", "linear")

CLASSES = ("ant", "bee", "cat")
ROWS = {"oof": 60, "val": 30, "test": 30, "train": 60}
Arrays = dict[str, Any]


def arrays(stem: str, seed: int, classes: tuple[str, ...] = CLASSES) -> Arrays:
    """What one file holds; labels and ids depend on the split alone, logits on the member's `seed` as well."""
    split = {"oof": 1, "train": 1, "val": 2, "test": 3}[stem]
    labels = np.random.default_rng(split).permutation(np.arange(ROWS[stem]) % len(classes))
    rng = np.random.default_rng([seed, *map(ord, stem)])
    logits = rng.normal(size=(ROWS[stem], len(classes))) + 2.0 * np.eye(len(classes))[labels]
    ids = np.array([f"{classes[label]}/{split}{row:03d}.png" for row, label in enumerate(labels)])
    found = {"logits": logits.astype(np.float32), "labels": labels, "sample_ids": ids, "classes": np.array(classes)}
    return found | ({"fold": np.arange(ROWS[stem]) % 5} if stem == "oof" else {})


def shuffled(given: Mapping[str, Any], seed: int) -> Arrays:
    """The same predictions with rows and columns in another order."""
    rng = np.random.default_rng(seed)
    rows, columns = rng.permutation(len(given["labels"])), rng.permutation(len(given["classes"]))
    found = {key: value[rows] for key, value in given.items() if key != "classes"}
    for key in {"logits", "probabilities"} & found.keys():
        found[key] = found[key][:, columns]
    number = np.append(np.argsort(columns), -1)  # the last stands for an unknown label
    return found | {"labels": number[found["labels"]], "classes": given["classes"][columns]}


def write(
    folder: Path,
    members: Mapping[str, int] | None = None,
    stems: tuple[str, ...] = ("oof", "val", "test"),
    change: Callable[[str, str, Arrays], Arrays] = lambda name, stem, given: given,
) -> Path:
    """`folder/<member>/<stem>.npz` of members {name: seed}; `change(member, stem, arrays)` spoils what it likes."""
    for name, seed in (members or {name: seed for seed, name in enumerate(NAMES, start=1)}).items():
        (folder / name).mkdir(parents=True, exist_ok=True)
        for stem in stems:
            np.savez(folder / name / f"{stem}.npz", **change(name, stem, arrays(stem, seed)))
    return folder


def without(*keys: str) -> Callable[[Arrays], Arrays]:
    """Some arrays less."""
    return lambda given: {key: value for key, value in given.items() if key not in keys}


def fewer(rows: Any) -> Callable[[Arrays], Arrays]:
    """Some rows alone."""
    return lambda given: {key: value if key == "classes" else value[rows] for key, value in given.items()}


def changing(name: str, stem: str, alter: Callable[[Arrays], Arrays]) -> Callable[[str, str, Arrays], Arrays]:
    """A `change` of one member's one file."""
    return lambda member, file, given: alter(given) if (member, file) == (name, stem) else given


def empty_workspace(base: Path) -> Workspace:
    """A folder with nothing in it."""
    base.mkdir(parents=True, exist_ok=True)
    names = ("split_dataset", "checkpoints", "metrics_output", "kfold_results", "deployment_models", "cache", "logs")
    return Workspace(base, *(base / name for name in names))


def content(folder: Path) -> dict[Path, bytes]:
    """All files below a folder."""
    return {path.relative_to(folder): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


@contextmanager
def logged(caplog: pytest.LogCaptureFixture) -> Iterator[None]:
    """Let `caplog` hear the project's logger, which does not propagate."""
    logger = logging.getLogger("disease_pipeline")
    logger.addHandler(caplog.handler)
    try:
        yield
    finally:
        logger.removeHandler(caplog.handler)


def take_in(workspace: Workspace, folder: Path, **options: bool) -> Result:
    """`import-predictions --from folder`."""
    return import_predictions.import_predictions(CONFIG, workspace, folder=str(folder), **options)


def opened(workspace: Workspace) -> Store:
    """The prediction store of the catalog on disk."""
    return Store(CONFIG, workspace, catalog.read(workspace))


def codes(workspace: Workspace, member: str | None = None) -> set[str]:
    """Codes of what the catalog says of a member, or of all together."""
    return {problem.code for problem in catalog.read(workspace).problems if problem.member == member}
