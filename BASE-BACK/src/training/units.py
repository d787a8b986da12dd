"""Units of work and the files they leave, without the libraries that do the work."""

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
    """Of everything that decides the outcome."""
    after: tuple[str, ...] = ()
    """Names of the units that must be finished before."""
    fold: int = 0
    folds: int = 0
    first: int = 0
    """Number of the first snapshot's file."""
    splits: tuple[str, ...] = ()
    """Whose images are embedded, by a unit of the kind embed."""
    shard: int = 0
    """Which part of them, of `shards`."""
    shards: int = 1

    @property
    def name(self) -> str:
        """`CustomConvNeXt fold 2`, unique in a run."""
        number = {"fold": f" {self.fold}", "embed": f" {self.shard}"}.get(self.kind, "")
        return f"{self.recipe.backbone} {self.kind}{number}"


@dataclass(frozen=True)
class Outcome:
    """What a finished unit left behind."""

    files: tuple[Path, ...]
    result: dict[str, Any]


def checkpoint_path(backbone: str, role: str) -> Path:
    """`checkpoints/<backbone>_<role>.pth`: final, head_best, finetune_best, fold<k>, snapshot<k>."""
    return settings.CKPT_DIR / f"{backbone}_{role}.pth"


def progress_path(unit: Unit) -> Path:
    """`checkpoints/.progress/<backbone>_<train, fold<k> or snapshots>.pth`, there while the unit is under way."""
    number = unit.fold if unit.kind == "fold" else ""
    return settings.CKPT_DIR / ".progress" / f"{unit.recipe.backbone}_{unit.kind}{number}.pth"


def oof_path(backbone: str) -> Path:
    """`kfold_results/<backbone>_oof_predictions.npz`."""
    return settings.KFOLD_DIR / f"{backbone}_oof_predictions.npz"
