"""Training on photographs as they are stored, or upright as their EXIF orientation says; checkpoints record which."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import PROJECT, run_python, write_digits
from PIL import Image
from pretrained_files import frozen_options, write_weights
from stored_predictions import workspace_at

from utils.predictions import catalog

NAME = "CustomConvNeXt"
OPTIONS = ("--size", "tiny", "--folds", "2", "--epochs-head", "0", "--epochs-finetune", "1", "--backbones", NAME)
STAGES = ("--stages", "split", "kfold", "train", "test")
STORED_SIDEWAYS = Image.Transpose.ROTATE_90, 6  # how a camera stores a photograph, and the tag that turns it back


def turn(data: Path) -> None:
    """Store every second image sideways, with the orientation that turns it upright."""
    transposition, orientation = STORED_SIDEWAYS
    exif = Image.Exif()
    exif[0x0112] = orientation
    for path in sorted(data.glob("*/*.png"))[::2]:
        with Image.open(path) as image:
            image.transpose(transposition).save(path, exif=exif.tobytes())


@pytest.fixture(scope="module")
def runs(tmp_path_factory, base_main) -> Path:
    """Workspaces: upright images without a final network, the same stored sideways, both with --exif apply, and
    sideways as stored."""
    base = tmp_path_factory.mktemp("exif")
    write_digits(base / "upright", classes=(2, 4, 7), per_class=12)
    shutil.copytree(base / "upright", base / "sideways")
    turn(base / "sideways")
    for name, data, rule in (
        ("a", "upright", ("--exif", "apply", "--stages", "split", "kfold")),
        ("b", "sideways", ("--exif", "apply")),
        ("c", "sideways", ()),
    ):
        done = base_main(*OPTIONS, *STAGES, *rule, "--data", str(base / data), workspace=base / name)
        assert done.returncode == 0, done.stderr
    return base


def extra_of(workspace: Path, role: str) -> dict:
    return torch.load(workspace / "checkpoints" / f"{NAME}_{role}.pth", weights_only=True)["extra"]


def oof_of(workspace: Path) -> np.ndarray:
    with np.load(workspace / "kfold_results" / f"{NAME}_oof_predictions.npz") as arrays:
        return arrays["logits"]


def test_turned_photographs_train_what_upright_ones_do(runs):
    assert np.array_equal(oof_of(runs / "a"), oof_of(runs / "b"))
    assert not np.array_equal(oof_of(runs / "b"), oof_of(runs / "c"))


def test_checkpoints_record_the_rule_that_is_not_the_default(runs):
    for role in ("final", "fold0", "finetune_best"):
        record = extra_of(runs / "b", role)["preprocessing"]
        assert (record["exif"], record["input_size"], record["resized"]) == ("apply", 32, 36)
        assert "preprocessing" not in extra_of(runs / "c", role)


def test_the_orchestrator_sees_the_images_as_the_training_did(runs, orchestrator, tmp_path):
    for name, rule in (("b", "applied"), ("c", "ignored")):
        place = workspace_at(shutil.copytree(runs / name, tmp_path / name))
        done = orchestrator("discover", "--verify", workspace=place.base)
        assert done.returncode == 0, done.stderr
        assert "18 of 36 images have an EXIF orientation that turns them, first train/2/" in done.stdout
        assert f"{rule} by all members" in done.stdout
        member = catalog.read(place).members[NAME]
        assert (member.preprocessing or {"exif": "ignore"})["exif"] == {"applied": "apply", "ignored": "ignore"}[rule]
        assert member.oof["checked"]  # the fold networks answer as the training wrote it
        assert "accuracy" not in [problem.code for problem in catalog.read(place).problems]


def test_one_more_network_sees_the_images_as_the_others(runs, tmp_path, base_main):
    place = shutil.copytree(runs / "b", tmp_path / "w")
    options = ("--stages", "snapshots", "--snapshots", "1", "--epochs-per-cycle", "1", "--size", "tiny")
    done = base_main(*options, "--backbones", NAME, workspace=place)
    assert done.returncode == 0, done.stderr
    snapshots = sorted((place / "checkpoints").glob(f"{NAME}_snapshot*.pth"))
    assert extra_of(place, snapshots[-1].stem.rpartition("_")[2])["preprocessing"]["exif"] == "apply"


def test_a_network_of_timm_sees_them_as_it_is_told_and_by_its_name_alone_again(runs, tmp_path, base_main):
    weights = write_weights(tmp_path / "weights.pth")
    logits = {}
    for name, data, last in (("a", "upright", ()), ("b", "sideways", ("train",))):
        options = frozen_options(weights, exif="apply")
        stages = ("--stages", "split", "kfold", *last, "--data", str(runs / data))
        done = base_main(*options, *stages, workspace=tmp_path / name)
        assert done.returncode == 0, done.stderr
        role = "final" if last else "fold0"
        record = torch.load(tmp_path / name / "checkpoints" / f"small_{role}.pth", weights_only=True)["extra"]
        assert record["preprocessing"]["exif"] == "apply"
        with np.load(tmp_path / name / "kfold_results" / "small_oof_predictions.npz") as arrays:
            logits[name] = arrays["logits"]
    assert np.array_equal(logits["a"], logits["b"])
    done = base_main("--backbones", "small", "--folds", "2", *stages, workspace=tmp_path / "b")
    assert done.returncode == 0, done.stderr
    assert "4 of 4 units are up to date" in done.stderr


def test_another_base_back_is_not_asked_for_upright_images(tmp_path):
    program = str(PROJECT / "BASE-BACK" / "src" / "main.py")
    done = run_python(program, "--base-back", str(tmp_path), "--exif", "apply")
    assert done.returncode == 2
    assert "--exif apply: not with --base-back" in done.stderr
    done = run_python(program, environment={"DBT_EXIF": "upright"})
    assert (done.returncode, done.stderr) == (2, "DBT_EXIF: found 'upright'; allowed: ignore, apply\n")
