"""`import ensemble_system`: what it reads is what the commands wrote, and it loads nothing of ours into the caller."""

from __future__ import annotations

import json
import subprocess
import sys

import numpy as np
import pytest
from conftest import PROJECT
from in_process import run as command_line

import ensemble_system as es


@pytest.fixture(scope="module")
def workspace(built) -> es.Workspace:
    return es.open(built)


def test_the_ranking_is_that_of_the_file(workspace, built):
    record = json.loads((built / "metrics_output/ensembles/ranking.json").read_text())
    ranking = workspace.ranking()
    assert [row["name"] for row in ranking] == [row["name"] for row in record["rows"]]
    assert (ranking.recommended, ranking.n, len(ranking)) == (
        record["recommended"]["name"],
        record["n"],
        len(record["rows"]),
    )
    assert workspace.metrics("recommended") == workspace.metrics(ranking.recommended)
    with pytest.raises(FileNotFoundError, match=r"ranking_val\.json: no such file; `evaluate --split val` writes it"):
        workspace.ranking("val")


def test_predictions_of_ensembles_and_members_give_the_scores_that_evaluate_wrote(workspace):
    for row in workspace.ranking():
        predictions = workspace.predictions(row["name"])
        p_true = predictions.probabilities[np.arange(len(predictions.labels)), predictions.labels]
        assert -np.log(p_true).mean() == pytest.approx(workspace.metrics(row["name"])["log_loss"], rel=1e-6)
        assert len(set(predictions.sample_ids.tolist())) == workspace.ranking().n
        assert len(predictions.classes) == predictions.probabilities.shape[1]


def test_cross_fitted_predictions_give_the_out_of_sample_score(workspace):
    predictions = workspace.predictions("soft_voting_ensemble", "out_of_sample")
    p_true = predictions.probabilities[np.arange(len(predictions.labels)), predictions.labels]
    crossfit = workspace.metrics("soft_voting_ensemble")["crossfit"]
    assert crossfit["n"] == len(p_true)
    assert -np.log(p_true).mean() == pytest.approx(crossfit["log_loss"], rel=1e-5)


def test_a_name_or_folder_that_is_not_there_is_said(workspace, tmp_path):
    with pytest.raises(KeyError, match="nobody: no scores on test; there are CustomConvNeXt"):
        workspace.metrics("nobody")
    with pytest.raises(KeyError, match="nobody: no predictions of test"):
        workspace.predictions("nobody")
    with pytest.raises(FileNotFoundError, match="no workspace; expected the folder `ensembles`"):
        es.open(tmp_path)
    assert not list(tmp_path.iterdir())


def test_images_are_classified_by_a_process_of_its_own(workspace, built, tmp_path, monkeypatch):
    (tmp_path / "utils.py").write_text("raise SystemExit('a module of the user was imported')\n")
    monkeypatch.chdir(tmp_path)
    image = next((built / "split_dataset" / "test" / "2").iterdir())
    (tmp_path / "broken.png").write_bytes(b"no image")
    answers = {answer.path: answer for answer in workspace.predict([image, tmp_path / "broken.png"])}
    stored = workspace.predictions("recommended")
    row = stored.sample_ids.tolist().index(f"2/{image.name}")
    answer = answers[str(image)]
    assert answer.predicted == stored.classes[stored.probabilities[row].argmax()]
    assert list(answer.probabilities.values()) == pytest.approx(stored.probabilities[row], abs=1e-5)
    assert "cannot be decoded" in answers[str(tmp_path / "broken.png")].error
    with pytest.raises(es.CommandError, match=r"predict ended with 1: .*nobody"):
        workspace.predict([image], "nobody")


def test_neither_utils_nor_torch_enters_the_callers_process(built, tmp_path):
    """What the process that classifies would have answered is copied by a program in the place of Python."""
    image = next((built / "split_dataset" / "test" / "2").iterdir())
    answers, stand_in = tmp_path / "answers.jsonl", tmp_path / "python"
    options = ("--model-name", "soft_voting_ensemble", "--to", answers, "--probabilities", "--quiet")
    done = command_line("predict", image, *options, workspace=built)
    assert done.code == 0, done.stderr
    stand_in.write_text(f'#!/bin/sh\nwhile [ "$1" != --to ]; do shift; done\ncp "{answers}" "$2"\n')
    stand_in.chmod(0o755)
    (tmp_path / "utils.py").write_text("mine = True\n")
    code = (
        "import sys, utils, ensemble_system as es; w = es.open(sys.argv[1]); w.predictions('recommended'); "
        "assert w.predict([sys.argv[2]], python=sys.argv[3])[0].path == sys.argv[2]; assert utils.mine; "
        "assert not {'torch', 'utils.core', 'config', 'pandas'} & sys.modules.keys()"
    )
    environment = {"PYTHONPATH": str(PROJECT), "PATH": "/usr/bin:/bin"}
    command = [sys.executable, "-c", code, str(built), str(image), str(stand_in)]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
