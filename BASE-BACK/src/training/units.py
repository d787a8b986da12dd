"""Units of work and the paths of their files; imports no heavy libraries."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from config import settings
from training.recipe import Recipe


@dataclass(frozen=True)
class Unit:
    """One piece of work on one backbone."""

    kind: str
    """verify, embed, fold, oof, train, test, export or snapshots."""
    recipe: Recipe
    digest: str
    """Digest of everything that determines the outcome."""
    after: tuple[str, ...] = ()
    """Names of the units that it depends on."""
    fold: int = 0
    folds: int = 0
    first: int = 0
    """Number of the first snapshot file."""
    splits: tuple[str, ...] = ()
    """Splits whose images a unit of kind embed processes."""
    shard: int = 0
    """Index of its part of these images, below `shards`."""
    shards: int = 1

    @property
    def name(self) -> str:
        """`CustomConvNeXt fold 2`, unique in a run."""
        number = {"fold": f" {self.fold}", "embed": f" {self.shard}"}.get(self.kind, "")
        return f"{self.recipe.backbone} {self.kind}{number}"


@dataclass(frozen=True)
class Outcome:
    """Outcome of a finished unit."""

    files: tuple[Path, ...]
    result: dict[str, Any]


def checkpoint_path(backbone: str, role: str) -> Path:
    """`checkpoints/<backbone>_<role>.pth`: final, head_best, finetune_best, fold<k>, snapshot<k>."""
    return settings.CKPT_DIR / f"{backbone}_{role}.pth"


def progress_path(unit: Unit) -> Path:
    """`checkpoints/.progress/<backbone>_<train, fold<k> or snapshots>.pth`, which exists while the unit runs."""
    number = unit.fold if unit.kind == "fold" else ""
    return settings.CKPT_DIR / ".progress" / f"{unit.recipe.backbone}_{unit.kind}{number}.pth"


def oof_path(backbone: str) -> Path:
    """`kfold_results/<backbone>_oof_predictions.npz`."""
    return settings.KFOLD_DIR / f"{backbone}_oof_predictions.npz"
