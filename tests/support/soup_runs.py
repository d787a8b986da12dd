"""Runs `build-ensemble` for the soups of one backbone."""

from __future__ import annotations

from pathlib import Path

import pytest
from conftest import PROJECT, made_once
from soup_zoo import NAME, one_backbone
from stored_predictions import workspace_at

from utils.building import build_commands
from utils.core.config_file import load_config
from utils.core.workspace import Workspace

SETTINGS = (
    "device=cpu",
    f"backbones.include=[{NAME}]",
    "runs.score_ensemble.methods=[soft_voting]",
    "runs.model_soup.enable=true",
    "runs.model_soup.methods=[uniform, greedy, wise_ft]",
)


ROLES = ("uniform_soup", "greedy_soup", "wise_ft")


DEMO = PROJECT / "configs" / "votes.yaml"


def config(*overrides):
    return load_config(DEMO, overrides=[*SETTINGS, *overrides])


def brew(workspace, *overrides, force=False):
    return build_commands.build_ensemble(config(*overrides), workspace, force=force)


def brewed_once(factory: pytest.TempPathFactory, trained: Path) -> Workspace:
    """A workspace of one backbone with its soups, made once per test run. Read it, never write into it."""
    return workspace_at(made_once(factory, "soups", lambda base: brew(workspace_at(one_backbone(trained, base)))))
