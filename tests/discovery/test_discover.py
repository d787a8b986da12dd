"""Discovery of files: which of them are members, and what is wrong with them, said in words."""

from __future__ import annotations

import json
import os
import re
import shutil

import numpy as np
import pytest
import torch
from conftest import PROJECT
from one_member import NAME, change, change_oof, codes, config, config_path, workspace

from utils.core.config_file import load_config
from utils.core.errors import UserError
from utils.discovery import discover
from utils.predictions import catalog, extraction, member_selection, verification
from utils.predictions.store import Store

__all__ = ["config", "workspace"]


def test_half_precision_probabilities_are_taken_and_said(workspace, config):
    def halve(arrays):
        raised = np.exp(arrays.pop("logits").astype(np.float64))
        arrays["probabilities"] = (raised / raised.sum(axis=1, keepdims=True)).astype(np.float16)

    changed = change_oof(workspace, halve)
    result = discover.discover(config, workspace, verify=True)
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
    result = discover.discover(config, workspace)
    assert "out-of-fold predictions for 221 of 224 train images; 3 rows are missing" in result.text
    assert f"2 out-of-fold rows have an equal image in another fold, first {min(one, other)}" in result.text


def test_metrics_of_another_training_do_not_count(workspace, config):
    path = workspace.training_metrics(NAME)
    own = json.loads(path.read_text())["final_accuracy"]
    path.write_text(json.dumps(json.loads(path.read_text()) | {"final_accuracy": 0.123}))
    result = discover.discover(config, workspace)
    assert f"has the accuracy 0.1230, {NAME}_final.pth itself {own:.4f}" in result.text
    assert catalog.read(workspace).members[NAME].recorded_accuracy == own
    change(workspace.checkpoint(NAME, "final"), lambda record: record["extra"].pop("final_accuracy"))
    os.utime(path, (1e9, 1e9))
    result = discover.discover(config, workspace)
    assert re.search(rf"is \d+ minutes older than {NAME}_final.pth", result.text)


def test_another_image_size_than_the_configurations_is_said(workspace):
    config = load_config(PROJECT / "configs" / "votes.yaml", overrides=["dataset.img_size=64", "device=cpu"])
    assert "made for 32 px; dataset.img_size is 64" in discover.discover(config, workspace).text


def test_a_catalog_older_than_its_files_is_said(workspace, config, caplog):
    import logging

    discover.discover(config, workspace)
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
    result = discover.discover(config, workspace)
    assert f"the same image in two splits: train/2/{train[0].name} and val/2/zz_0.png" in result.text
    assert f"the same image in two splits: train/2/{train[0].name} and test/3/zz.png" in result.text
    assert "3 more images are in two splits" in result.text


def test_equal_images_of_one_split_are_nobody_s_problem(workspace, config):
    first = sorted((workspace.split_dir / "test" / "2").iterdir())[0]
    shutil.copy(first, first.with_name("zz.png"))
    discover.discover(config, workspace)
    assert catalog.read(workspace).problems == ()


def test_splits_of_other_classes_are_an_error(workspace, config):
    (workspace.split_dir / "val" / "3").rename(workspace.split_dir / "val" / "4")
    result = discover.discover(config, workspace)
    assert result.failures == ["split: val has the classes 0, 1, 2, 4, train has 0, 1, 2, 3"]


def test_the_furthest_stage_that_is_there_is_the_member(workspace, config):
    stages = ["final", "finetune_best", "head_best"]
    while stages:
        discover.discover(config, workspace)
        member = catalog.read(workspace).members[NAME]
        assert [
            entry["stage"] for entry in member.checkpoints if not entry["stage"].startswith(("fold", "snap"))
        ] == stages
        assert member.checkpoints[0]["path"] == f"checkpoints/{NAME}_{stages[0]}.pth"
        workspace.checkpoint(NAME, stages.pop(0)).unlink()
    discover.discover(config, workspace)  # folds and snapshots alone are no member
    assert NAME not in catalog.read(workspace).members


def test_the_imbalance_ratio_is_stated_with_the_options_to_type(workspace, config):
    assert "imbalance ratio" not in discover.discover(config, workspace).text
    for path in sorted((workspace.split_dir / "train" / "2").iterdir())[10:]:
        path.unlink()
    result = discover.discover(config, workspace)
    largest = len(list((workspace.split_dir / "train" / "0").iterdir()))
    assert f"0 has {largest} images, 2 has 10 images, imbalance ratio {largest / 10:.1f}" in result.text
    assert "python BASE-BACK/src/main.py --class-weights balanced, or --sampling balanced" in result.text
    assert result.failures == []


def test_val_chose_an_epoch_unless_the_network_and_its_fold_networks_record_the_last_one(workspace, config):
    def selection():
        discover.discover(config, workspace)
        return catalog.read(workspace).members[NAME].selection

    assert selection() == "last"
    record = json.loads(workspace.catalog.read_text())
    del record["members"][NAME]["selection"]  # the catalog of an earlier version
    workspace.catalog.write_text(json.dumps(record))
    assert catalog.read(workspace).members[NAME].selection == "val"
    change(workspace.checkpoint(NAME, "fold1"), lambda record: record["extra"].pop("selection"))
    assert selection() == "val"
    change(workspace.checkpoint(NAME, "fold1"), lambda record: record["extra"].update(selection="last"))
    assert selection() == "last"
    change(workspace.checkpoint(NAME, "final"), lambda record: record["extra"].update(selection="their best"))
    assert selection() == "val"
    workspace.checkpoint(NAME, "final").unlink()  # finetune_best is the best epoch on val
    assert selection() == "val"


def test_derived_files_are_members_only_by_name(workspace, config):
    shutil.copy(workspace.checkpoint(NAME, "final"), workspace.checkpoint(NAME, "uniform_soup"))
    shutil.copy(workspace.checkpoint(NAME, "final"), workspace.checkpoint(NAME, "distilled"))
    change(workspace.checkpoint(NAME, "distilled"), lambda record: record["extra"].update(parents=["A", "B"]))
    result = discover.discover(config, workspace)
    assert "derived, used only where backbones.include names them: CustomConvNeXt_distilled" in result.text
    found = catalog.load(workspace)
    soup, student = found.members[f"{NAME}_uniform_soup"], found.members[f"{NAME}_distilled"]
    assert (soup.source, soup.parents, soup.oof) == ("derived", (NAME,), None)
    assert student.parents == ("A", "B")
    assert [member.name for member in member_selection.select(found, config)] == [NAME]
    asked = load_config(config_path(), overrides=[f"backbones.include=[{NAME}_uniform_soup]", "device=cpu"])
    assert member_selection.select(found, asked) == [soup]


def test_a_timm_network_runs_and_gives_the_logits_of_timm(workspace, config, tmp_path):
    import timm
    from PIL import Image
    from timm.data import create_transform, resolve_data_config

    torch.manual_seed(0)
    network = timm.create_model("test_resnet", num_classes=4).eval()
    torch.save({"state_dict": network.state_dict()}, tmp_path / "leaf.pth")
    discover.discover(config, workspace, verify=True, add=[f"leaf=timm:test_resnet@{tmp_path / 'leaf.pth'}"])
    found = catalog.read(workspace)
    assert found.members["leaf"].usable
    assert found.members["leaf"].preprocessing["source"] == "timm"
    store = Store(config, workspace, found)
    extraction.ensure(store, [found.members["leaf"]], ("test",))
    rows = store.rows(found.members["leaf"], "test")
    transform = create_transform(**resolve_data_config({}, model=network))
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
    discover.discover(config, workspace, add=[declaration])
    first = catalog.read(workspace).members["leaf"]
    assert (first.source, first.architecture, first.img_size) == ("trained", "timm:test_resnet", 160)
    assert first.checkpoints[0]["path"] == str(file)
    assert first.classes == ("0", "1", "2", "3")
    other_size = load_config(config_path(), overrides=["dataset.img_size=64", "device=cpu"])
    discover.discover(other_size, workspace)
    assert catalog.read(workspace).members["leaf"].digest == first.digest
    asked = load_config(config_path(), overrides=["backbones.include=[leaf]"])
    assert [member.name for member in member_selection.select(catalog.read(workspace), asked)] == ["leaf"]
    file.rename(tmp_path / "gone.pth")
    result = discover.discover(config, workspace)
    assert "leaf.pth: the checkpoint is gone. Put it back" in result.text
    assert "Remove it: python ensemble_orchestrator.py discover --remove leaf" in result.text
    assert [failure.partition(":")[0] for failure in result.failures] == ["leaf"]
    assert [line.split()[0] for line in result.text.splitlines() if line.endswith("cannot be used")] == ["leaf"]
    (tmp_path / "gone.pth").rename(file)
    discover.discover(config, workspace)
    assert catalog.read(workspace).members["leaf"].usable
    discover.discover(other_size, workspace, add=[declaration], preprocess=["input_size=64"])
    discover.discover(config, workspace)
    assert catalog.read(workspace).members["leaf"].img_size == 64  # as declared, whatever a later configuration says


def test_folds_of_a_declared_network_are_listed_with_it(workspace, config):
    shutil.copy(workspace.checkpoint(NAME, "fold0"), workspace.checkpoint("leaf", "fold0"))
    declare(workspace, config, "leaf")
    for _ in range(2):
        stages = [entry["stage"] for entry in catalog.read(workspace).members["leaf"].checkpoints]
        assert stages == ["final", "fold0"]
        discover.discover(config, workspace)


def test_derived_members_are_run_where_the_configuration_names_them(workspace, config, monkeypatch):
    ran = []
    monkeypatch.setattr(verification, "verify", lambda inspector, member, *, force: ran.append(member.name))
    discover.discover(config, workspace, verify=True)
    assert ran == [NAME]
    included = load_config(config_path(), overrides=[f"backbones.include=[{NAME}_snapshot1]", "device=cpu"])
    discover.discover(included, workspace, verify=True)
    assert ran[1:] == [NAME, f"{NAME}_snapshot1"]


def test_without_any_member_the_reasons_are_told(workspace, config):
    for path in workspace.checkpoints.glob("*.pth"):
        path.unlink()
    workspace.checkpoint(NAME, "final").touch()
    with pytest.raises(UserError, match=rf"no trained model .*{NAME}_final\.pth: empty; expected a checkpoint"):
        discover.discover(config, workspace)


@pytest.mark.parametrize(
    ("declaration", "words"),
    [
        ("leaf=test_resnet@{file}", "expected NAME=timm:ARCH@FILE"),
        ("leaf=tim:test_resnet@{file}", r"no such source: 'tim'; did you mean 'timm'\?"),
        ("leaf=timm:test_resnet", "a classifier for 1000 classes; the workspace has 4"),
        ("leaf=timm:tset_resnet@{file}", r"no model 'tset_resnet'; did you mean 'test_resnet'\?"),
        ("leaf=timm:test_resnet@{file}x", r"no such file; did you mean 'leaf.pth'\?"),
        ("CustomConvNeXt=timm:test_resnet@{file}", "a checkpoint of CustomConvNeXt is in"),
    ],
)
def test_declarations_that_cannot_be_followed_change_nothing(workspace, config, tmp_path, declaration, words):
    file = tmp_path / "leaf.pth"
    torch.save({}, file)
    with pytest.raises(UserError, match=words):
        discover.discover(config, workspace, add=[declaration.format(file=file)])
    assert not workspace.catalog.exists()


def declare(workspace, config, *names):
    import timm

    for name in names:
        file = workspace.base / f"{name}.pth"
        torch.save(timm.create_model("test_resnet", num_classes=4).state_dict(), file)
    add = [f"{name}=timm:test_resnet@{workspace.base / name}.pth" for name in names]
    return discover.discover(config, workspace, add=add)


def names_of_trained(workspace):
    return {name for name, member in catalog.read(workspace).members.items() if member.source == "trained"}


def test_a_declared_network_is_taken_back_by_name_and_its_file_stays(workspace, config):
    import timm

    declare(workspace, config, "leaf", "tree")
    discover.discover(config, workspace, remove=["leaf"])
    for _ in range(2):
        assert names_of_trained(workspace) == {NAME, "tree"}
        discover.discover(config, workspace)
    assert (workspace.base / "leaf.pth").is_file()
    declare(workspace, config, "leaf")
    torch.save(timm.create_model("test_vit", num_classes=4).state_dict(), workspace.base / "leaf.pth")
    again = [f"leaf=timm:test_vit@{workspace.base / 'leaf.pth'}"]
    discover.discover(config, workspace, add=again, remove=["leaf", "tree"])
    assert names_of_trained(workspace) == {NAME, "leaf"}
    assert catalog.read(workspace).members["leaf"].architecture == "timm:test_vit"


@pytest.mark.parametrize(
    ("name", "words"),
    [
        (
            "laef",
            r"--remove laef: no network that was declared .*, nor imported; did you mean 'leaf'\? These were: leaf",
        ),
        (NAME, rf"--remove {NAME}: .*these were: leaf\. What is in .*checkpoints is left out with backbones\.exclude"),
    ],
)
def test_only_what_was_declared_is_taken_back(workspace, config, name, words):
    declare(workspace, config, "leaf")
    before = workspace.catalog.read_bytes()
    with pytest.raises(UserError, match=words):
        discover.discover(config, workspace, remove=["leaf", name])
    assert workspace.catalog.read_bytes() == before


def test_the_last_member_is_taken_back_for_good(workspace, config):
    declare(workspace, config, "leaf")
    for path in workspace.checkpoints.glob(f"{NAME}*"):
        path.unlink()
    discover.discover(config, workspace)
    assert names_of_trained(workspace) == {"leaf"}
    for options in ({"remove": ["leaf"]}, {}):
        with pytest.raises(UserError, match="no trained model"):
            discover.discover(config, workspace, **options)
        assert not workspace.catalog.exists()
