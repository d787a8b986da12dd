"""Runs `build-ensemble` for the soups of one backbone."""

from __future__ import annotations

from conftest import PROJECT
from soup_zoo import NAME

from utils.building import build_commands
from utils.core.config_file import load_config

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
