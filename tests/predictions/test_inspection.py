"""Stored results of running members: accuracies, class orders and extra outputs that contradict the files."""

from __future__ import annotations

import re
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from one_member import NAME, change, classifier, codes, codes_after, config, set_accuracy, workspace

from utils import base_back
from utils.core.errors import UserError
from utils.discovery import discover
from utils.predictions import catalog, extraction, inspection
from utils.predictions.store import Store

__all__ = ["config", "workspace"]
ALONE = {"train": None, "val": None}
"""Numbers of groups of a workspace in which every image is one."""
SURPLUS = "the network has 7 outputs"


def test_predictions_that_beat_val_beyond_chance_are_suspected(workspace, config):
    discover.discover(config, workspace)
    member = catalog.read(workspace).members[NAME]
    with_rows, measured = replace(member, oof={"rows": 1000}), {"n": 100, "accuracy": 0.8}

    def problems(accuracy, groups):
        return inspection.oof_accuracy_problems(with_rows, accuracy, measured, remedy="do this", groups=groups)

    (problem,) = problems(0.95, ALONE)
    assert (problem.code, problem.severity) == ("oof_suspected", "warning")
    assert problem.remedy.endswith("do this")
    assert not problems(0.88, ALONE)
    assert not problems(0.95, {"train": 100, "val": 10})  # rows of a group may be right or wrong together


@pytest.mark.parametrize("kind", ["bundled", "external"])
def test_every_remedy_names_the_base_back_that_is_mounted(workspace, config, monkeypatch, kind):
    discover.discover(config, workspace)
    member = catalog.read(workspace).members[NAME]
    monkeypatch.setattr(base_back, "kind", lambda path: kind)
    monkeypatch.setattr(base_back, "locate", lambda: Path("/some where/BASE-BACK"))
    facts = {"equal": 9, "told": 10, "refolded": {"fold0": [3, 4]}, "unreadable": []}
    found = inspection.leakage_problems(workspace, member, facts)
    remedy = catalog.kfold_remedy(workspace, member)
    found += inspection.oof_accuracy_problems(member, 0.95, {"n": 100, "accuracy": 0.5}, remedy=remedy, groups=ALONE)
    assert [problem.code for problem in found] == ["oof_in_sample", "oof_fold_disagrees", "oof_suspected"]
    external = "--base-back '/some where/BASE-BACK' " if kind == "external" else ""
    command = f"--stages kfold --backbones {NAME} {external}--workspace {workspace.base}"
    assert all(problem.remedy.endswith(command) for problem in found)
    file = {**member.checkpoints[0], "path": "elsewhere/weights.pth"}
    declared = replace(member, name="leaf", architecture="timm:resnet18", checkpoints=(file,))
    remedy = catalog.kfold_remedy(workspace, declared)  # nobody but its author can repeat its training
    assert "--stages kfold" not in remedy
    assert f"main.py --backbones leaf_kfold=timm:resnet18 --weights hub --workspace {workspace.base}" in remedy
    both = catalog.kfold_command(workspace, [member, declared]).split("; ")
    assert [f"--backbones {NAME} " in both[0], "leaf_kfold=timm:resnet18" in both[1]] == [True, True]


def test_a_recorded_accuracy_that_the_network_does_not_have_is_contradicted(workspace, config):
    set_accuracy(workspace, 0.5)
    assert "accuracy_differs" not in codes_after(config, workspace)
    assert "accuracy_differs" in codes_after(config, workspace, verify=True)
    (problem,) = [p for p in catalog.read(workspace).problems if p.code == "accuracy_differs"]
    assert re.fullmatch(r"recorded accuracy 0.5000; measured on the 28 val images it is \d.\d{4}", problem.message)


def test_one_row_of_a_small_split_is_no_contradiction(workspace, config):
    discover.discover(config, workspace)
    member = catalog.read(workspace).members[NAME]

    def found(recorded, n, right):
        facts = {"n": n, "accuracy": right / n, "matched": right / n, "order": [0, 1, 2, 3]}
        return inspection.measured_problems("0123", replace(member, recorded_accuracy=recorded), facts)

    assert not found(26 / 28, 28, 27)
    assert found(26 / 28, 28, 28)
    assert not found(0.9, 1000, 905)
    assert found(0.9, 1000, 906)


def test_the_first_pass_measures_what_it_streams_anyway(workspace, config):
    set_accuracy(workspace, 0.5)
    discover.discover(config, workspace)
    store = Store(config, workspace, catalog.load(workspace))
    extraction.ensure(store, [store.catalog.members[NAME]], ("val",))
    assert "accuracy_differs" in codes(workspace)
    assert "accuracy_differs" in codes_after(config, workspace)


def test_outputs_in_another_order_than_their_names_are_measured(workspace, config):
    def permute(record):
        for name in classifier(record):
            record["model_state_dict"][name] = record["model_state_dict"][name][[1, 2, 3, 0]]

    change(workspace.checkpoint(NAME, "final"), permute)
    workspace.base_oof(NAME).unlink()
    result = discover.discover(config, workspace, verify=True)
    assert re.search(r"if output 3 is 0, output 0 is 1, output 1 is 2, output 2 is 3", result.text)
    assert catalog.read(workspace).members[NAME].usable is False
    assert result.failures
    # Also without --verify: the pass that would have used it stops, and the next one goes without.
    workspace.digests.unlink()
    shutil.rmtree(workspace.ensembles / "predictions")
    discover.discover(config, workspace)
    store = Store(config, workspace, catalog.load(workspace))
    with pytest.raises(UserError, match="continues without CustomConvNeXt"):
        extraction.ensure(store, [store.catalog.members[NAME]], ("val",))
    assert catalog.read(workspace).members[NAME].usable is False


def widen(record, bias):
    """Three more outputs, and a checkpoint that does not name its classes, as the public base pipeline leaves them."""
    del record["extra"]["classes"]
    for name in classifier(record):
        value = record["model_state_dict"][name]
        more = torch.full((3,), bias) if value.ndim == 1 else torch.zeros(3, value.shape[1])
        record["model_state_dict"][name] = torch.cat([value, more])


def extra_outputs(workspace):
    return [problem for problem in catalog.read(workspace).problems if problem.code == "surplus_logits"]


@pytest.mark.parametrize("by", ["verify", "the first pass"])
def test_extra_outputs_that_are_never_predicted_become_an_info(workspace, config, by):
    change(workspace.checkpoint(NAME, "final"), lambda record: widen(record, -30.0))
    discover.discover(config, workspace)
    (problem,) = extra_outputs(workspace)
    assert (problem.severity, problem.message) == ("warning", f"{SURPLUS} for 4 classes; the last 3 are cut off")
    if by == "verify":
        discover.discover(config, workspace, verify=True)
    else:
        store = Store(config, workspace, catalog.load(workspace))
        extraction.ensure(store, [store.catalog.members[NAME]], ("val",))
    for _ in range(2):
        (problem,) = extra_outputs(workspace)
        assert (problem.severity, problem.remedy) == ("info", "nothing to do")
        assert problem.message.endswith("on the 28 val images they are never predicted")
        discover.discover(config, workspace)


def test_extra_outputs_that_are_predicted_are_an_error_and_no_longer_a_warning(workspace, config):
    change(workspace.checkpoint(NAME, "final"), lambda record: widen(record, 30.0))
    result = discover.discover(config, workspace, verify=True)
    for _ in range(2):
        (problem,) = extra_outputs(workspace)
        assert problem.severity == "error"
        assert "7 outputs for 4 classes, and the extra outputs are predicted" in problem.message
        assert catalog.read(workspace).members[NAME].usable is False
        assert any(problem.message in failure for failure in result.failures)
        result = discover.discover(config, workspace)


def test_a_network_that_does_not_run_leaves_its_extra_outputs_a_warning(workspace, config):
    def break_it(record):
        widen(record, -30.0)
        record["model_state_dict"].pop(next(iter(record["model_state_dict"])))

    change(workspace.checkpoint(NAME, "final"), break_it)
    discover.discover(config, workspace, verify=True)
    assert "does_not_run" in codes(workspace)
    assert [problem.severity for problem in extra_outputs(workspace)] == ["warning"]
