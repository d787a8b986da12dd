"""A second `pipeline` with nothing changed does nothing and loads no torch; a changed key redoes what depends on it."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from conftest import made_once, run_python
from given_predictions import write
from in_process import every_plot, run

pytestmark = pytest.mark.usefixtures("few_fits")

OPTIONS = (
    *("--config", "configs/votes.yaml", "--json", "--quiet"),
    *("--set", "runs.score_ensemble.methods=[soft_voting,logit_averaging,weighted,greedy_selection]"),
    *("--set", "runs.score_ensemble.pool=log_linear"),
    *("--set", "runs.stacking.enable=true", "--set", "runs.stacking.meta_learners=[lr,mlp]"),
    *("--set", "runs.stacking.mlp_config.epochs=4", "--set", "runs.stacking.mlp_config.hidden_dims=[4]"),
    *("--set", "runs.meta_fuser.enable=true", "--set", "runs.meta_fuser.fuser_type=attention"),
    *("--set", "runs.meta_fuser.input_ensembles=[soft_voting,stacking_mlp]"),
    *("--set", "runs.meta_fuser.mlp_config.epochs=4", "--set", "runs.meta_fuser.mlp_config.hidden_dims=[4]"),
)
MODELS = {
    *("soft_voting_ensemble", "logit_averaging_ensemble", "weighted_ensemble", "greedy_selection_ensemble"),
    *("stacking_lr", "stacking_mlp", "meta_fuser"),
}
CODE = (
    "import sys, ensemble_orchestrator as program\n"
    "code = program.main(sys.argv[1:])\n"
    "heavy = {'torch', 'sklearn', 'scipy', 'xgboost', 'PIL', 'timm', 'ray', 'onnx', 'onnxruntime', 'matplotlib'}\n"
    "print(' '.join(sorted(heavy & set(sys.modules))))\n"
    "sys.exit(code)"
)
SHORT = (
    *("--config", "configs/digits_demo.yaml", "--json", "--quiet", "--device", "cpu"),
    *("--set", "backbones.exclude=[CustomViTHybrid]"),
    *("--set", "runs.stacking.mlp_config.epochs=2", "--set", "runs.stacking.xgb_config.n_estimators=3"),
    *("--set", "runs.stacking.mlp_config.hidden_dims=[4]", "--set", "runs.fusion.fusion_config.hidden_dims=[4]"),
    *("--set", "runs.fusion.fusion_config.epochs=2", "--set", "distillation.epochs=1"),
    *("--set", "runs.moe.epochs=2", "--set", "runs.moe.gating_hidden_dim=4"),
    *("--set", "pruning.cost_budget.max_latency_ms=null"),  # a busy machine is slow
)
"""Every family of the demo, each trained as little as can be."""
FAMILIES = {
    *("soft_voting_ensemble", "greedy_soup_CustomConvNeXt", "stacking_mlp", "fusion_concat_mlp", "fusion_cca_aligned"),
    *("moe", "cascade", "meta_fuser", "pruned_clustering", "distilled_mobile"),
}
STAGES = ("build-ensemble", "stack", "fusion-train", "meta-fuse", "distill")
LOOKED_AT = "ensembles/ensemble_catalog.json"
"""Its time says when discovery last looked, by which `status` knows what came later; its bytes stay."""


def pipeline(workspace: Path, options: tuple[str, ...] = OPTIONS) -> dict:
    """The document of a first run."""
    with every_plot():
        done = run("pipeline", *options, workspace=workspace)
    assert done.code == 0, done.stderr
    return done.document


def again(workspace: Path, options: tuple[str, ...] = OPTIONS) -> tuple[dict, set[str]]:
    """The document of one more run by a new interpreter, and which heavy libraries that has loaded."""
    done = run_python("-c", CODE, "pipeline", *options, "--workspace", str(workspace))
    assert done.returncode == 0, done.stderr
    *_, document, loaded = done.stdout.splitlines()
    return json.loads(document), set(loaded.split())


def built(document: dict) -> set[str]:
    """Ensembles that any stage built."""
    stages = [stage for stage in document.values() if isinstance(stage, dict)]
    return {name for stage in stages for name in stage.get("built", ())}


def times(workspace: Path) -> dict[str, int]:
    """Of every file that holds predictions or something fitted."""
    folder = workspace / "ensembles"
    files = [path for path in folder.rglob("*") if path.suffix in (".npy", ".npz", ".safetensors")]
    files += folder.rglob("ensemble.json")
    return {str(path.relative_to(folder)): path.stat().st_mtime_ns for path in files}


def files(workspace: Path) -> dict[str, tuple[bytes, int]]:
    """Bytes and time of every file but the logs."""
    found = {}
    for path in (path for path in workspace.rglob("*") if path.is_file() and path.parent.name != "debug_logs"):
        name = path.relative_to(workspace).as_posix()
        found[name] = path.read_bytes(), 0 if name == LOOKED_AT else path.stat().st_mtime_ns
    return found


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> Path:
    """A workspace of imported members after `pipeline`. Read it only."""
    workspace = tmp_path_factory.mktemp("finished")
    given = write(tmp_path_factory.mktemp("given"))
    done = run("import-predictions", "--from", given, "--config", "configs/votes.yaml", workspace=workspace)
    assert done.code == 0, done.stderr
    assert built(pipeline(workspace)) == MODELS
    return workspace


@pytest.fixture
def copy(tmp_path, finished) -> Path:
    return Path(shutil.copytree(finished, tmp_path / "copy"))


def test_nothing_changed_nothing_done_and_no_torch(copy):
    before = times(copy)
    assert len(before) > 3 * len(MODELS)
    document, loaded = again(copy)
    assert loaded == set()
    assert built(document) == set()
    assert times(copy) == before


@pytest.fixture(scope="module")
def everything(tmp_path_factory, synthetic) -> Path:
    """A workspace of trained members after `pipeline` with every family on. A second one is to change nothing in it."""

    def make(workspace: Path) -> None:
        shutil.copytree(synthetic, workspace, dirs_exist_ok=True)
        document = pipeline(workspace, SHORT)
        assert built(document) >= FAMILIES
        assert document["export"]["formats"]["onnx"]["status"] == "ok"

    return made_once(tmp_path_factory, "everything", make)


def test_nothing_changed_nothing_done_with_every_family_on(everything):
    before = files(everything)
    document, loaded = again(everything, SHORT)
    assert loaded == set()
    assert built(document) == set()
    assert {name for stage in STAGES for name in document[stage]["up_to_date"]} >= FAMILIES
    after = files(everything)
    assert [name for name in before.keys() | after.keys() if before.get(name) != after.get(name)] == []
    assert "ensembles/report/index.html" in after


@pytest.mark.parametrize(
    ("key", "anew"),
    [
        ("runs.stacking.mlp_config.epochs=5", {"stacking_mlp", "meta_fuser"}),
        ("runs.score_ensemble.optimization_metric=log_loss", {"weighted_ensemble", "greedy_selection_ensemble"}),
        ("runs.score_ensemble.pool=linear", {"weighted_ensemble"}),
        ("runs.meta_fuser.mlp_config.lr=0.01", {"meta_fuser"}),
        ("runs.stacking.xgb_config.max_depth=3", set()),  # the fuser is no booster
        ("project.name=another", set()),
    ],
)
def test_a_changed_key_redoes_what_depends_on_it(copy, key, anew):
    before = times(copy)
    done = run("pipeline", *OPTIONS, "--set", key, workspace=copy)
    assert done.code == 0, done.stderr
    assert built(done.document) == anew
    after = times(copy)
    changed = {Path(name) for name in before.keys() | after.keys() if after.get(name) != before.get(name)}
    assert {path.parts[:2] for path in changed} == {("models", name) for name in anew}
