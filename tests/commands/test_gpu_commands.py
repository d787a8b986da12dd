"""Commands with `device: cuda` on a fake device: what would stop the first run on a GPU stops here."""

from __future__ import annotations

import gc
import json
import shutil
from pathlib import Path

import pytest
from fake_cuda import fake_cuda
from in_process import run

pytestmark = pytest.mark.usefixtures("few_fits")

SMALL = (
    "backbones.include=[CustomResNetMish,CustomViTHybrid]",
    *("device=cuda", "dataset.num_workers=0", "dataset.batch_size=4", "exports.enable=false"),
    *("runs.score_ensemble.methods=[soft_voting,weighted]", "runs.model_soup.methods=[uniform]"),
    *("runs.model_soup.enable=true", "runs.stacking.enable=false", "runs.meta_fuser.enable=false"),
    *("runs.fusion.enable=true", "runs.fusion.fusion_methods=[concat_mlp]", "runs.fusion.fusion_config.epochs=1"),
    "runs.fusion.fusion_config.hidden_dims=[4]",
    *("runs.fusion.end_to_end=true", "runs.fusion.end_to_end_epochs=1", "pruning.enable=false"),
    *("distillation.enable=true", "distillation.teacher=soft_voting", "distillation.epochs=1", "tta.enable=true"),
    *("distillation.targets=consistent", "distillation.student=CustomMobileOne", "tta.views=[flip]"),
)
OPTIONS = [word for value in SMALL for word in ("--set", value)]


def test_a_pipeline_runs_on_the_device(synthetic, tmp_path, monkeypatch):
    workspace = Path(shutil.copytree(synthetic, tmp_path / "w"))
    gc.freeze()  # the product collects garbage after every network on a GPU, which looks at all that is imported
    with fake_cuda(monkeypatch) as device:
        for command in ("pipeline", "evaluate"):
            done = run(command, *(OPTIONS if command == "pipeline" else ()), "--quiet", "--json", workspace=workspace)
            assert done.code in (0, 4), done.stderr
            assert "bug" not in done.stderr
    assert device.counts["to device"] > 100
    ranking = json.loads((workspace / "metrics_output" / "ensembles" / "ranking.json").read_text())
    assert {"soft_voting_ensemble", "fusion_concat_mlp"} <= {row["name"] for row in ranking["rows"]}
