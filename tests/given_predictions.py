"""Predictions as another tool writes them: small, made by hand, right on most rows."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from utils.workspace import Workspace

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
    for name, seed in (members or {"bayes": 1, "forest": 2, "linear": 3}).items():
        (folder / name).mkdir(parents=True, exist_ok=True)
        for stem in stems:
            np.savez(folder / name / f"{stem}.npz", **change(name, stem, arrays(stem, seed)))
    return folder


def changing(name: str, stem: str, alter: Callable[[Arrays], Arrays]) -> Callable[[str, str, Arrays], Arrays]:
    """A `change` of one member's one file."""
    return lambda member, file, given: alter(given) if (member, file) == (name, stem) else given


def empty_workspace(base: Path) -> Workspace:
    """A folder with nothing in it."""
    base.mkdir(parents=True, exist_ok=True)
    names = ("split_dataset", "checkpoints", "metrics_output", "kfold_results", "deployment_models", "cache", "logs")
    return Workspace(base, *(base / name for name in names))
