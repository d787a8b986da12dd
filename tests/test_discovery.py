"""Discovery that tells the truth: planted lies are found, honest files pass, and what was found is not forgotten."""

from __future__ import annotations

import json
import os
import re
import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch
from conftest import PROJECT
from test_predictions import workspace_at

from utils import catalog, discovery, inspection, out_of_fold
from utils.config_file import load
from utils.errors import UserError
from utils.predictions import Store

NAME = "CustomConvNeXt"


@pytest.fixture
def config():
    return load(PROJECT / "configs" / "digits_demo.yaml", overrides=["device=cpu"])


@pytest.fixture
def workspace(tmp_path, trained):
    """A copy of the trained workspace with one member of three left, which is what most of these tests run."""
    base = shutil.copytree(trained, tmp_path / "w")
    for path in (base / "checkpoints").glob("*.pth"):
        if not path.name.startswith(NAME):
            path.unlink()
    return workspace_at(base)


def change(path, alter):
    """Rewrite a checkpoint after `alter(record)`."""
    record = torch.load(path, weights_only=True)
    alter(record)
    torch.save(record, path)


def change_oof(workspace, alter):
    path = workspace.base_oof(NAME)
    with np.load(path) as arrays:
        found = dict(arrays)
    alter(found)
    np.savez(path, **found)
    return found


def codes(workspace, member=NAME):
    return {problem.code for problem in catalog.read(workspace).problems if problem.member == member}


def classifier(record):
    weights = record["model_state_dict"]
    return [name for name, value in weights.items() if value.shape[:1] == (4,)][-2:]


def set_accuracy(workspace, accuracy):
    """Let checkpoint and metrics file claim this val accuracy."""

    def claim(record):
        record["extra"]["final_accuracy"] = record["extra"]["best_accuracy"] = accuracy

    change(workspace.checkpoint(NAME, "final"), claim)
    path = workspace.training_metrics(NAME)
    path.write_text(json.dumps(json.loads(path.read_text()) | {"final_accuracy": accuracy, "best_accuracy": accuracy}))


# out-of-fold predictions ------------------------------------------------------------------------------------------


def test_honest_predictions_pass_and_nothing_is_run_again(workspace, config, monkeypatch):
    result = discovery.discover(config, workspace, verify=True)
    assert not codes(workspace)
    assert not result.failures
    assert catalog.read(workspace).members[NAME].oof["rows"] == 224
    monkeypatch.setattr(inspection, "_logits", lambda *_: pytest.fail("a network was run again"))
    assert discovery.discover(config, workspace, verify=True).text == result.text


def test_the_full_networks_outputs_passed_off_as_out_of_fold_are_refused_for_good(workspace, config):
    discovery.discover(config, workspace)
    found = catalog.read(workspace)
    store = Store(config, workspace, found)
    store.ensure([found.members[NAME]], ("train",))
    in_sample = store.rows(found.members[NAME], "train")
    for path in workspace.checkpoints.glob("*_fold*.pth"):
        path.unlink()  # whoever passes them off has no fold networks to show

    def plant(arrays):
        place = {str(sample_id): row for row, sample_id in enumerate(in_sample.sample_ids)}
        rows = [place[sample_id] for sample_id in arrays["sample_ids"].tolist()]
        arrays["logits"] = np.array(in_sample.logits)[rows]

    change_oof(workspace, plant)
    discovery.discover(config, workspace)
    assert catalog.read(workspace).members[NAME].oof is not None  # a scan of files cannot tell
    result = discovery.discover(config, workspace, verify=True)
    assert "out-of-fold predictions refused: 224 of 224 sampled rows are what the full network gives" in result.text
    for _ in range(2):
        found = catalog.read(workspace)
        assert found.members[NAME].oof is None
        assert found.members[NAME].usable
        assert Store(config, workspace, found).oof(found.members[NAME]) is None
        assert "oof_in_sample" in codes(workspace)
        discovery.discover(config, workspace)  # a later scan, which runs nothing, does not forget


def test_a_few_planted_rows_are_enough(workspace, config):
    discovery.discover(config, workspace)
    found = catalog.read(workspace)
    store = Store(config, workspace, found)
    store.ensure([found.members[NAME]], ("train",))
    in_sample = np.array(store.rows(found.members[NAME], "train").logits)
    change_oof(workspace, lambda arrays: arrays["logits"].__setitem__(slice(0, 6), in_sample[:6]))
    discovery.discover(config, workspace, verify=True)
    assert "oof_in_sample" in codes(workspace)


def test_a_tampered_fold_is_refused(workspace, config):
    def tamper(arrays):
        rows = np.flatnonzero(arrays["fold"] == 1)[:10]
        arrays["logits"][rows, arrays["labels"][rows]] += 5

    change_oof(workspace, tamper)
    result = discovery.discover(config, workspace, verify=True)
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
    discovery.discover(config, workspace)
    found = catalog.read(workspace)
    store = Store(config, workspace, found)
    store.ensure([found.members[NAME]], ("val",))
    rows = store.rows(found.members[NAME], "val")
    for row in np.flatnonzero(rows.logits.argmax(axis=1) != rows.labels):
        (workspace.split_dir / "val" / str(rows.sample_ids[row])).unlink()
    discovery.discover(config, workspace, verify=True)
    found = catalog.read(workspace)
    assert found.members[NAME].oof["accuracy"] == 1
    top_two = np.sort(changed["logits"], axis=1)[:, -2:]
    assert np.median(top_two[:, 1] - top_two[:, 0]) > 100  # softmax gives exactly 1
    assert not {code for code in codes(workspace) if code.startswith("oof")}


def test_equal_rows_are_told_by_their_logits_even_where_all_are_sure():
    rng = np.random.default_rng(0)
    logits = rng.normal(size=(500, 4)).astype(np.float32) * 300
    other = logits + rng.normal(size=logits.shape).astype(np.float32)
    assert out_of_fold.equal_rows("logits", logits, logits, tolerance=1e-5) == (500, 500)
    assert out_of_fold.equal_rows("logits", other, logits, tolerance=1e-5) == (0, 500)


@pytest.mark.parametrize("kind", ["probabilities", "half-precision probabilities"])
def test_probabilities_are_compared_where_they_tell_anything(kind):
    rng = np.random.default_rng(1)
    logits = (rng.normal(size=(400, 4)) * np.repeat([1.0, 200.0], 200)[:, None]).astype(np.float32)
    other = logits + rng.normal(size=logits.shape).astype(np.float32) * np.repeat([0.5, 20.0], 200)[:, None]
    exact = np.exp(logits - logits.max(axis=1, keepdims=True))
    exact = (exact / exact.sum(axis=1, keepdims=True)).astype(np.float16 if "half" in kind else np.float32)
    stored = np.log(np.maximum(exact.astype(np.float64), 1e-12))
    same, told = out_of_fold.equal_rows(kind, stored, logits, tolerance=1e-5)
    assert same == told
    assert 150 <= told <= 250  # the sure half says nothing
    different, told = out_of_fold.equal_rows(kind, stored, other, tolerance=1e-5)
    assert different <= 0.01 * told


def test_half_precision_probabilities_are_taken_and_said(workspace, config):
    def halve(arrays):
        raised = np.exp(arrays.pop("logits").astype(np.float64))
        arrays["probabilities"] = (raised / raised.sum(axis=1, keepdims=True)).astype(np.float16)

    changed = change_oof(workspace, halve)
    result = discovery.discover(config, workspace, verify=True)
    assert "its out-of-fold probabilities have half precision" in result.text
    assert codes(workspace) == {"half_precision"}
    found = catalog.read(workspace)
    rows = Store(config, workspace, found).oof(found.members[NAME])
    np.testing.assert_allclose(np.exp(rows.logits), changed["probabilities"].astype(np.float32), atol=1e-6)


def test_missing_rows_are_counted_and_equal_images_in_two_folds_are_named(workspace, config):
    change_oof(workspace, lambda a: a.update({k: a[k][3:] for k in ("logits", "labels", "sample_ids", "fold")}))
    with np.load(workspace.base_oof(NAME)) as arrays:
        one = str(arrays["sample_ids"][arrays["fold"] == 0][0])
        other = next(i for i in arrays["sample_ids"][arrays["fold"] == 1].tolist() if i[0] == one[0])
    shutil.copy(workspace.split_dir / "train" / one, workspace.split_dir / "train" / other)
    result = discovery.discover(config, workspace)
    assert "out-of-fold predictions for 221 of 224 train images; 3 rows are missing" in result.text
    assert f"2 out-of-fold rows have an equal image in another fold, first {min(one, other)}" in result.text


@pytest.mark.parametrize(
    ("right", "n", "other_right", "m", "expected"),
    [(95, 100, 80, 100, 0.00067), (50, 100, 50, 100, 0.5), (100, 100, 40, 40, 1.0), (0, 10, 0, 10, 1.0)],
)
def test_the_proportion_test_is_the_textbooks(right, n, other_right, m, expected):
    better, other = {"accuracy": right / n, "n": n}, {"accuracy": other_right / m, "n": m}
    assert out_of_fold.better_by_chance(better, other) == pytest.approx(expected, abs=1e-5)


def test_predictions_that_beat_val_beyond_chance_are_suspected(workspace, config):
    discovery.discover(config, workspace)
    member = catalog.read(workspace).members[NAME]
    measured = {"n": 100, "accuracy": 0.8}
    (problem,) = inspection.suspicion(replace(member, oof={"rows": 1000}), 0.95, measured)
    assert (problem.code, problem.severity) == ("oof_suspected", "warning")
    assert not inspection.suspicion(replace(member, oof={"rows": 1000}), 0.88, measured)


# what is recorded and what is measured ----------------------------------------------------------------------------


def test_a_recorded_accuracy_that_the_network_does_not_have_is_contradicted(workspace, config):
    set_accuracy(workspace, 0.5)
    assert "accuracy_differs" not in codes_after(config, workspace)
    assert "accuracy_differs" in codes_after(config, workspace, verify=True)
    (problem,) = [p for p in catalog.read(workspace).problems if p.code == "accuracy_differs"]
    assert re.fullmatch(r"recorded accuracy 0.5000; measured on the 28 val images it is \d.\d{4}", problem.message)


def codes_after(config, workspace, **options):
    discovery.discover(config, workspace, **options)
    return codes(workspace)


def test_one_row_of_a_small_split_is_no_contradiction(workspace, config):
    discovery.discover(config, workspace)
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
    discovery.discover(config, workspace)
    store = Store(config, workspace, catalog.load(workspace))
    store.ensure([store.catalog.members[NAME]], ("val",))
    assert "accuracy_differs" in codes(workspace)
    assert "accuracy_differs" in codes_after(config, workspace)


def test_outputs_in_another_order_than_their_names_are_measured(workspace, config):
    def permute(record):
        for name in classifier(record):
            record["model_state_dict"][name] = record["model_state_dict"][name][[1, 2, 3, 0]]

    change(workspace.checkpoint(NAME, "final"), permute)
    workspace.base_oof(NAME).unlink()
    result = discovery.discover(config, workspace, verify=True)
    assert re.search(r"if output 3 is 0, output 0 is 1, output 1 is 2, output 2 is 3", result.text)
    assert catalog.read(workspace).members[NAME].usable is False
    assert result.failures
    # Also without --verify: the pass that would have used it stops, and the next one goes without.
    workspace.digests.unlink()
    discovery.discover(config, workspace)
    store = Store(config, workspace, catalog.load(workspace))
    with pytest.raises(UserError, match="The same command goes on without CustomConvNeXt"):
        store.ensure([store.catalog.members[NAME]], ("val",))
    assert catalog.read(workspace).members[NAME].usable is False


def test_metrics_of_another_training_do_not_count(workspace, config):
    path = workspace.training_metrics(NAME)
    own = json.loads(path.read_text())["final_accuracy"]
    path.write_text(json.dumps(json.loads(path.read_text()) | {"final_accuracy": 0.123}))
    result = discovery.discover(config, workspace)
    assert f"has the accuracy 0.1230, {NAME}_final.pth itself {own:.4f}" in result.text
    assert catalog.read(workspace).members[NAME].recorded_accuracy == own
    change(workspace.checkpoint(NAME, "final"), lambda record: record["extra"].pop("final_accuracy"))
    os.utime(path, (1e9, 1e9))
    result = discovery.discover(config, workspace)
    assert re.search(rf"is \d+ minutes older than {NAME}_final.pth", result.text)


def test_another_image_size_than_the_configurations_is_said(workspace):
    config = load(PROJECT / "configs" / "digits_demo.yaml", overrides=["dataset.img_size=64", "device=cpu"])
    assert "made for 32 px; dataset.img_size is 64" in discovery.discover(config, workspace).text


def test_a_catalog_older_than_its_files_is_said(workspace, config, caplog):
    import logging

    discovery.discover(config, workspace)
    logging.getLogger("disease_pipeline").addHandler(caplog.handler)
    catalog.load(workspace)
    assert not caplog.records
    shutil.copy(workspace.checkpoint(NAME, "final"), workspace.checkpoints / "CustomMaxViT_final.pth")
    catalog.load(workspace)
    logging.getLogger("disease_pipeline").removeHandler(caplog.handler)
    assert "the catalog is older than CustomMaxViT_final.pth; run" in caplog.text


def test_equal_images_in_two_splits_are_named_with_both_paths(workspace, config):
    train = sorted((workspace.split_dir / "train" / "2").iterdir())
    for number, path in enumerate(train[:22]):
        shutil.copy(path, workspace.split_dir / "val" / "2" / f"zz_{number}.png")
    shutil.copy(train[0], workspace.split_dir / "test" / "3" / "zz.png")
    result = discovery.discover(config, workspace)
    assert f"the same image in two splits: train/2/{train[0].name} and val/2/zz_0.png" in result.text
    assert f"the same image in two splits: train/2/{train[0].name} and test/3/zz.png" in result.text
    assert "3 more images stand in two splits" in result.text


# which members there are ------------------------------------------------------------------------------------------


def test_derived_files_are_members_only_by_name(workspace, config):
    shutil.copy(workspace.checkpoint(NAME, "final"), workspace.checkpoint(NAME, "uniform_soup"))
    shutil.copy(workspace.checkpoint(NAME, "final"), workspace.checkpoint(NAME, "distilled"))
    change(workspace.checkpoint(NAME, "distilled"), lambda record: record["extra"].update(parents=["A", "B"]))
    result = discovery.discover(config, workspace)
    assert "derived, used only where backbones.include names them: CustomConvNeXt_distilled" in result.text
    found = catalog.load(workspace)
    soup, student = found.members[f"{NAME}_uniform_soup"], found.members[f"{NAME}_distilled"]
    assert (soup.source, soup.parents, soup.oof) == ("derived", (NAME,), None)
    assert student.parents == ("A", "B")
    assert [member.name for member in catalog.select(found, config)] == [NAME]
    asked = load(config_path(), overrides=[f"backbones.include=[{NAME}_uniform_soup]", "device=cpu"])
    assert catalog.select(found, asked) == [soup]


def config_path():
    return PROJECT / "configs" / "digits_demo.yaml"


def test_a_timm_network_runs_and_gives_the_logits_of_timm(workspace, config, tmp_path):
    import timm
    from PIL import Image

    from utils.datasets import create_optimized_transforms
    from utils.predictions import Store

    torch.manual_seed(0)
    network = timm.create_model("test_resnet", num_classes=4).eval()
    torch.save({"state_dict": network.state_dict()}, tmp_path / "leaf.pth")
    discovery.discover(config, workspace, verify=True, add=[f"leaf=timm:test_resnet@{tmp_path / 'leaf.pth'}"])
    found = catalog.read(workspace)
    assert found.members["leaf"].usable
    store = Store(config, workspace, found)
    store.ensure([found.members["leaf"]], ("test",))
    rows = store.rows(found.members["leaf"], "test")
    transform = create_optimized_transforms(32, is_training=False)
    images = []
    for sample_id in rows.sample_ids:
        with Image.open(workspace.split_dir / "test" / str(sample_id)) as image:
            images.append(transform(image.convert("RGB")))
    with torch.inference_mode():
        np.testing.assert_allclose(rows.logits, network(torch.stack(images)).numpy(), atol=1e-4)


def test_a_timm_network_is_declared_once_and_kept(workspace, config, tmp_path):
    import timm

    file = tmp_path / "leaf.pth"
    torch.save(timm.create_model("test_resnet", num_classes=4).state_dict(), file)
    declaration = f"leaf=timm:test_resnet@{file}"
    discovery.discover(config, workspace, add=[declaration])
    first = catalog.read(workspace).members["leaf"]
    assert (first.source, first.architecture, first.img_size) == ("trained", "timm:test_resnet", 32)
    assert first.checkpoints[0]["path"] == str(file)
    assert first.classes == ("0", "1", "2", "3")
    other_size = load(config_path(), overrides=["dataset.img_size=64", "device=cpu"])
    discovery.discover(other_size, workspace)
    assert catalog.read(workspace).members["leaf"].digest == first.digest
    asked = load(config_path(), overrides=["backbones.include=[leaf]"])
    assert [member.name for member in catalog.select(catalog.read(workspace), asked)] == ["leaf"]
    file.rename(tmp_path / "gone.pth")
    result = discovery.discover(config, workspace)
    assert "leaf.pth: the checkpoint is gone. Put it back" in result.text
    (tmp_path / "gone.pth").rename(file)
    discovery.discover(config, workspace)
    assert catalog.read(workspace).members["leaf"].usable


@pytest.mark.parametrize(
    ("declaration", "words"),
    [
        ("leaf=test_resnet@{file}", "expected NAME=timm:MODEL@FILE"),
        ("leaf=timm:test_resnet", "expected NAME=timm:MODEL@FILE"),
        ("leaf=timm:tset_resnet@{file}", r"no model 'tset_resnet'; did you mean 'test_resnet'\?"),
        ("leaf=timm:test_resnet@{file}x", r"no such file; did you mean 'leaf.pth'\?"),
        ("CustomConvNeXt=timm:test_resnet@{file}", "a checkpoint of CustomConvNeXt is in"),
    ],
)
def test_declarations_that_cannot_be_followed_change_nothing(workspace, config, tmp_path, declaration, words):
    file = tmp_path / "leaf.pth"
    torch.save({}, file)
    with pytest.raises(UserError, match=words):
        discovery.discover(config, workspace, add=[declaration.format(file=file)])
    assert not workspace.catalog.exists()
