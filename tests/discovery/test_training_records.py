"""Training records of the base pipeline: which figure describes the checkpoint, and which problem is reported."""

from __future__ import annotations

import json
import os

import pytest
from given_predictions import empty_workspace

from utils.discovery import training_records

NAME = "CustomConvNeXt"


@pytest.fixture
def workspace(tmp_path):
    workspace = empty_workspace(tmp_path / "w")
    workspace.checkpoints.mkdir()
    (workspace.checkpoints / f"{NAME}_final.pth").write_bytes(b"weights")
    return workspace


def write(path, record):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(record))
    return path


def read(workspace, *, accuracy=None, siblings=None):
    checkpoint = workspace.checkpoints / f"{NAME}_final.pth"
    return training_records.read(
        workspace,
        NAME,
        stage="final",
        checkpoint=checkpoint,
        checkpoint_accuracy=accuracy,
        siblings=siblings or {},
    )


def codes(record):
    return [problem.code for problem in record.problems]


def test_without_a_metrics_file_the_checkpoints_accuracy_counts(workspace):
    record = read(workspace, accuracy=0.7)
    assert (record.accuracy, record.path, codes(record)) == (0.7, None, ["no_metrics"])


def test_the_final_accuracy_describes_the_final_checkpoint(workspace):
    path = write(workspace.training_metrics(NAME), {"final_accuracy": 0.8, "best_accuracy": 0.8, "test_accuracy": 0.75})
    record = read(workspace)
    assert (record.accuracy, record.test_accuracy, record.path, codes(record)) == (0.8, 0.75, path, [])


def test_another_accuracy_than_the_checkpoints_is_of_another_training(workspace):
    write(workspace.training_metrics(NAME), {"final_accuracy": 0.8})
    record = read(workspace, accuracy=0.7)
    assert (record.accuracy, codes(record)) == (0.7, ["stale_metrics"])


def test_an_older_metrics_file_is_of_another_training_where_the_checkpoint_records_nothing(workspace):
    path = write(workspace.training_metrics(NAME), {"final_accuracy": 0.8})
    os.utime(path, (1, 1))
    record = read(workspace)
    assert (record.accuracy, codes(record)) == (None, ["stale_metrics"])


def test_a_better_epoch_that_was_not_kept_is_reported_with_the_stage_that_holds_it(workspace):
    write(workspace.training_metrics(NAME), {"final_accuracy": 0.8, "best_accuracy": 0.9})
    record = read(workspace, siblings={"finetune_best": 0.9})
    assert codes(record) == ["best_accuracy_not_kept"]
    assert f"{NAME}_finetune_best.pth" in record.problems[0].message


def test_the_last_epoch_of_a_training_that_selects_none_is_no_problem(workspace):
    metrics = {"final_accuracy": 0.8, "best_accuracy": 0.9, "selection": "last"}
    write(workspace.training_metrics(NAME), metrics)
    assert codes(read(workspace, siblings={"finetune_best": 0.9})) == []


@pytest.mark.parametrize(
    ("results", "expected"),
    [({"mean_accuracy": 0.9}, "kfold_over_all_images"), ({"split_digest": "d"}, None), ({"oof_file": "f"}, None)],
)
def test_a_kfold_record_without_predictions_covers_all_images(workspace, results, expected):
    assert training_records.kfold_over_all_images(workspace, NAME) is None
    write(workspace.kfold_results(NAME), results)
    problem = training_records.kfold_over_all_images(workspace, NAME)
    assert (problem and problem.code) == expected


@pytest.mark.parametrize(
    ("mapping", "expected"),
    [
        ({"1": "bee", "0": "ant"}, ("ant", "bee")),
        ({"0": "class_0", "1": "class_1"}, None),
        ({"first": "ant"}, None),
        ({}, None),
    ],
)
def test_a_class_mapping_gives_names_in_the_order_of_the_outputs_unless_they_are_placeholders(
    workspace, mapping, expected
):
    write(workspace.class_mapping(NAME), mapping)
    assert training_records.class_mapping(workspace, NAME) == expected
