"""What the base pipeline really trains and writes: honesty of the out-of-fold rows, determinism, resuming, records."""

from __future__ import annotations

import hashlib
import json
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
from conftest import PROJECT, ZOO_BACKBONES, ZOO_FOLDS, ZOO_OPTIONS
from PIL import Image

QUICK = ("--size", "tiny", "--folds", "2", "--epochs-head", "0", "--epochs-finetune", "1")


def load(path):
    return torch.load(path, weights_only=True, map_location="cpu")


def digests(folder, pattern="*"):
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(folder.glob(pattern))}


def oof(workspace, backbone):
    with np.load(workspace / "kfold_results" / f"{backbone}_oof_predictions.npz", allow_pickle=False) as arrays:
        return dict(arrays)


@pytest.mark.parametrize("backbone", ZOO_BACKBONES)
def test_rerunning_the_fold_networks_on_their_held_out_images_gives_the_oof_logits(trained, backbone):
    import models
    from utils.datasets import create_optimized_transforms

    arrays = oof(trained, backbone)
    transform = create_optimized_transforms(32, is_training=False)
    for fold in range(ZOO_FOLDS):
        record = load(trained / "checkpoints" / f"{backbone}_fold{fold}.pth")
        assert record["extra"]["fold"] == fold
        network = models.create_custom_backbone(backbone, 4, size="tiny", img_size=32)
        network.load_state_dict(record["model_state_dict"])
        rows = np.flatnonzero(arrays["fold"] == fold)
        images = []
        for sample_id in arrays["sample_ids"][rows]:
            with Image.open(trained / "split_dataset" / "train" / str(sample_id)) as image:
                images.append(transform(image.convert("RGB")))
        with torch.inference_mode():
            found = network.eval()(torch.stack(images)).numpy()
        np.testing.assert_allclose(found, arrays["logits"][rows], atol=1e-4)


def test_every_train_image_has_one_fold_and_no_other_image_has_any(trained):
    place = {
        split: {f"{p.parent.name}/{p.name}" for p in (trained / "split_dataset" / split).glob("*/*.png")}
        for split in ("train", "val", "test")
    }
    for backbone in ZOO_BACKBONES:
        arrays = oof(trained, backbone)
        assert sorted(arrays["sample_ids"].tolist()) == sorted(place["train"])
        assert not set(arrays["sample_ids"].tolist()) & (place["val"] | place["test"])
        assert set(arrays["fold"].tolist()) == set(range(ZOO_FOLDS))
        assert [str(arrays["classes"][label]) for label in arrays["labels"]] == [
            str(sample_id).split("/")[0] for sample_id in arrays["sample_ids"]
        ]
        assert np.isfinite(arrays["logits"]).all()


def test_a_fold_network_is_the_same_whatever_its_held_out_images_show(trained, tmp_path, base_main):
    """The strongest form of honesty: replace the held-out images by noise and nothing of the network changes."""
    copy = shutil.copytree(trained, tmp_path / "w")
    arrays = oof(trained, "CustomConvNeXt")
    rng = np.random.default_rng(0)
    for sample_id in arrays["sample_ids"][arrays["fold"] == 0]:
        noise = rng.integers(0, 255, (8, 8), dtype=np.uint8)
        Image.fromarray(noise).save(copy / "split_dataset" / "train" / str(sample_id))
    done = base_main("--stages", "kfold", "--backbones", "CustomConvNeXt", *ZOO_OPTIONS, workspace=copy)
    assert done.returncode == 0, done.stderr
    before, after = (load(w / "checkpoints" / "CustomConvNeXt_fold0.pth")["model_state_dict"] for w in (trained, copy))
    assert all(torch.equal(before[name], after[name]) for name in before)
    before, after = (load(w / "checkpoints" / "CustomConvNeXt_fold1.pth")["model_state_dict"] for w in (trained, copy))
    assert not all(torch.equal(before[name], after[name]) for name in before)  # this one was trained on the noise


def test_checkpoints_explain_themselves_and_open_without_an_allow_list(trained):
    files = sorted((trained / "checkpoints").glob("*.pth"))
    roles = ["final", "finetune_best", "fold0", "fold1", "head_best", "snapshot1", "snapshot2", "snapshot3"]
    assert [path.name for path in files] == sorted(f"{b}_{role}.pth" for b in ZOO_BACKBONES for role in roles)
    for path in files:
        extra = load(path)["extra"]
        assert (extra["classes"], extra["model_size"], extra["img_size"]) == (["0", "1", "2", "3"], "tiny", 32)
        assert (extra["augment"], extra["group_regex"]) == ("no_flip", None)
        chosen_on_val = path.stem.endswith("_best")
        assert extra.get("selection") == (None if chosen_on_val else "last"), path.name
        if "_fold" in path.name:
            assert (extra["stage"], extra["epoch"]) == ("finetune", 3)
    head = load(trained / "checkpoints" / f"{ZOO_BACKBONES[0]}_head_best.pth")
    assert {"optimizer_state_dict", "scheduler_state_dict"} <= head.keys()
    assert head["extra"]["stage"] == "head"


def test_final_holds_the_last_epoch_and_its_accuracy_is_that_of_the_file(trained):
    import models
    from training import get_loss_function_for_backbone, validate_epoch_optimized
    from utils.datasets import (
        WindowsCompatibleImageFolder,
        create_optimized_dataloader,
        create_optimized_transforms,
    )

    val = WindowsCompatibleImageFolder(trained / "split_dataset" / "val", create_optimized_transforms(32, False))
    loader = create_optimized_dataloader(val, 16, shuffle=False, num_workers=0)
    for backbone in ZOO_BACKBONES:
        record = load(trained / "checkpoints" / f"{backbone}_final.pth")
        metrics = json.loads((trained / "metrics_output" / f"{backbone}_training_metrics.json").read_text())
        network = models.create_custom_backbone(backbone, 4, size="tiny", img_size=32)
        network.load_state_dict(record["model_state_dict"])
        criterion = get_loss_function_for_backbone(backbone, 4)
        result = validate_epoch_optimized(network, loader, criterion, torch.device("cpu"))
        assert result[1] == pytest.approx(metrics["final_accuracy"], abs=1e-9)
        assert result[4] == pytest.approx(metrics["final_f1_score"], abs=1e-9)
        assert metrics["final_accuracy"] == record["extra"]["final_accuracy"] <= metrics["best_accuracy"]
        last = load(trained / "checkpoints" / f"{backbone}_snapshot3.pth")  # of the last epoch, too
        weights = record["model_state_dict"]
        assert all(torch.equal(tensor, last["model_state_dict"][name]) for name, tensor in weights.items())
        assert (metrics["epochs_head"], metrics["epochs_finetune"]) == (1, 4)
        assert result[7].dtype == np.float32
        assert result[7].shape == (len(val), 4)


def test_records_have_the_keys_that_readers_rely_on(trained):
    for backbone in ZOO_BACKBONES:
        metrics = json.loads((trained / "metrics_output" / f"{backbone}_training_metrics.json").read_text())
        assert {
            *("best_accuracy", "final_accuracy", "final_precision", "final_recall", "final_f1_score"),
            *("final_val_loss", "backbone_name", "epochs_head", "epochs_finetune", "test_accuracy", "test_f1"),
            *("visualization_paths", "visualization_summary"),
        } <= metrics.keys()
        folds = json.loads((trained / "kfold_results" / f"{backbone}_kfold_results.json").read_text())
        assert folds["k_folds"] == ZOO_FOLDS == len(folds["fold_accuracies"])
        arrays = oof(trained, backbone)
        hits = arrays["logits"].argmax(axis=1) == arrays["labels"]
        by_fold = [hits[arrays["fold"] == fold].mean() for fold in range(ZOO_FOLDS)]
        assert folds["fold_accuracies"] == pytest.approx(by_fold)
        assert folds["std_accuracy"] == pytest.approx(np.std(by_fold))
        assert (trained / "deployment_models" / backbone / "export_status.json").is_file()
    summary = json.loads((trained / "metrics_output" / "pipeline_summary.json").read_text())
    assert set(summary["training_results"]) == set(ZOO_BACKBONES)
    assert all(entry["status"] == "success" for entry in summary["training_results"].values())
    state = json.loads((trained / "checkpoints" / ".recovery_state.json").read_text())
    assert state["completed_backbones"] == sorted(ZOO_BACKBONES)


def test_same_bytes_whatever_the_order_and_the_number_of_processes(base_main, synthetic, tmp_path):
    found = []
    for name, backbones, jobs in (("one", ZOO_BACKBONES[:2], "1"), ("two", ZOO_BACKBONES[1::-1], "2")):
        workspace = tmp_path / name
        shutil.copytree(synthetic / "split_dataset", workspace / "split_dataset")
        stages = ("--stages", "kfold", "train", "--jobs", jobs)
        assert base_main("--backbones", *backbones, *stages, *QUICK, workspace=workspace).returncode == 0
        found.append(digests(workspace / "checkpoints", "*.pth") | digests(workspace / "kfold_results"))
    assert found[0] == found[1]
    assert len(found[0]) == 14


def test_finished_work_is_kept_and_a_changed_setting_redoes_what_depends_on_it(base_main, trained, tmp_path):
    workspace = shutil.copytree(trained, tmp_path / "w")
    backbone = ZOO_BACKBONES[0]
    before = {path: path.stat().st_mtime_ns for path in (workspace / "checkpoints").glob("*.pth")}
    done = base_main("--backbones", *ZOO_BACKBONES, *ZOO_OPTIONS, "--json", workspace=workspace)
    report = json.loads(done.stdout)
    assert done.returncode == 0
    assert report["done"] == []
    assert len(report["skipped"]) == 21
    assert before == {path: path.stat().st_mtime_ns for path in (workspace / "checkpoints").glob("*.pth")}
    (workspace / "checkpoints" / f"{backbone}_fold1.pth").unlink()
    done = base_main("--backbones", backbone, *ZOO_OPTIONS, "--json", workspace=workspace)
    assert json.loads(done.stdout)["done"] == [f"{backbone} fold 1", f"{backbone} oof"]
    assert digests(workspace / "kfold_results") == digests(trained / "kfold_results")
    done = base_main("--backbones", backbone, "--stages", "train", *QUICK, "--json", workspace=workspace)
    assert f"{backbone} train" in json.loads(done.stdout)["done"]


def test_a_failed_backbone_is_named_and_the_others_go_on(base_main, synthetic, tmp_path):
    shutil.copytree(synthetic / "split_dataset", tmp_path / "split_dataset")
    (tmp_path / "checkpoints" / "CustomConvNeXt_final.pth").mkdir(parents=True)  # cannot be replaced by a file
    done = base_main("--backbones", *ZOO_BACKBONES[:2], "--stages", "train", "test", *QUICK, workspace=tmp_path)
    assert done.returncode == 4
    assert "failed: CustomConvNeXt train" in done.stderr
    assert "failed: CustomConvNeXt test: not run" in done.stderr
    assert (tmp_path / "checkpoints" / "CustomResNetMish_final.pth").is_file()


def test_a_killed_run_leaves_whole_files_and_the_next_one_ends_the_same(base_main, trained, tmp_path):
    workspace = tmp_path / "killed"
    shutil.copytree(trained / "split_dataset", workspace / "split_dataset")
    script = str(PROJECT / "BASE-BACK" / "src" / "main.py")
    options = ("--backbones", ZOO_BACKBONES[0], "--stages", "kfold", *ZOO_OPTIONS)
    process = subprocess.Popen(
        [sys.executable, script, "--workspace", str(workspace), *options],
        env={"DBT_AUGMENT": "no_flip", "DBT_BATCH_SIZE": "32", "PATH": "/usr/bin:/bin"},
        stdout=subprocess.DEVNULL,  # given, so that `warm` forks it
        stderr=subprocess.DEVNULL,
    )
    deadline = time.monotonic() + 120
    while not list((workspace / "checkpoints").glob("*.pth")) and time.monotonic() < deadline:
        time.sleep(0.05)
    process.send_signal(signal.SIGKILL)
    process.wait()
    time.sleep(2.5)  # the workers notice that their parent is gone
    for path in (workspace / "checkpoints").glob("*.pth"):
        assert load(path)["extra"]["classes"] == ["0", "1", "2", "3"]
    assert base_main(*options, workspace=workspace).returncode == 0
    whole = digests(trained / "checkpoints", f"{ZOO_BACKBONES[0]}_fold*.pth")
    assert digests(workspace / "checkpoints", "*.pth") == whole
    assert not list(workspace.rglob(".*partial*"))


def test_kept_weights_do_not_train_on():
    """The state dictionary shares its storage with the network, so keeping it keeps the last epoch's weights."""
    from training.fitting import copy_weights

    network = torch.nn.Linear(2, 2)
    kept = copy_weights(network)
    before = {name: tensor.clone() for name, tensor in kept.items()}
    with torch.no_grad():
        network.weight.add_(1)
    assert all(torch.equal(kept[name], before[name]) for name in before)
