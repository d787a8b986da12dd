"""A second `pipeline` with nothing changed does nothing and loads no torch; a changed key redoes what depends on it."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from conftest import run_python
from given_predictions import write

OPTIONS = (
    *("--config", "configs/votes.yaml", "--json", "--quiet"),
    *("--set", "runs.score_ensemble.methods=[soft_voting,logit_averaging,weighted,greedy_selection]"),
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
    "print(' '.join(sorted({'torch', 'sklearn', 'scipy', 'xgboost', 'PIL', 'timm', 'ray'} & set(sys.modules))))\n"
    "sys.exit(code)"
)


def pipeline(workspace: Path, *more: str) -> tuple[dict, set[str]]:
    """One run: its document, and which heavy libraries it loaded."""
    done = run_python("-c", CODE, "pipeline", *OPTIONS, *more, "--workspace", str(workspace))
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


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> Path:
    """A workspace of imported members after `pipeline`. Read it only."""
    workspace = tmp_path_factory.mktemp("finished")
    given = write(tmp_path_factory.mktemp("given"))
    done = run_python("ensemble_orchestrator.py", "import-predictions", "--from", str(given), *place(workspace))
    assert done.returncode == 0, done.stderr
    document, _ = pipeline(workspace)
    assert built(document) == MODELS
    return workspace


def place(workspace: Path) -> tuple[str, ...]:
    return ("--config", "configs/votes.yaml", "--workspace", str(workspace))


@pytest.fixture
def copy(tmp_path, finished) -> Path:
    return Path(shutil.copytree(finished, tmp_path / "copy"))


def test_nothing_changed_nothing_done_and_no_torch(copy):
    before = times(copy)
    assert len(before) > 3 * len(MODELS)
    document, loaded = pipeline(copy)
    assert loaded == set()
    assert built(document) == set()
    assert times(copy) == before


@pytest.mark.parametrize(
    ("key", "again"),
    [
        ("runs.stacking.mlp_config.epochs=5", {"stacking_mlp", "meta_fuser"}),
        ("runs.score_ensemble.optimization_metric=log_loss", {"weighted_ensemble", "greedy_selection_ensemble"}),
        ("runs.score_ensemble.pool=linear", {"weighted_ensemble"}),
        ("runs.meta_fuser.mlp_config.lr=0.01", {"meta_fuser"}),
        ("runs.stacking.xgb_config.max_depth=3", {"meta_fuser"}),  # the fuser may be a booster, and names its settings
        ("project.name=another", set()),
    ],
)
def test_a_changed_key_redoes_what_depends_on_it(copy, key, again):
    before = times(copy)
    document, _ = pipeline(copy, "--set", key)
    assert built(document) == again
    after = times(copy)
    changed = {Path(name) for name in before.keys() | after.keys() if after.get(name) != before.get(name)}
    assert {path.parts[:2] for path in changed} == {("models", name) for name in again}
