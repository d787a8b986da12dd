"""A workspace in which everything is built, for tests to age, litter or break, and the commands that look after it."""

from __future__ import annotations

from pathlib import Path

import in_process
import pytest
from conftest import PROJECT

from utils.core.config_file import load_config
from utils.core.workspace import Workspace
from utils.operations import inventory, upkeep

CONFIG = PROJECT / "configs" / "votes.yaml"
DEMO = ("--config", "configs/votes.yaml")
NAMES = ("split_dataset", "checkpoints", "metrics_output", "kfold_results", "deployment_models", "image_cache", "logs")


def at(base: Path) -> Workspace:
    return Workspace(base, *(base / name for name in NAMES))


@pytest.fixture
def workspace(own_copy) -> Workspace:
    return at(own_copy)


def look(workspace: Workspace, *overrides: str) -> inventory.Inventory:
    return inventory.take(load_config(CONFIG, overrides=overrides), workspace)


def status(workspace: Workspace, *overrides: str):
    return upkeep.status(load_config(CONFIG, overrides=overrides), workspace)


def clean(workspace: Workspace, **options: bool):
    return upkeep.clean(load_config(CONFIG), workspace, **options)


def files(folder: Path) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def run(base: Path, *options: str) -> in_process.Done:
    return in_process.run(*options, *DEMO, workspace=base)
