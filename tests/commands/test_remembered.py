"""What a workspace remembers of its configuration, through the command line, on a workspace of imported predictions."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from given_predictions import write
from in_process import run

from utils.core.config_file import load_config

pytestmark = pytest.mark.usefixtures("few_fits")

SMALL = (
    *("--set", "runs.score_ensemble.methods=[soft_voting,weighted]", "--set", "runs.stacking.meta_learners=[lr,mlp]"),
    *("--set", "runs.stacking.mlp_config.epochs=3", "--set", "runs.stacking.mlp_config.hidden_dims=[4]"),
    *("--set", "distillation.enable=false"),
    *("--set", "runs.model_soup.enable=false", "--set", "runs.fusion.enable=false"),
    *("--set", "pruning.enable=false", "--set", "runs.meta_fuser.enable=false", "--set", "exports.enable=false"),
)
MOE_EPOCHS = ("--set", "runs.moe.enable=true", "--set", "runs.moe.epochs=2", "--set", "runs.cascade.enable=false")


@pytest.fixture(scope="module")
def remembering(tmp_path_factory) -> Path:
    """A workspace after `pipeline`, which was its first build. Read it only."""
    folder = tmp_path_factory.mktemp("remembering")
    write(folder / "given")
    (folder / "w").mkdir()
    assert run("import-predictions", "--from", folder / "given", workspace=folder / "w").code == 0
    done = run("pipeline", *SMALL, workspace=folder / "w")
    assert done.code == 0, done.stderr
    assert "remembered in" in done.stderr
    return folder / "w"


@pytest.fixture
def workspace(remembering, tmp_path) -> Path:
    return Path(shutil.copytree(remembering, tmp_path / "w"))


def remembered(workspace: Path) -> Path:
    return workspace / "ensembles" / "config.yaml"


def states(workspace: Path, *options: str) -> dict[str, str]:
    document = run("status", "--json", *options, workspace=workspace).document
    return {name: state["state"] for name, state in document["ensembles"].items()}


def ranked(workspace: Path) -> list[str]:
    rows = json.loads((workspace / "metrics_output" / "ensembles" / "ranking.json").read_text())["rows"]
    return [row["name"] for row in rows]


def ranking_bytes(workspace: Path) -> bytes:
    return (workspace / "metrics_output" / "ensembles" / "ranking.json").read_bytes()


def test_the_file_is_a_configuration_and_says_where_each_value_is_from(workspace):
    config = load_config(remembered(workspace))
    assert config.runs.stacking.meta_learners == ("lr", "mlp")
    assert config.origins["runs.stacking.mlp_config.epochs"] == "runs.stacking.mlp_config.epochs=3"
    assert config.origins["seed"] == "file"
    assert "cache.quota_gb" not in config.origins  # a default
    assert "file: configs/ensemble_config.yaml" in remembered(workspace).read_text()


@pytest.mark.parametrize(
    "line", [("evaluate",), ("pipeline",), ("status",), ("clean",), ("build-ensemble",), ("stack",)]
)
def test_commands_without_options_change_nothing(workspace, line):
    before = {path: path.read_bytes() for path in workspace.rglob("*.json")}
    page = workspace / "ensembles" / "report" / "index.html"
    report, kept = page.read_bytes(), remembered(workspace).read_bytes()
    done = run(*line, workspace=workspace)
    assert done.code == 0, done.stderr
    after = {path: path.read_bytes() for path in workspace.rglob("*.json")}
    assert {path.name for path in after if after[path] != before.get(path)} <= {"digests.json"}
    assert page.read_bytes() == report
    assert remembered(workspace).read_bytes() == kept
    assert "configuration:" not in done.stderr


def test_the_suggested_command_needs_no_configuration(workspace):
    following = run("stack", *SMALL, "--json", workspace=workspace).document["next"]
    assert following == f"python ensemble_orchestrator.py evaluate --workspace {workspace}"


def test_a_setting_of_status_says_what_would_be_rebuilt(workspace):
    assert set(states(workspace).values()) == {"current"}
    found = states(workspace, "--set", "runs.stacking.mlp_config.epochs=33")
    assert {name for name, state in found.items() if state != "current"} == {"stacking_mlp"}


def test_a_set_builds_and_is_recorded_and_unlists_nothing(workspace):
    before, kept = ranked(workspace), remembered(workspace).read_bytes()
    done = run("fusion-train", *MOE_EPOCHS, workspace=workspace)
    assert done.code == 0, done.stderr
    assert "recorded with what it builds" in done.stderr
    record = json.loads((workspace / "ensembles" / "models" / "moe" / "ensemble.json").read_text())
    assert "runs.moe.epochs=2" in record["overrides"]
    assert remembered(workspace).read_bytes() == kept
    assert set(states(workspace).values()) == {"current"}
    assert run("evaluate", workspace=workspace).code == 0
    assert set(ranked(workspace)) == {*before, "moe"}


def test_a_set_of_a_value_stays_until_another_is_asked_for(workspace):
    assert run("stack", "--set", "runs.stacking.mlp_config.epochs=4", workspace=workspace).code == 0
    assert set(states(workspace).values()) == {"current"}
    document = run("stack", "--json", workspace=workspace).document
    assert document["built"] == []
    document = run("stack", "--json", "--set", "runs.stacking.mlp_config.epochs=3", workspace=workspace).document
    assert document["built"] == ["stacking_mlp"]
    document = run(
        "stack", "--json", "--force", "--set", "runs.stacking.meta_learners=[mlp]", workspace=workspace
    ).document
    assert document["built"] == ["stacking_mlp"]


def test_a_file_replaces_what_was_remembered_and_what_it_lacks_is_apart(workspace):
    done = run("build-ensemble", "--config", "configs/votes.yaml", workspace=workspace)
    assert done.code == 0, done.stderr
    (line,) = [line for line in done.stderr.splitlines() if "configuration:" in line]
    assert "configs/votes.yaml replaces the remembered one (" in line
    assert load_config(remembered(workspace)).runs.score_ensemble.methods == (
        "soft_voting",
        "hard_voting",
        "logit_averaging",
    )
    done = run("evaluate", "--json", workspace=workspace)
    assert done.document["unlisted"] == ["stacking_lr", "stacking_mlp", "weighted_ensemble"]
    assert not set(done.document["unlisted"]) & set(ranked(workspace))
    assert "not in the configuration: stacking_lr" in run("status", workspace=workspace).stdout
    for name in ("weighted_ensemble", "weighted"):  # by its name it is still evaluated
        alone = run("evaluate", "--model-name", name, workspace=workspace)
        assert alone.code == 0, alone.stderr
    listed = run("clean", "--unlisted", workspace=workspace)
    assert (workspace / "ensembles" / "models" / "stacking_lr").is_dir()
    assert listed.stdout.splitlines()[-1].endswith(f"clean --unlisted --confirm --workspace {workspace}")
    assert run("clean", "--unlisted", "--confirm", workspace=workspace).code == 0
    assert not (workspace / "ensembles" / "models" / "stacking_lr").exists()
    assert (workspace / "ensembles" / "models" / "soft_voting_ensemble").is_dir()


def test_a_file_for_a_question_is_not_remembered(workspace):
    kept = remembered(workspace).read_bytes()
    done = run("status", "--config", "configs/votes.yaml", workspace=workspace)
    assert "configs/votes.yaml for this command alone" in done.stderr
    assert remembered(workspace).read_bytes() == kept


def test_a_refused_build_leaves_what_was_remembered(workspace, tmp_path):
    kept = remembered(workspace).read_bytes()
    (tmp_path / "bad.yaml").write_text("backbones:\n  include: [Nobody]\n")
    assert run("build-ensemble", "--config", tmp_path / "bad.yaml", workspace=workspace).code == 1
    assert remembered(workspace).read_bytes() == kept
    (tmp_path / "empty").mkdir()
    assert run("build-ensemble", workspace=tmp_path / "empty").code == 1
    assert not remembered(tmp_path / "empty").exists()


def test_a_damaged_file_is_named_with_what_to_do(workspace):
    remembered(workspace).write_text("seed: [")
    done = run("status", workspace=workspace)
    assert done.code == 2
    assert str(remembered(workspace)) in done.stderr
    assert "--config FILE" in done.stderr
    assert run("build-ensemble", "--config", "configs/votes.yaml", workspace=workspace).code == 0
    assert run("status", workspace=workspace).code == 0


def test_a_file_that_has_changed_since_is_named(workspace, tmp_path):
    own = tmp_path / "own.yaml"
    shutil.copy("configs/votes.yaml", own)
    assert run("build-ensemble", "--config", own, workspace=workspace).code == 0
    assert "has changed" not in run("status", workspace=workspace).stderr
    own.write_text(own.read_text().replace("hard_voting, ", ""))
    assert f"{own} has changed since" in run("status", workspace=workspace).stderr


def test_a_new_member_is_named_by_the_next_build(workspace, tmp_path):
    write(tmp_path / "more", {"late": 9})
    assert run("import-predictions", "--from", tmp_path / "more", workspace=workspace).code == 0
    unused = run("build-ensemble", "--set", "backbones.include=[bayes,forest,linear]", workspace=workspace)
    assert "new since the last build: late; not in backbones.include" in unused.stdout
    assert "new since the last build: late; used now" in run("build-ensemble", workspace=workspace).stdout


def test_a_warning_of_several_stages_is_shown_once(workspace):
    done = run("pipeline", "--set", "device=cuda", "--force", workspace=workspace)
    assert done.code == 0, done.stderr
    warnings = [line.split("|", 2)[2] for line in done.stderr.splitlines() if "| WARNING |" in line]
    assert len(warnings) == len(set(warnings))
