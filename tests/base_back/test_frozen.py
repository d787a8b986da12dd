"""Linear heads on frozen features: what they learn from, what is saved, what is computed again."""

from __future__ import annotations

import hashlib
import json
import re
import shlex
import shutil

import numpy as np
import pytest
import torch
from conftest import write_digits
from PIL import Image
from pretrained_files import ARCHITECTURE, frozen_options, write_weights


def load(path):
    return torch.load(path, weights_only=True, map_location="cpu")


def digests(folder, pattern):
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(folder.glob(pattern))}


def oof(workspace, name="small"):
    with np.load(workspace / "kfold_results" / f"{name}_oof_predictions.npz", allow_pickle=False) as arrays:
        return dict(arrays)


@pytest.fixture(scope="module")
def frozen(tmp_path_factory, base_main):
    """A workspace with one frozen network through all stages: (workspace, weights file)."""
    folder = tmp_path_factory.mktemp("frozen")
    weights = write_weights(folder / "weights" / "small.pth")
    data = write_digits(folder / "raw", classes=(0, 1, 2), per_class=30)
    options = frozen_options(weights, data=str(data), trained_on="none")
    done = base_main(*options, workspace=folder / "w")
    assert done.returncode == 0, done.stderr
    return folder / "w", weights


def test_the_saved_network_answers_as_the_out_of_fold_heads_and_the_scores_say(frozen):
    import timm

    workspace, _ = frozen
    record = load(workspace / "checkpoints" / "small_final.pth")
    extra = record["extra"]
    assert (extra["backbone_name"], extra["img_size"], extra["mode"]) == (f"timm:{ARCHITECTURE}", 32, "frozen")
    assert extra["weights"]["trained_on"] == "none"
    assert extra["threads"] == load(workspace / "checkpoints" / "small_fold0.pth")["extra"]["threads"] >= 1
    assert extra["preprocessing"]["mean"] == [0.5, 0.5, 0.5]
    network = timm.create_model(ARCHITECTURE, num_classes=3)
    network.load_state_dict(record["model_state_dict"])
    network.eval()

    def logits(split, sample_ids, weights=None):
        transform = timm.data.create_transform(
            (3, 32, 32), interpolation="bilinear", mean=(0.5,) * 3, std=(0.5,) * 3, crop_pct=0.95
        )
        network.load_state_dict({**record["model_state_dict"], **(weights or {})})
        images = []
        for sample_id in sample_ids:
            with Image.open(workspace / "split_dataset" / split / sample_id) as image:
                images.append(transform(image.convert("RGB")))
        with torch.inference_mode():
            return network(torch.stack(images)).numpy()

    arrays = oof(workspace)
    for fold in (0, 1):
        saved = load(workspace / "checkpoints" / f"small_fold{fold}.pth")
        assert sorted(saved["model_state_dict"]) == ["fc.bias", "fc.weight"]
        rows = np.flatnonzero(arrays["fold"] == fold)
        again = logits("train", arrays["sample_ids"][rows].tolist(), saved["model_state_dict"])
        np.testing.assert_allclose(again, arrays["logits"][rows], rtol=1e-3, atol=1e-3)
    metrics = json.loads((workspace / "metrics_output" / "small_training_metrics.json").read_text())
    for split, key in (("val", "final_accuracy"), ("test", "test_accuracy")):
        paths = sorted((workspace / "split_dataset" / split).glob("*/*.png"))
        predicted = logits(split, [f"{path.parent.name}/{path.name}" for path in paths]).argmax(axis=1)
        assert metrics[key] == pytest.approx(np.mean(predicted == [int(path.parent.name) for path in paths]))
    assert metrics["selection"] == "last"  # as of networks whose epoch val rows did not choose
    status = json.loads((workspace / "deployment_models" / "small" / "export_status.json").read_text())
    assert {name for name, entry in status.items() if entry["status"] == "ok"} >= {"state_dict", "onnx", "torchscript"}


def test_fold_heads_name_the_trunk_of_the_final_network_by_digest(frozen):
    from utils.trunks import trunk_digest

    workspace, _ = frozen
    final = load(workspace / "checkpoints" / "small_final.pth")["model_state_dict"]
    for fold in (0, 1):
        saved = load(workspace / "checkpoints" / f"small_fold{fold}.pth")
        trunk = saved["extra"]["trunk"]
        assert trunk["checkpoint"] == "small_final.pth"
        assert trunk["sha256"] == trunk_digest(final, saved["model_state_dict"])
    changed = {name: tensor + 1 if name == "conv1.0.weight" else tensor for name, tensor in final.items()}
    assert trunk_digest(changed, saved["model_state_dict"]) != trunk["sha256"]
    reordered = dict(reversed(list(final.items())))
    assert trunk_digest(reordered, saved["model_state_dict"]) == trunk["sha256"]


def test_held_out_images_and_labels_of_a_fold_do_not_reach_its_head(frozen, tmp_path, base_main):
    """Images of the held-out fold are exchanged between their classes: its head stays, the other one changes."""
    workspace, weights = frozen
    copy = shutil.copytree(workspace, tmp_path / "w")
    (copy / "split_dataset" / "split_manifest.json").unlink()
    arrays = oof(workspace)
    held_out = arrays["sample_ids"][arrays["fold"] == 0].tolist()
    contents = [(copy / "split_dataset" / "train" / name).read_bytes() for name in held_out]
    for name, content in zip(held_out, contents[7:] + contents[:7], strict=True):
        (copy / "split_dataset" / "train" / name).write_bytes(content)
    done = base_main("--stages", "kfold", *frozen_options(weights, trained_on="none"), workspace=copy)
    assert done.returncode == 0, done.stderr
    assert (oof(copy)["fold"] == arrays["fold"]).all()
    heads = [[load(w / "checkpoints" / f"small_fold{fold}.pth") for w in (workspace, copy)] for fold in (0, 1)]
    for name in ("fc.weight", "fc.bias"):
        assert torch.equal(heads[0][0]["model_state_dict"][name], heads[0][1]["model_state_dict"][name])
        assert not torch.equal(heads[1][0]["model_state_dict"][name], heads[1][1]["model_state_dict"][name])
    assert heads[0][0]["extra"]["strength"] == heads[0][1]["extra"]["strength"]


def test_val_images_do_not_reach_the_final_head(frozen, tmp_path, base_main):
    workspace, weights = frozen
    copy = shutil.copytree(workspace, tmp_path / "w")
    (copy / "split_dataset" / "split_manifest.json").unlink()
    for path in sorted((copy / "split_dataset" / "val").glob("*/*.png")):
        noise = np.random.default_rng(len(path.name)).integers(0, 255, (8, 8), dtype=np.uint8)
        noise[0, 0] = int(path.stem) % 251
        Image.fromarray(noise).save(path)
    done = base_main("--stages", "train", *frozen_options(weights, trained_on="none"), workspace=copy)
    assert done.returncode == 0, done.stderr
    before, after = (load(w / "checkpoints" / "small_final.pth") for w in (workspace, copy))
    assert all(
        torch.equal(tensor, after["model_state_dict"][name]) for name, tensor in before["model_state_dict"].items()
    )
    assert before["extra"]["final_val_loss"] != after["extra"]["final_val_loss"]


def test_a_second_head_computes_no_embedding_and_equal_bytes_need_no_cache(frozen, tmp_path, base_main):
    workspace, weights = frozen
    copy = shutil.copytree(workspace, tmp_path / "w")
    options = frozen_options(weights, trained_on="none")
    packs = {path: path.stat().st_mtime_ns for path in (copy / "image_cache" / "embeddings").glob("*/*")}
    again = base_main("--stages", "kfold", "train", "test", "--force", *options, workspace=copy)
    assert again.returncode == 0, again.stderr
    assert "embed" not in again.stderr
    assert {path: path.stat().st_mtime_ns for path in (copy / "image_cache" / "embeddings").glob("*/*")} == packs
    assert digests(copy / "checkpoints", "*.pth") == digests(workspace / "checkpoints", "*.pth")
    shutil.rmtree(copy / "image_cache")
    again = base_main("--stages", "kfold", "train", "--force", "--jobs", "2", *options, workspace=copy)
    assert again.returncode == 0, again.stderr
    assert "small embed 1: embeddings of" in again.stderr  # in two parts, by two processes
    assert digests(copy / "checkpoints", "*.pth") == digests(workspace / "checkpoints", "*.pth")
    assert oof(copy)["logits"].tobytes() == oof(workspace)["logits"].tobytes()


def test_what_is_half_there_is_continued_and_a_damaged_pack_is_made_again(frozen, tmp_path, base_main):
    """As a killed run leaves it: some embeddings, one fold of two, one pack cut off and one empty."""
    workspace, weights = frozen
    copy = shutil.copytree(workspace, tmp_path / "w")
    packs = sorted((copy / "image_cache" / "embeddings").glob("*/*.npz"))
    packs[0].write_bytes(packs[0].read_bytes()[:200])
    packs[1].write_bytes(b"")
    for path in ("checkpoints/small_fold1.pth", "checkpoints/small_final.pth"):
        (copy / path).unlink()
    done = base_main(*frozen_options(weights, trained_on="none"), workspace=copy)
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("damaged") >= 2
    assert "small fold 0" not in done.stderr
    assert digests(copy / "checkpoints", "*.pth") == digests(workspace / "checkpoints", "*.pth")


def test_the_name_alone_repeats_the_network_and_other_options_replace_it(frozen, tmp_path, base_main):
    workspace, _ = frozen
    copy = shutil.copytree(workspace, tmp_path / "w")
    stages = ("--stages", "kfold", "train", "test")
    done = base_main(*stages, "--backbones", "small", "--folds", "2", workspace=copy)
    assert done.returncode == 0, done.stderr
    assert "5 of 5 units are up to date" in done.stderr
    done = base_main("--stages", "train", "--backbones", "small", "--views", "2", workspace=copy)
    assert done.returncode == 0, done.stderr
    assert digests(copy / "checkpoints", "small_final.pth") != digests(workspace / "checkpoints", "small_final.pth")
    other = write_weights(tmp_path / "other.pth", seed=1)
    done = base_main(*stages[:3], "--backbones", "small", "--folds", "2", "--weights", str(other), workspace=copy)
    assert done.returncode == 0, done.stderr
    first, second = (load(w / "checkpoints" / "small_fold0.pth")["extra"]["trunk"]["sha256"] for w in (workspace, copy))
    assert first != second
    # What was stated is a statement on the weights of before.
    assert load(workspace / "checkpoints" / "small_final.pth")["extra"]["weights"]["trained_on"] == "none"
    assert load(copy / "checkpoints" / "small_final.pth")["extra"]["weights"]["trained_on"] == "unknown"


def test_discover_lists_the_member_with_its_preprocessing_and_a_remedy_that_works(
    frozen, tmp_path, base_main, orchestrator
):
    workspace, _ = frozen
    copy = shutil.copytree(workspace, tmp_path / "w")
    (copy / "kfold_results" / "small_oof_predictions.npz").unlink()
    done = orchestrator("discover", "--json", workspace=copy)
    assert done.returncode == 0, done.stderr
    listed = json.loads(done.stdout)
    member = listed["members"]["small"]
    assert (member["architecture"], member["img_size"]) == (f"timm:{ARCHITECTURE}", 32)
    assert member["preprocessing"]["mean"] == [0.5, 0.5, 0.5]
    assert (member["trained_on"], member["pretrained_on"], member["selection"]) == ("train", "none", "last")
    problems = {problem["code"]: problem for problem in listed["problems"] if problem["member"] == "small"}
    assert "architecture" not in problems
    command = re.search(r"main.py (--stages kfold .*?)\)", problems["no_oof"]["remedy"])[1]
    options = shlex.split(command)
    done = base_main(*options[:-2], "--folds", "2", workspace=copy)
    assert done.returncode == 0, done.stderr
    assert oof(copy)["logits"].tobytes() == oof(workspace)["logits"].tobytes()


def test_discover_verifies_fold_heads_on_the_trunk_of_the_final_network(frozen, tmp_path, orchestrator):
    workspace, _ = frozen
    copy = shutil.copytree(workspace, tmp_path / "w")
    done = orchestrator("discover", "--verify", "--json", workspace=copy)
    assert done.returncode == 0, done.stderr
    listed = json.loads(done.stdout)
    assert listed["members"]["small"]["oof"]["checked"]
    problems = {problem["code"] for problem in listed["problems"] if problem["member"] == "small"}
    assert not problems & {"fold_unreadable", "oof_fold_disagrees", "oof_in_sample"}
