"""A trained workspace with one backbone, and its configuration."""

from __future__ import annotations

import shutil

from conftest import PROJECT
from stored_predictions import workspace_at

from utils.core.config_file import load_config
from utils.discovery import discover

NAME = "CustomResNetMish"


def one_backbone(trained, base):
    """A copy of the trained workspace with one backbone in it, discovered."""
    shutil.copytree(trained, base, ignore=shutil.ignore_patterns("Data"), dirs_exist_ok=True)
    for path in (base / "checkpoints").glob("*.pth"):
        if not path.name.startswith(NAME) or "fold1" in path.name:
            path.unlink()
    discover.discover(config(), workspace_at(base))
    return base


def config(*overrides):
    return load_config(PROJECT / "configs" / "votes.yaml", overrides=["device=cpu", *overrides])
