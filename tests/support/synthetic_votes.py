"""The synthetic workspace with three votes built, where students train on a twentieth of the images of `built`."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from conftest import made_once
from stored_predictions import workspace_at
from student_runs import config, store_of

from utils.building import build_commands, latency
from utils.core.workspace import Workspace
from utils.discovery import discover


@pytest.fixture(scope="session")
def votes(tmp_path_factory: pytest.TempPathFactory, synthetic: Path) -> Workspace:
    """A copy of the synthetic workspace after `discover` and `build-ensemble`. Shared: read it, never write into it.

    Its members state another augmentation than the default, so that it shows which one a student is trained with. Their
    latencies are stored, since every `distill` in a copy would measure them for half a second each.
    """

    def make(base: Path) -> None:
        shutil.copytree(synthetic, base, dirs_exist_ok=True)
        for path in (base / "checkpoints").glob("*_final.pth"):
            record = torch.load(path, weights_only=True)
            record["extra"]["augment"] = "no_flip"
            torch.save(record, path)
        discover.discover(config(), workspace_at(base))
        build_commands.build_ensemble(config(), workspace_at(base))
        store = store_of(workspace_at(base))
        latency.measure(store, list(store.catalog.members.values()))

    return workspace_at(made_once(tmp_path_factory, "votes", make))


@pytest.fixture
def own(tmp_path: Path, votes: Workspace) -> Workspace:
    """A copy of it to change or break."""
    return workspace_at(Path(shutil.copytree(votes.base, tmp_path / "workspace")))
