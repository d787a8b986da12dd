"""Members that are run tell the truth: planted lies are found, honest files pass, and no verdict is forgotten."""

from __future__ import annotations

import re
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from one_member import NAME, change, change_oof, classifier, codes, codes_after, config, set_accuracy, workspace

from utils import base_back
from utils.core.errors import UserError
from utils.discovery import discover
from utils.predictions import catalog, extraction, inspection
from utils.predictions.store import Store

__all__ = ["config", "workspace"]
ALONE = {"train": None, "val": None}
"""Numbers of groups of a workspace in which every image is one."""
SURPLUS = "the network has 7 outputs"


def test_honest_predictions_pass_and_nothing_is_run_again(workspace, config, monkeypatch):
    result = discover.discover(config, workspace, verify=True)
    assert not codes(workspace)
    assert not result.failures
    assert catalog.read(workspace).members[NAME].oof["rows"] == 224
    monkeypatch.setattr(inspection, "_outputs", lambda *_: pytest.fail("a network was run again"))
    assert discover.discover(config, workspace, verify=True).text == result.text


def test_the_full_networks_outputs_passed_off_as_out_of_fold_are_refused_for_good(workspace, config):
    discover.discover(config, workspace)
    found = catalog.read(workspace)
    store = Store(config, workspace, found)
    extraction.ensure(store, [found.members[NAME]], ("train",))
    in_sample = store.rows(found.members[NAME], "train")
    for path in workspace.checkpoints.glob("*_fold*.pth"):
        path.unlink()  # whoever passes them off has no fold networks to show

    def plant(arrays):
        place = {str(sample_id): row for row, sample_id in enumerate(in_sample.sample_ids)}
        rows = [place[sample_id] for sample_id in arrays["sample_ids"].tolist()]
        arrays["logits"] = np.array(in_sample.logits)[rows]

    change_oof(workspace, plant)
    discover.discover(config, workspace)
    assert catalog.read(workspace).members[NAME].oof is not None  # a scan of files cannot tell
    result = discover.discover(config, workspace, verify=True)
    assert "out-of-fold predictions refused: 224 of 224 sampled rows are what the full network gives" in result.text
    for _ in range(2):
        found = catalog.read(workspace)
        assert found.members[NAME].oof is None
        assert found.members[NAME].usable
        assert Store(config, workspace, found).oof(found.members[NAME]) is None
        assert "oof_in_sample" in codes(workspace)
        discover.discover(config, workspace)  # a later scan, which runs nothing, does not forget


@pytest.mark.parametrize(("sample", "kept"), [(500, {"val", "train"}), (100, {"val"})])
def test_what_a_verification_ran_over_whole_splits_is_stored_as_extraction_stores_it(
    workspace, config, monkeypatch, sample, kept
):
    monkeypatch.setattr(inspection, "SAMPLE", sample)
    discover.discover(config, workspace, verify=True)
    found = catalog.read(workspace)
    member, store = found.members[NAME], Store(config, workspace, found)
    assert {split for split in ("train", "val", "test") if store.is_stored(member, split)} == kept
    rows = {split: store.rows(member, split, embeddings=True) for split in kept}
    shutil.rmtree(workspace.ensembles / "predictions")
    extraction.ensure(store, [member], sorted(kept))
    for split, verified in rows.items():
        extracted = store.rows(member, split, embeddings=True)
        for name in ("logits", "embeddings", "labels", "sample_ids", "out_of_sample"):
            assert np.array_equal(getattr(verified, name), getattr(extracted, name))


def test_a_verification_reads_what_extraction_stored(workspace, config, monkeypatch):
    discover.discover(config, workspace)
    found = catalog.read(workspace)
    extraction.ensure(Store(config, workspace, found), [found.members[NAME]], ("val", "train"))
    runs = []
    original = inspection._run

    def listening(inspector, member, images_of, stage, kept):
        runs.append(stage)
        return original(inspector, member, images_of, stage, kept)

    monkeypatch.setattr(inspection, "_run", listening)
    discover.discover(config, workspace, verify=True)
    assert runs == ["fold0", "fold1"]
    discover.discover(config, workspace, verify=True, force=True)
    assert runs == ["fold0", "fold1", None, "fold0", "fold1"]
    assert not codes(workspace)


def test_a_few_planted_rows_are_enough(workspace, config):
    discover.discover(config, workspace)
    found = catalog.read(workspace)
    store = Store(config, workspace, found)
    extraction.ensure(store, [found.members[NAME]], ("train",))
    in_sample = np.array(store.rows(found.members[NAME], "train").logits)
    change_oof(workspace, lambda arrays: arrays["logits"].__setitem__(slice(0, 6), in_sample[:6]))
    discover.discover(config, workspace, verify=True)
    assert "oof_in_sample" in codes(workspace)


def test_a_tampered_fold_is_refused(workspace, config):
    def tamper(arrays):
        rows = np.flatnonzero(arrays["fold"] == 1)[:10]
        arrays["logits"][rows, arrays["labels"][rows]] += 5

    change_oof(workspace, tamper)
    result = discover.discover(config, workspace, verify=True)
    assert re.search(r"refused: fold1 run again differs on 10 of \d+ sampled rows", result.text)
    assert "fold0 run again" not in result.text
    assert catalog.read(workspace).members[NAME].oof is None


def test_saturated_honest_predictions_pass(workspace, config):
    """Perfect on every row, with logits so large that every probability is 1: suspicious to look at, and honest."""
    with np.load(workspace.base_oof(NAME)) as arrays:
        wrong = arrays["sample_ids"][arrays["logits"].argmax(axis=1) != arrays["labels"]]
    for sample_id in wrong.tolist():
        (workspace.split_dir / "train" / sample_id).unlink()

    def scale(record):
        for name in classifier(record):
            record["model_state_dict"][name] *= 1000

    for role in ("final", "fold0", "fold1"):
        change(workspace.checkpoint(NAME, role), scale)

    def keep_right(arrays):
        right = ~np.isin(arrays["sample_ids"], wrong)
        for key in ("logits", "labels", "sample_ids", "fold"):
            arrays[key] = arrays[key][right]
        arrays["logits"] = arrays["logits"] * np.float32(1000)

    changed = change_oof(workspace, keep_right)
    discover.discover(config, workspace)
    found = catalog.read(workspace)
    store = Store(config, workspace, found)
    extraction.ensure(store, [found.members[NAME]], ("val",))
    rows = store.rows(found.members[NAME], "val")
    for row in np.flatnonzero(rows.logits.argmax(axis=1) != rows.labels):
        (workspace.split_dir / "val" / str(rows.sample_ids[row])).unlink()
    discover.discover(config, workspace, verify=True)
    found = catalog.read(workspace)
    assert found.members[NAME].oof["accuracy"] == 1
    top_two = np.sort(changed["logits"], axis=1)[:, -2:]
    assert np.median(top_two[:, 1] - top_two[:, 0]) > 100  # softmax gives exactly 1
    assert not {code for code in codes(workspace) if code.startswith("oof")}


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


# another BASE-BACK's networks ---------------------------------------------------------------------------------------


def test_a_fold_of_another_base_back_is_not_checked_and_refuses_nothing(workspace, config, monkeypatch):
    """Once the right one is mounted, a scan forgets that it could not be run, and the next verification runs it."""
    change(workspace.checkpoint(NAME, "fold0"), lambda record: record["extra"].update(base_back="external"))
    for _ in range(2):
        discover.discover(config, workspace, verify=True)
        (problem,) = [problem for problem in catalog.read(workspace).problems if problem.member == NAME]
        assert (problem.code, problem.severity) == ("fold_unreadable", "info")
        assert "CustomConvNeXt_fold0.pth: its network is another BASE-BACK's, and the bundled one is" in problem.message
        assert "--base-back DIR" in problem.message
        assert catalog.read(workspace).members[NAME].oof["rows"] == 224
    monkeypatch.setattr(base_back, "source_digest", lambda path: "another")
    discover.discover(config, workspace)
    assert not codes(workspace)
    monkeypatch.setattr(base_back, "kind", lambda path: "external")
    ran = []
    original = inspection._outputs

    def listening(*arguments, **options):
        ran.append(arguments[3:])
        return original(*arguments, **options)

    monkeypatch.setattr(inspection, "_outputs", listening)
    discover.discover(config, workspace, verify=True)
    assert ran == [(), ("fold0",), ("fold1",)]
    assert not codes(workspace)


def test_what_did_not_run_with_one_base_back_is_open_with_another(workspace, config, monkeypatch):
    change(workspace.checkpoint(NAME, "final"), lambda record: record["extra"].update(base_back="external"))
    result = discover.discover(config, workspace, verify=True)
    assert result.failures
    assert codes(workspace) == {"does_not_run"}
    discover.discover(config, workspace)
    assert codes(workspace) == {"does_not_run"}  # a scan with the same one does not forget
    monkeypatch.setattr(base_back, "source_digest", lambda path: "another")
    assert not discover.discover(config, workspace).failures
    assert catalog.read(workspace).members[NAME].usable
