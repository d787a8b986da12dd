"""Workspaces with stored predictions of trained members."""

from __future__ import annotations

from pathlib import Path

from utils.core.workspace import Workspace

CONFIG = Path(__file__).resolve().parents[2] / "configs" / "votes.yaml"


def workspace_at(base: Path) -> Workspace:
    names = (
        "split_dataset",
        "checkpoints",
        "metrics_output",
        "kfold_results",
        "deployment_models",
        "image_cache",
        "logs",
    )
    return Workspace(base, *(base / name for name in names))
