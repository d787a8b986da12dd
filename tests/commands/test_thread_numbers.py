"""Every command that trains or runs networks records its number of threads: the table's, or the user's."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from in_process import run

from utils.numeric.setting_paths import FIT_THREADS

pytestmark = pytest.mark.usefixtures("few_fits")

SETTINGS = (
    *("device=cpu", "dataset.num_workers=0", "dataset.img_size=32", "dataset.batch_size=4", "dataset.group_regex=null"),
    *("backbones.include=[CustomConvNeXt,CustomResNetMish]", "pruning.enable=false", "runs.model_soup.enable=false"),
    "runs.score_ensemble.methods=[soft_voting]",
    *("runs.stacking.enable=true", "runs.stacking.meta_learners=[lr,mlp]", "runs.stacking.mlp_config.epochs=2"),
    *("runs.stacking.mlp_config.hidden_dims=[4]", "runs.fusion.fusion_config.hidden_dims=[4]"),
    *("runs.fusion.enable=true", "runs.fusion.fusion_methods=[concat_mlp]", "runs.fusion.fusion_config.epochs=2"),
    *("runs.moe.enable=false", "runs.fusion.end_to_end=true", "runs.fusion.end_to_end_epochs=1"),
    *("distillation.enable=true", "distillation.student=CustomConvNeXt", "distillation.epochs=1"),
    *("distillation.batch_size=4", "exports.formats=[state_dict,onnx]"),
)


def commands(workspace: Path, *overrides: str) -> None:
    """Run every command that trains or runs networks."""
    settings = [word for override in (*SETTINGS, *overrides) for word in ("--set", override)]
    for command in (
        ("discover",),
        ("build-ensemble",),
        ("stack",),
        ("fusion-train",),
        ("distill", "--set", "distillation.teacher=soft_voting"),
        ("export", "--model-name", "soft_voting_ensemble"),
    ):
        done = run(*command, "--config", "configs/ensemble_config.yaml", *settings, workspace=workspace)
        assert done.code == 0, f"{command}: {done.stderr}"


def test_each_command_records_its_number(synthetic, tmp_path):
    """Two where the user says so, although `OMP_NUM_THREADS` is 1 here."""
    workspace, expected = Path(shutil.copytree(synthetic, tmp_path / "w")), 2
    before = torch.get_num_threads()
    commands(workspace, "dataset.num_threads=2")
    assert torch.get_num_threads() == before

    def record(pattern: str) -> dict:
        (path,) = workspace.glob(pattern)
        return json.loads(path.read_text(encoding="utf-8"))

    streamed = list(workspace.glob("ensembles/**/predictions/*/val/record.json"))
    assert {json.loads(path.read_text())["threads"] for path in streamed} == {expected}
    stacked = "ensembles/models/stacking_{}/ensemble.json"
    assert record(stacked.format("lr"))["threads"] is None
    assert record(stacked.format("mlp"))["threads"] == FIT_THREADS
    fused = record("ensembles/models/fusion_concat_mlp/ensemble.json")
    assert fused["end_to_end"]["threads"] == expected
    student = record("ensembles/models/distilled_*/ensemble.json")
    assert student["distillation"]["threads"] == {"student": expected, "alone": expected}
    (checkpoint,) = workspace.glob("**/CustomConvNeXt_distilled.pth")
    assert torch.load(checkpoint, weights_only=True)["extra"]["threads"] == expected
    exported = record("deployment_models/soft_voting_ensemble/export_status.json")
    assert [exported[name]["threads"] for name in ("state_dict", "onnx")] == [expected] * 2
