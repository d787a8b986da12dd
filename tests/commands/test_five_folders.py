"""From five folders of timm networks and a CSV manifest of photographs to an exported ensemble, in three commands."""

from __future__ import annotations

import csv
import json
import shutil

import numpy as np
import pytest
from timm_folders import fit_head, save_folder

from utils.discovery import preprocessing_sources

pytestmark = pytest.mark.usefixtures("few_fits")

CLASSES = ("blue", "red", "yellow")
COLOURS = ((115, 115, 135), (135, 115, 115), (128, 128, 110))
LABEL_NAMES = ["yellow", "blue", "red"]
ARCHITECTURES = ("test_convnext", "test_efficientnet", "test_resnet", "test_vit", "test_vit3")
PHOTOGRAPHS = 120
SPLITS = ("train", "train", "val", "test")
PIPELINE = (
    *("--config", "configs/votes.yaml", "--set", "backbones.include=all", "--set", "device=cpu"),
    *("--set", "exports.enable=true", "--set", "exports.formats=[onnx]"),
)


@pytest.fixture(scope="module")
def material(tmp_path_factory, base_main):
    """`photos` with a manifest, the workspace `w` of the first command, and `networks` trained on its train images."""
    from PIL import Image

    folder = tmp_path_factory.mktemp("walk")
    (folder / "photos").mkdir()
    rng = np.random.default_rng(0)
    with (folder / "photos" / "metadata.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["file_name", "label", "split"])
        for number in range(PHOTOGRAPHS):
            label = number % len(CLASSES)
            pixels = rng.normal(COLOURS[label] + rng.normal(0, 12, 3), 40, (40, 48, 3)).clip(0, 255)
            Image.fromarray(pixels.astype(np.uint8)).save(folder / "photos" / f"{number}.png")
            writer.writerow([f"{number}.png", CLASSES[label], SPLITS[number // len(CLASSES) % len(SPLITS)]])
    done = base_main("--stages", "split", "--data", str(folder / "photos" / "metadata.csv"), workspace=folder / "w")
    assert done.returncode == 0, done.stderr
    files = sorted((folder / "w" / "split_dataset" / "train").glob("*/*.png"))
    labels = [LABEL_NAMES.index(file.parent.name) for file in files]
    for seed, architecture in enumerate(ARCHITECTURES):
        preprocessing = preprocessing_sources.of_architecture(architecture, 32)
        save_folder(
            folder / "networks" / architecture,
            LABEL_NAMES,
            architecture=architecture,
            label_names=LABEL_NAMES,
            seed=seed,
            fit=lambda network, preprocessing=preprocessing: fit_head(network, files, labels, preprocessing, c=1000.0),
        )
    return folder


def test_three_commands_lead_to_a_recommended_ensemble_and_one_file(material, orchestrator, tmp_path):
    workspace = shutil.copytree(material / "w", tmp_path / "w")
    options = ("--add-from", str(material / "networks"), "--trained-on", "train")
    done = orchestrator("discover", *options, workspace=workspace)
    assert done.returncode == 0, done.stderr
    done = orchestrator("pipeline", *PIPELINE, workspace=workspace)
    assert done.returncode == 0, done.stderr
    ranking = json.loads((workspace / "metrics_output" / "ensembles" / "ranking.json").read_text())
    recommended = ranking["recommended"]["name"]
    assert recommended.endswith("_ensemble")
    members = json.loads((workspace / "ensembles" / "models" / recommended / "ensemble.json").read_text())["members"]
    assert members == list(ARCHITECTURES)
    (file,) = (workspace / "deployment_models").glob("*/onnx/*.onnx")
    assert file.stem == recommended
    done = orchestrator("predict", "--from-export", str(file), str(material / "photos"), "--probabilities")
    assert done.returncode == 0, done.stderr
    answers = list(csv.DictReader(done.stdout.splitlines()))
    assert len(answers) == PHOTOGRAPHS
    with (material / "photos" / "metadata.csv").open(newline="") as manifest:
        labels = {row["file_name"]: row["label"] for row in csv.DictReader(manifest)}
    right = [row["class"] == labels[row["path"].rpartition("/")[2]] for row in answers]
    assert np.mean(right) > 0.6  # a third by chance


def test_without_a_statement_the_walk_ends_in_a_refusal_that_names_it(material, orchestrator, tmp_path):
    workspace = shutil.copytree(material / "w", tmp_path / "w")
    shutil.copytree(material / "networks" / ARCHITECTURES[0], tmp_path / "networks" / ARCHITECTURES[0])
    done = orchestrator("discover", "--add-from", str(tmp_path / "networks"), workspace=workspace)
    assert done.returncode == 0, done.stderr
    done = orchestrator("pipeline", *PIPELINE, workspace=workspace)
    assert done.returncode == 3
    assert "--trained-on" in done.stderr
    assert not list((workspace / "deployment_models").glob("*/onnx/*.onnx"))
