"""The command that a message names builds the ensemble."""

from __future__ import annotations

import pytest

from utils.building.build_commands import BUILDERS
from utils.building.command_hints import build_command, rebuild_hint
from utils.commands import COMMANDS


@pytest.mark.parametrize(
    ("name", "command"),
    [
        ("soft_voting_ensemble", "build-ensemble"),
        ("pruned_clustering", "build-ensemble"),
        ("greedy_soup_CustomConvNeXt", "build-ensemble"),
        ("stacking_lr", "stack"),
        ("fusion_concat_mlp", "fusion-train"),
        ("moe", "fusion-train"),
        ("cascade", "fusion-train"),
        ("meta_fuser", "meta-fuse"),
        ("distilled_CustomMobileOne", "distill"),
    ],
)
def test_each_family_has_its_command(name, command):
    assert build_command(name) == f"python ensemble_orchestrator.py {command}"
    assert command in COMMANDS
    assert command in BUILDERS or command == "distill"


def test_what_is_damaged_is_built_again_by_force():
    assert rebuild_hint("stacking_lr") == "Build stacking_lr again: python ensemble_orchestrator.py stack --force"
