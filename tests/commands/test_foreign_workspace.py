"""A workspace that somebody else's BASE-BACK left: read exactly, its faults reported, nothing of it touched."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import foreign_workspace
import numpy as np
import program_without_figures
import pytest
import torch
from bound_process import run_bound
from conftest import PROJECT, run_python
from mounting import snapshot

DEMO = ("--config", "configs/votes.yaml", "--device", "cpu")
MADE = ("debug_logs", "plots_metrics", "pretrained_weights", "smoke_checks")  # by its settings, and empty
SURPLUS = "the network has 13 outputs for 10 classes; the last 3 are cut off"


@pytest.fixture(scope="module")
def foreign(tmp_path_factory):
    """Shared: read it, never write into it."""
    return foreign_workspace.build(tmp_path_factory.mktemp("foreign"))


@pytest.fixture(scope="module")
def run(foreign, tmp_path_factory):
    """Run a command on a copy of the workspace with the foreign package mounted."""

    def run(*options, workspace, environment=None):
        place = ("--workspace", str(workspace), "--base-back", str(foreign.base_back))
        return run_python(program_without_figures.PROGRAM, *options, *DEMO, *place, environment=environment)

    return run


@pytest.fixture(scope="module")
def discovered(foreign, run, tmp_path_factory):
    """A copy after `discover`, and what the command printed."""
    workspace = tmp_path_factory.mktemp("copy") / "w"
    shutil.copytree(foreign.workspace, workspace)
    before = snapshot(foreign.base_back)
    done = run("discover", workspace=workspace)
    assert done.returncode == 0, done.stderr
    assert snapshot(foreign.base_back) == before
    return workspace, done.stdout


def catalog(workspace):
    return json.loads((workspace / "ensembles" / "ensemble_catalog.json").read_text())


def test_every_member_is_the_file_that_the_contract_names(discovered):
    workspace, _ = discovered
    found = catalog(workspace)
    stages = {name: [entry["stage"] for entry in m["checkpoints"]] for name, m in found["members"].items()}
    assert stages == {
        "CustomCoAtNet": ["final", "finetune_best", "head_best"],
        "CustomConvNeXt": ["final", "head_best"],
        "CustomDeiTStyle": ["head_best"],
        "CustomResNetMish": ["final"],
        "CustomSwinTransformer": ["final"],
    }
    assert found["base_back"]["kind"] == "external"
    assert all(member["classes"] == list("0123456789") for member in found["members"].values())
    assert all((member["img_size"], member["usable"]) == (32, True) for member in found["members"].values())


def test_accuracies_are_those_of_the_files(discovered, foreign):
    workspace, _ = discovered
    members = catalog(workspace)["members"]
    for name, member in members.items():
        if name == "CustomDeiTStyle":
            continue
        metrics = json.loads((workspace / "metrics_output" / f"{name}_training_metrics.json").read_text())
        assert member["recorded_accuracy"] == metrics["final_accuracy"]
        with np.load(foreign.expected / f"{name}.npz") as expected:
            # Of CustomCoAtNet from the last run's summary, of the others from the recovery state.
            assert member["recorded_test_accuracy"] == pytest.approx(float(expected["accuracy"]))
    assert 0 < members["CustomDeiTStyle"]["recorded_accuracy"] <= 1  # NumPy's scalar in head_best


def test_what_would_mislead_is_said(discovered):
    workspace, text = discovered
    problems = {(p["member"], p["code"]): p for p in catalog(workspace)["problems"]}
    for name in catalog(workspace)["members"]:
        assert problems[name, "surplus_logits"]["message"] == SURPLUS
        assert problems[name, "no_oof"]["message"] == f"No K-fold results for backbone {name}"
        assert "--stages kfold --backbones" in problems[name, "no_oof"]["remedy"]
        assert "--base-back" in problems[name, "no_oof"]["remedy"]
    best = problems["CustomResNetMish", "best_accuracy_not_kept"]["message"]
    assert best.startswith("CustomResNetMish_final.pth holds the last epoch, whose accuracy is 0.")
    assert best.endswith("belongs to an epoch that was not kept")
    best = problems["CustomConvNeXt", "best_accuracy_not_kept"]["message"]
    assert best.endswith("is that of CustomConvNeXt_head_best.pth")
    assert ("CustomSwinTransformer", "best_accuracy_not_kept") not in problems
    kfold = problems["CustomSwinTransformer", "kfold_over_all_images"]["message"]
    assert "ran over the raw folder, val and test images included, and kept no predictions" in kfold
    assert "its mean accuracy 0.9000 is no estimate" in kfold
    assert not [key for key in problems if key[1] in ("class_mapping", "class_order", "stale_metrics")]
    assert all(problem["message"] in text for problem in problems.values())


def test_predictions_that_do_not_fit_are_made_again_with_its_networks(discovered, foreign, run, tmp_path):
    """One command for all members that need the same."""
    workspace = shutil.copytree(discovered[0], tmp_path / "w")
    ids = [f"{digit}/{next((workspace / 'split_dataset' / 'train' / digit).iterdir()).name}" for digit in "0123456789"]
    arrays = {"logits": np.eye(10, dtype=np.float32), "labels": np.arange(10), "sample_ids": np.array(ids)}
    for name in ("CustomCoAtNet", "CustomConvNeXt"):
        np.savez(workspace / "kfold_results" / f"{name}_oof_predictions.npz", **arrays, fold=np.arange(10) % 2)
    np.savez(workspace / "kfold_results" / "CustomDeiTStyle_oof_predictions.npz", **arrays)
    done = run("discover", workspace=workspace)
    assert done.returncode == 0, done.stderr
    end = f"--base-back {foreign.base_back} --workspace {workspace}"
    (line,) = [line for line in done.stdout.splitlines() if "10 of 400 train images" in line]
    assert line.startswith("warning: CustomCoAtNet, CustomConvNeXt: out-of-fold predictions for 10 of 400")
    assert line.endswith(f"--stages kfold --backbones CustomCoAtNet CustomConvNeXt {end}")
    (line,) = [line for line in done.stdout.splitlines() if "refused: no array fold" in line]
    assert "It is used without them. Run K-fold on this split again: python" in line
    assert line.endswith(f"--stages kfold --backbones CustomDeiTStyle {end}")


def test_folds_of_its_networks_are_checked_with_it_and_left_open_with_another(
    discovered, run, foreign, base_main, tmp_path
):
    workspace = shutil.copytree(discovered[0], tmp_path / "w")
    kfold = ("--stages", "kfold", "--backbones", "CustomConvNeXt", "--folds", "2", "--epochs-head", "0")
    theirs = ("--base-back", str(foreign.base_back))
    pixels = {"DBT_IMG_SIZE": "32"}
    done = base_main(*theirs, *kfold, "--epochs-finetune", "2", workspace=workspace, environment=pixels)
    assert done.returncode == 0, done.stderr
    bundled = ("--workspace", str(workspace), "--base-back", str(PROJECT / "BASE-BACK"))
    done = run_python(str(PROJECT / "ensemble_orchestrator.py"), "discover", "--verify", *DEMO, *bundled)
    assert done.returncode == 4
    message = "CustomConvNeXt_final.pth: the weights of another architecture"
    assert message in done.stdout
    assert "where another BASE-BACK has trained it, mount that one: --base-back DIR" in done.stdout
    assert "refused" not in done.stdout
    done = run("discover", workspace=workspace)  # runs nothing, and does not hold the wrong mount against them
    assert done.returncode == 0, done.stderr
    assert all(member["usable"] for member in catalog(workspace)["members"].values())
    done = run("discover", "--verify", workspace=workspace)
    assert done.returncode == 0, done.stderr
    for fold in ("fold0", "fold1"):
        assert f"verify CustomConvNeXt {fold}: ran on" in done.stderr
    assert catalog(workspace)["members"]["CustomConvNeXt"]["oof"]["rows"] == 400
    found = {p["code"] for p in catalog(workspace)["problems"] if p["member"] == "CustomConvNeXt"}
    assert not {code for code in found if code.startswith(("oof", "fold", "no_oof"))}


def test_an_export_record_of_other_names_is_said(discovered, run, tmp_path):
    workspace = shutil.copytree(discovered[0], tmp_path / "w")
    path = workspace / "deployment_models" / "CustomSwinTransformer" / "class_mapping.json"
    path.write_text(json.dumps({str(k): str(9 - k) for k in range(10)}))
    assert run("discover", workspace=workspace).returncode == 0
    (problem,) = [p for p in catalog(workspace)["problems"] if p["code"] == "class_mapping"]
    assert "class_mapping.json names the outputs 9, 8, 7" in problem["message"]


def test_more_class_folders_than_outputs_cannot_be_used(discovered, run, tmp_path):
    workspace = shutil.copytree(discovered[0], tmp_path / "w")
    for split in ("train", "val", "test"):
        for name in ("10", "11", "12", "13"):
            shutil.copytree(workspace / "split_dataset" / split / "3", workspace / "split_dataset" / split / name)
    done = run("discover", workspace=workspace)
    assert done.returncode == 4
    assert "the network has 13 outputs; the split has 14 classes" in done.stdout
    assert not any(member["usable"] for member in catalog(workspace)["members"].values())


def test_a_workspace_under_a_windows_name_is_found(foreign, run, tmp_path):
    """A BASE-BACK whose folder has another name writes to a drive's path, which elsewhere is a folder of that name."""
    shutil.copytree(foreign.workspace, tmp_path / "F:\\Disease Training")
    done = run("discover", workspace=tmp_path)
    assert done.returncode == 1
    assert "Disease Training'; pass it with --workspace" in done.stderr
    assert run("discover", workspace=tmp_path / "F:\\Disease Training").returncode == 0


def test_voted_and_evaluated_as_its_own_code_would(discovered, foreign, run, tmp_path):
    workspace = shutil.copytree(discovered[0], tmp_path / "w")
    done = run("pipeline", workspace=workspace)
    assert done.returncode == 0, done.stderr
    assert "No K-fold results for backbone CustomConvNeXt" in done.stderr
    assert "only the val rows are out-of-sample for all members" in done.stderr
    assert f"--base-back {foreign.base_back} --workspace {workspace}" in done.stderr
    assert done.stdout.startswith("== discover")  # its logger, which writes to stdout, has no say
    for path in foreign.expected.glob("*.npz"):
        folder = workspace / "ensembles" / "predictions" / path.stem / "test"
        logits, ids = np.load(folder / "logits.npy"), np.load(folder / "sample_ids.npy")
        with np.load(path) as expected:
            rows = np.argsort(expected["sample_ids"])
            assert expected["sample_ids"][rows].tolist() == ids.tolist()
            its = expected["probabilities"][rows].astype(np.float64)
        # Its 13 probabilities without the dead three, which ours never had.
        assert its[:, 10:].sum(axis=1).mean() < 0.05
        its = its[:, :10] / its[:, :10].sum(axis=1, keepdims=True)
        ours = np.exp(logits.astype(np.float64) - logits.max(axis=1, keepdims=True))
        np.testing.assert_allclose(ours / ours.sum(axis=1, keepdims=True), its, atol=1e-5)
    ranking = json.loads((workspace / "metrics_output" / "ensembles" / "ranking.json").read_text())
    assert ranking["recommended"]["evidence"]["rows"] == "val"
    surplus = {p["message"] for p in catalog(workspace)["problems"] if p["code"] == "surplus_logits"}
    assert surplus == {f"{SURPLUS}; on the 50 val images they are never predicted"}


def test_one_of_its_networks_is_taught_by_the_others(discovered, foreign, run, tmp_path):
    workspace = shutil.copytree(discovered[0], tmp_path / "w")
    settings = ("enable=true", "teacher=soft_voting", "student=CustomConvNeXt", "epochs=1", "targets=consistent")
    own = [word for setting in settings for word in ("--set", f"distillation.{setting}")]
    assert run("build-ensemble", workspace=workspace).returncode == 0
    before = snapshot(foreign.base_back)
    done = run("distill", *own, workspace=workspace)
    assert done.returncode == 0, done.stderr
    assert snapshot(foreign.base_back) == before
    student = catalog(workspace)["members"]["CustomConvNeXt_distilled"]
    assert (student["usable"], student["img_size"], len(student["classes"])) == (True, 32, 10)
    extra = torch.load(workspace / "checkpoints" / "CustomConvNeXt_distilled.pth", weights_only=True)["extra"]
    assert (extra["base_back"], extra["targets"]) == ("external", "consistent")


@pytest.fixture
def bare(foreign, tmp_path):
    """A copy without the empty folders, as a copy of what matters to somebody lacks them."""
    workspace = Path(shutil.copytree(foreign.workspace, tmp_path / "w"))
    for name in MADE:
        (workspace / name).rmdir()
    return workspace


@pytest.fixture
def read_only(bare):
    """The same, of somebody else, who lets us read."""
    folders = [bare, *(path for path in bare.rglob("*") if path.is_dir())]
    for path in folders:
        path.chmod(0o555)
    yield bare
    for path in folders:
        path.chmod(0o755)


def test_its_settings_make_no_folder_where_an_output_takes_everything(bare, run, tmp_path):
    before = snapshot(bare)
    for variable in (False, True):
        output = ("--output", str(tmp_path / "out")) if not variable else ()
        environment = {"DBT_ENSEMBLE_DIR": str(tmp_path / "out")} if variable else {}
        done = run("discover", *output, workspace=bare, environment=environment)
        assert done.returncode == 0, done.stderr
        assert snapshot(bare) == before
    done = run("discover", "--output", str(bare), workspace=bare)  # the workspace itself is no output of its own
    assert done.returncode == 0, done.stderr
    assert all((bare / name).is_dir() for name in MADE)


def test_a_workspace_that_can_only_be_read_is_voted_and_evaluated_with_an_output(read_only, foreign, tmp_path):
    before = snapshot(read_only)
    mounted = ("--base-back", str(foreign.base_back), "--device", "cpu")
    done = run_bound("status", *mounted, workspace=read_only)
    assert (done.returncode, done.stderr) == (0, "")
    done = run_bound("discover", *mounted, workspace=read_only)
    assert done.returncode == 1
    (line,) = done.stderr.strip().splitlines()
    assert f"{read_only}/ensembles/.lock: cannot be written (Permission denied)" in line
    assert "--output DIR (or DBT_ENSEMBLE_DIR)" in line
    out = tmp_path / "out"
    for command in ("discover", "build-ensemble", "evaluate"):
        done = run_bound(command, *mounted, "--output", str(out), workspace=read_only)
        assert done.returncode == 0, done.stderr
        assert "cannot be written" not in done.stderr
    ranking = json.loads((out / "metrics_output" / "ensembles" / "ranking.json").read_text())
    assert len(ranking["rows"]) == 5 + 3
    assert snapshot(read_only) == before
