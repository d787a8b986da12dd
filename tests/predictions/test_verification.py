"""Verification by running members: which out-of-fold predictions pass, what is stored, and what is run again."""

from __future__ import annotations

import re
import shutil

import numpy as np
import pytest
from one_member import NAME, change, change_oof, classifier, codes, config, workspace

from utils import base_back
from utils.discovery import discover
from utils.predictions import catalog, extraction, verification
from utils.predictions.store import Store

__all__ = ["config", "workspace"]


def test_honest_predictions_pass_and_nothing_is_run_again(workspace, config, monkeypatch):
    result = discover.discover(config, workspace, verify=True)
    assert not codes(workspace)
    assert not result.failures
    assert catalog.read(workspace).members[NAME].oof["rows"] == 224
    monkeypatch.setattr(verification, "_outputs", lambda *_: pytest.fail("a network was run again"))
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
    monkeypatch.setattr(verification, "SAMPLE", sample)
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
    original = verification._run

    def listening(inspector, member, images_of, stage, kept):
        runs.append(stage)
        return original(inspector, member, images_of, stage, kept)

    monkeypatch.setattr(verification, "_run", listening)
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
    original = verification._outputs

    def listening(*arguments, **options):
        ran.append(arguments[3:])
        return original(*arguments, **options)

    monkeypatch.setattr(verification, "_outputs", listening)
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
