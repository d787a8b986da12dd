"""`evaluate --mlflow` and `--tensorboard`: what is written, that nothing is written twice, and what mistakes answer.

Where MLflow or TensorBoard is not installed, the tests that read runs back are skipped.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest
from conftest import PROJECT
from finished_workspace import at
from in_process import run

from utils.evaluation import score_plots
from utils.evaluation.trackers import tracked_runs

DEMO = ("--config", "configs/votes.yaml")


def evaluate(workspace, *options):
    return run("evaluate", *DEMO, "--json", *options, workspace=workspace)


def scores(workspace):
    """{folder: metrics.json} of every model in the ranking, and ranking.json."""
    folder = workspace / "metrics_output" / "ensembles"
    ranking = json.loads((folder / "ranking.json").read_text())
    folders = {row["name"] if row["kind"] == "ensemble" else f"members/{row['name']}" for row in ranking["rows"]}
    return {name: json.loads((folder / name / "metrics.json").read_text()) for name in folders}, ranking


def expected_scalars(record):
    """Some of what a run must hold, key by key."""
    low, high = record["ci95"]["accuracy"]
    classes = {f"per_class/{name}/recall": figures["recall"] for name, figures in record["per_class"].items()}
    plain = {key: record[key] for key in ("accuracy", "f1_macro", "log_loss", "ece", "brier", "n_samples", "size_mb")}
    latency = {"latency_ms/batch_1/p50": record["latency_ms"]["batch_1"]["p50"]}
    return {**plain, **classes, **latency, "ci95/accuracy/low": low, "ci95/accuracy/high": high}


def hide(monkeypatch, *packages):
    """Let an import of these answer as where they are not installed."""
    for name in [module for module in sys.modules if module.split(".")[0] in packages]:
        monkeypatch.delitem(sys.modules, name)
    for package in packages:
        monkeypatch.setitem(sys.modules, package, None)
    monkeypatch.delitem(sys.modules, "torch.utils.tensorboard", raising=False)


# ---------------------------------------------------------------------------------------------------------------------
# Scalars


def test_scalars_are_all_numbers_and_the_ends_of_intervals_under_names_that_trackers_take():
    record = {
        "accuracy": 0.5,
        "n_samples": 4,
        "contaminated": False,
        "roc_auc": None,
        "brier": float("nan"),
        "name": "vote",
        "ci95": {"accuracy": [0.25, 0.75], "brier": None},
        "conformal": {"lac": {"coverage_interval": [0.1, 0.2]}},
        "selective": {"risk": [0.0, 0.5]},
        "per_class": {"a/b": {"f1": 1.0}, "a b": {"f1": 0.0}, "..": {"f1": 0.5}, "Fäule": {"f1": 0.25}},
    }
    assert tracked_runs.scalars(record) == {
        "accuracy": 0.5,
        "n_samples": 4.0,
        "contaminated": 0.0,
        "ci95/accuracy/low": 0.25,
        "ci95/accuracy/high": 0.75,
        "conformal/lac/coverage_interval/low": 0.1,
        "conformal/lac/coverage_interval/high": 0.2,
        "per_class/a_b/f1": 1.0,
        "per_class/a_b_2/f1": 0.0,
        "per_class/_/f1": 0.5,
        "per_class/Fäule/f1": 0.25,
    }


def test_pictures_that_an_earlier_version_drew_are_drawn_again(own_copy, monkeypatch):
    before = tracked_runs.of_evaluation(at(own_copy), "test", None)
    assert any(run.pictures for run in before)
    monkeypatch.setattr(score_plots, "VERSION", score_plots.VERSION + 1)
    after = tracked_runs.of_evaluation(at(own_copy), "test", None)
    assert [run.pictures for run in after] == [run.pictures for run in before]


# ---------------------------------------------------------------------------------------------------------------------
# Mistakes


@pytest.mark.parametrize(
    ("option", "package", "extra"),
    [("--mlflow", "mlflow", "[mlflow]"), ("--tensorboard", "tensorboard", "[tensorboard]")],
)
def test_a_missing_package_is_an_error_that_names_the_extra(own_copy, tmp_path, monkeypatch, option, package, extra):
    hide(monkeypatch, package)
    done = evaluate(own_copy, option, tmp_path / "runs")
    assert done.code == 1
    assert f"ensemble-system{extra}" in done.stderr
    assert not (tmp_path / "runs").exists()


def test_without_an_option_no_package_of_a_tracker_is_imported(own_copy):
    code = (
        "import sys, ensemble_orchestrator as o; code = o.main(sys.argv[1:]); "
        "sys.exit(code or sum(name.split('.')[0] in ('mlflow', 'tensorboard') for name in sys.modules))"
    )
    command = [sys.executable, "-c", code, "evaluate", *DEMO, "--workspace", str(own_copy)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=PROJECT)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("option", ["--mlflow", "--tensorboard"])
def test_trackers_do_not_go_with_an_external_set(own_copy, tmp_path, option):
    assert evaluate(own_copy, "--data", tmp_path, option, tmp_path / "runs").code == 2


@pytest.mark.parametrize("package", ["mlflow", "tensorboard"])
def test_a_file_in_place_of_a_folder_is_refused_before_anything_is_scored(own_copy, tmp_path, package):
    place = tmp_path / "runs"
    place.write_text("x")
    done = evaluate(own_copy, f"--{package}", place)
    assert done.code in (1, 2)
    assert str(place) in done.stderr
    assert place.read_text() == "x"


@pytest.mark.parametrize("uri", ["nosuch://somewhere", "localhost:5000", "http://someone:secret@127.0.0.1:9"])
def test_an_address_that_mlflow_cannot_open_is_an_error_in_words(own_copy, monkeypatch, uri):
    pytest.importorskip("mlflow")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    done = evaluate(own_copy, "--mlflow", uri)
    assert done.code == 1
    assert "Expected the address of an MLflow server" in done.stderr
    assert "Traceback" not in done.stderr
    assert "secret" not in done.stderr


# ---------------------------------------------------------------------------------------------------------------------
# Runs read back


def mlflow_client(folder):
    pytest.importorskip("mlflow")
    os.environ["MLFLOW_ALLOW_FILE_STORE"] = "true"
    from mlflow.tracking import MlflowClient

    return MlflowClient(tracking_uri=folder.as_uri())


def mlflow_runs(client):
    experiment = client.get_experiment_by_name("ensemble-system")
    return client.search_runs([experiment.experiment_id], max_results=1000)


def test_mlflow_has_the_scalars_tags_and_pictures_of_each_ranked_model_once(own_copy, tmp_path):
    client = mlflow_client(tmp_path / "some runs")
    records, ranking = scores(own_copy)
    done = evaluate(own_copy, "--mlflow", tmp_path / "some runs")
    assert done.code == 0, done.stderr
    assert done.document["trackers"]["mlflow"]["new"] == len(records)
    runs = {each.info.run_name: each for each in mlflow_runs(client)}
    assert runs.keys() == {row["name"] for row in ranking["rows"]}
    for folder, record in records.items():
        each = runs[record["name"]]
        assert each.info.status == "FINISHED"
        assert expected_scalars(record).items() <= each.data.metrics.items()
        tags = {"workspace": str(own_copy), "split": "test", "kind": "member" if "/" in folder else "ensemble"}
        tags["recommended"] = str(record["name"] == ranking["recommended"]["name"]).lower()
        assert tags.items() <= each.data.tags.items()
        files = {artifact.path for artifact in client.list_artifacts(each.info.run_id)}
        pictures = {path.name for path in (own_copy / "metrics_output" / "ensembles" / folder).glob("*.png")}
        assert files == {"metrics.json", *pictures}

    again = evaluate(own_copy, "--mlflow", tmp_path / "some runs")
    assert again.document["trackers"]["mlflow"] == {
        "place": str(tmp_path / "some runs"),
        "new": 0,
        "unchanged": len(records),
    }
    remeasured = evaluate(own_copy, "--force", "--mlflow", tmp_path / "some runs")
    assert remeasured.document["trackers"]["mlflow"]["new"] == 0
    assert len(mlflow_runs(client)) == len(records)


def test_mlflow_has_a_model_that_is_evaluated_alone_and_repeats_a_run_that_failed(own_copy, tmp_path):
    client = mlflow_client(tmp_path / "runs")
    options = ("--model-name", "soft_voting", "--mlflow", tmp_path / "runs")
    assert evaluate(own_copy, *options).code == 0
    (only,) = mlflow_runs(client)
    assert only.data.tags["model"] == "soft_voting_ensemble"
    client.set_terminated(only.info.run_id, status="FAILED")
    assert evaluate(own_copy, *options).document["trackers"]["mlflow"]["new"] == 1
    assert len(mlflow_runs(client)) == 2


def test_a_tracker_that_refuses_leaves_the_evaluation_and_is_named(own_copy, tmp_path, monkeypatch):
    mlflow_client(tmp_path)
    from mlflow.exceptions import MlflowException
    from mlflow.tracking import MlflowClient

    def refuse(*_, **__):
        raise MlflowException("the disk is full")

    monkeypatch.setattr(MlflowClient, "log_batch", refuse)
    done = evaluate(own_copy, "--mlflow", tmp_path / "runs")
    assert done.code == 4
    assert "the disk is full" in done.document["failures"][0]
    assert done.document["recommended"]["name"]
    assert {each.info.status for each in mlflow_runs(mlflow_client(tmp_path / "runs"))} == {"FAILED"}


def events(folder):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    read = EventAccumulator(str(folder), size_guidance={"scalars": 0, "images": 0, "tensors": 0})
    read.Reload()
    return read


def test_tensorboard_has_the_scalars_tags_and_pictures_of_each_ranked_model_once(own_copy, tmp_path):
    pytest.importorskip("tensorboard")
    records, ranking = scores(own_copy)
    folder = tmp_path / "runs"
    done = evaluate(own_copy, "--tensorboard", folder)
    assert done.code == 0, done.stderr
    assert done.document["trackers"]["tensorboard"]["new"] == len(records)
    (workspace,) = folder.iterdir()
    for name, record in records.items():
        read = events(workspace / "test" / name)
        values = {each: read.Scalars(each) for each in read.Tags()["scalars"]}
        for scalar, value in expected_scalars(record).items():
            (only,) = values[scalar]
            assert only.value == pytest.approx(value, rel=1e-6)
        pictures = {path.stem for path in (own_copy / "metrics_output" / "ensembles" / name).glob("*.png")}
        assert set(read.Tags()["images"]) == pictures
        (text,) = read.Tensors("tags/text_summary")
        is_recommended = str(record["name"] == ranking["recommended"]["name"]).lower()
        assert f"| recommended | {is_recommended} |" in text.tensor_proto.string_val[0].decode()

    files = sorted(path for path in folder.rglob("*") if path.is_file())
    again = evaluate(own_copy, "--tensorboard", folder)
    assert again.document["trackers"]["tensorboard"]["new"] == 0
    assert sorted(path for path in folder.rglob("*") if path.is_file()) == files
    evaluate(own_copy, "--alpha", "0.3", "--tensorboard", folder)
    steps = events(workspace / "test" / "soft_voting_ensemble").Scalars("conformal/lac/alpha")
    assert [(each.step, round(each.value, 3)) for each in steps] == [(0, 0.1), (1, 0.3)]
