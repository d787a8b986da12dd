"""The same seed gives the same bytes: `pipeline` in two copies of one workspace, in other folders, by other workers."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
from conftest import PROJECT, run_python
from equality import content, differences

from utils.evaluation import score_plots

PLOTTED = "soft_voting_ensemble"
PROGRAM = f"""
import sys
from contextlib import ExitStack

sys.path[:0] = [{str(PROJECT)!r}, {str(PROJECT / "tests" / "support")!r}]
from short_fits import few_fits
from in_process import write_pixel

import ensemble_orchestrator
from utils.core import engines
from utils.evaluation import score_plots

draw = score_plots._draw
score_plots._draw = lambda picture: (draw if picture.record["name"] == {PLOTTED!r} else write_pixel)(picture)
cores = engines.cores
fewer = ExitStack()
fewer.enter_context(few_fits())
if __name__ == "__main__":
    if sys.argv.pop(1) == "several":
        engines.cores = cores
    sys.exit(ensemble_orchestrator.main(sys.argv[1:]))
"""
"""The orchestrator's command line that draws all kinds of plots of one ensemble, and the figures of the report.

Its first word says whether one process fits and draws, or several.
"""
LINE = (
    *("pipeline", "--quiet", "--device", "cpu"),
    *("--set", "runs.score_ensemble.methods=[soft_voting,logit_averaging,weighted,greedy_selection]"),
    *("--set", "runs.model_soup.enable=true", "--set", "pruning.methods=[greedy_forward]"),
    *("--set", "runs.stacking.meta_learners=[lr,xgb,mlp]", "--set", "runs.stacking.mlp_config.epochs=3"),
    *("--set", "runs.stacking.xgb_config.n_estimators=5", "--set", "runs.stacking.mlp_config.hidden_dims=[8,4]"),
    *("--set", "runs.fusion.fusion_methods=[concat_mlp,attention]", "--set", "runs.fusion.fusion_config.epochs=2"),
    *("--set", "runs.fusion.fusion_config.hidden_dims=[8,4]"),
    *("--set", "runs.moe.enable=true", "--set", "runs.moe.epochs=3", "--set", "runs.cascade.enable=true"),
    *("--set", "runs.meta_fuser.input_ensembles=[soft_voting,stacking_lr,fusion_concat_mlp]"),
    *("--set", "runs.meta_fuser.fuser_type=mlp"),
    *("--set", "runs.meta_fuser.mlp_config.epochs=3", "--set", "runs.meta_fuser.mlp_config.hidden_dims=[8,4]"),
    *("--set", "distillation.enable=false", "--set", "exports.enable=false"),
)
KINDS = {".npy", ".npz", ".safetensors", ".json", ".pth", ".html"}


def run(workspace: Path, workers: int, processes: str, *, afresh: bool) -> Path:
    """A new interpreter has another order of sets than the processes that are forks of one."""
    program = workspace.parent / "program.py"
    program.write_text(PROGRAM)
    options = ("--set", f"dataset.num_workers={workers}", "--workspace", str(workspace))
    done = run_python(str(program), processes, *LINE, *options, afresh=afresh)
    assert done.returncode == 0, done.stderr
    return workspace


def test_a_pipeline_in_another_folder_by_other_workers_gives_the_same_bytes(synthetic, tmp_path):
    one = run(Path(shutil.copytree(synthetic, tmp_path / "one")), 0, "one", afresh=False)
    other = Path(shutil.copytree(synthetic, tmp_path / "elsewhere" / "another"))
    (other / "ensembles").mkdir()
    shutil.copy(one / "ensembles" / "latency.json", other / "ensembles" / "latency.json")
    run(other, 2, "several", afresh=True)
    found = content(one)
    models = {name.split("/")[2] for name in found if name.startswith("ensembles/models/")}
    assert {"stacking_lr", "stacking_xgb", "stacking_mlp", "meta_fuser", "weighted_ensemble"} <= models
    assert {"fusion_concat_mlp", "fusion_attention", "moe", "cascade"} <= models
    assert {Path(name).suffix for name in found} >= KINDS
    plots = (one / "metrics_output" / "ensembles" / PLOTTED).rglob("*.png")
    assert len([path for path in plots if path.stat().st_size > 5000]) == len(score_plots.KINDS)
    assert len(found) > 100
    assert differences(one, other) == ["ensembles/config.yaml"]  # which says how many workers there were


def test_the_comparison_sees_one_altered_value(synthetic, tmp_path):
    """The comparison above could fail: what is fitted with another seed differs, and so does one altered value."""
    one = Path(shutil.copytree(synthetic, tmp_path / "one"))
    other = Path(shutil.copytree(synthetic, tmp_path / "other"))
    path = other / "kfold_results" / "CustomConvNeXt_oof_predictions.npz"
    with np.load(path) as arrays:
        changed = dict(arrays)
    changed["logits"][0, 0] += 1e-6
    np.savez(path, **changed)
    assert differences(one, other) == ["kfold_results/CustomConvNeXt_oof_predictions.npz"]
