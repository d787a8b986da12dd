"""A trained workspace with one member left, for tests to alter: its checkpoints, its predictions, what it says."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest
import torch
from conftest import PROJECT
from stored_predictions import workspace_at

from utils.core.config_file import load_config
from utils.discovery import discover
from utils.predictions import catalog

NAME = "CustomConvNeXt"


@pytest.fixture
def config():
    return load_config(PROJECT / "configs" / "votes.yaml", overrides=["device=cpu"])


@pytest.fixture
def workspace(tmp_path, trained):
    """A copy of the trained workspace with one member of three left, which is what most of these tests run."""
    others = ("CustomResNetMish", "CustomViTHybrid")
    left_out = shutil.ignore_patterns("Data", *others, *(f"{name}_*.pth" for name in others))
    return workspace_at(shutil.copytree(trained, tmp_path / "w", ignore=left_out))


def change(path, alter):
    """Rewrite a checkpoint after `alter(record)`."""
    record = torch.load(path, weights_only=True)
    alter(record)
    torch.save(record, path)


def change_oof(workspace, alter):
    path = workspace.base_oof(NAME)
    with np.load(path) as arrays:
        found = dict(arrays)
    alter(found)
    np.savez(path, **found)
    return found


def codes(workspace, member=NAME):
    return {problem.code for problem in catalog.read(workspace).problems if problem.member == member}


def classifier(record):
    weights = record["model_state_dict"]
    return [name for name, value in weights.items() if value.shape[:1] == (4,)][-2:]


def set_accuracy(workspace, accuracy):
    """Let checkpoint and metrics file claim this val accuracy."""

    def claim(record):
        record["extra"]["final_accuracy"] = record["extra"]["best_accuracy"] = accuracy

    change(workspace.checkpoint(NAME, "final"), claim)
    path = workspace.training_metrics(NAME)
    path.write_text(json.dumps(json.loads(path.read_text()) | {"final_accuracy": accuracy, "best_accuracy": accuracy}))


def codes_after(config, workspace, **options):
    discover.discover(config, workspace, **options)
    return codes(workspace)


def config_path():
    return PROJECT / "configs" / "votes.yaml"
