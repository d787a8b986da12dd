"""Logits of timm's networks equal those of timm's own transform and forward pass, in the store and in `predict`."""

from __future__ import annotations

import shutil
from dataclasses import replace

import numpy as np
import pytest
import timm
import torch
from conftest import PROJECT
from finished_workspace import at
from PIL import Image
from timm.data import create_transform, resolve_data_config
from varied_images import write_varied_images

from utils.core.config_file import load_config
from utils.discovery import discover
from utils.distillation import teachers
from utils.distillation.open_networks import OpenNetworks
from utils.inference.predict import predict
from utils.numeric.metrics import softmax
from utils.predictions import catalog, extraction
from utils.predictions.store import Store
from utils.training.image_source import ImageSource

ARCHITECTURES = {
    "clip": ("vit_xsmall_patch16_clip_224", 224),
    "convnext": ("convnext_atto", 64),
    "lite": ("tf_efficientnet_lite0", 64),
    "resnet": ("resnet18", 64),
    "vit": ("test_vit", 160),
}
"""{member: (architecture, input size)}; the convolutional networks take any, and a smaller one saves time"""
SMALLER = 64
COUNT = 18  # images of the test split: every shape and every mode several times
CLASSES = ("ant", "bee", "fly")
N_PREDICTED = 4


@pytest.fixture(scope="module")
def timm_workspace(tmp_path_factory):
    """A workspace of declared timm networks with random weights, and {member: (network, timm's own transform)}."""
    base = tmp_path_factory.mktemp("parity")
    images = write_varied_images(base / "images", COUNT + 6)
    for number, path in enumerate(images):
        split = "test" if number < COUNT else ("train", "val")[number % 2]
        folder = base / "split_dataset" / split / CLASSES[number // 2 % len(CLASSES)]
        folder.mkdir(parents=True, exist_ok=True)
        shutil.move(path, folder)
    networks = {}
    for name, (architecture, size) in ARCHITECTURES.items():
        torch.manual_seed(0)
        network = timm.create_model(architecture, num_classes=len(CLASSES)).eval()
        with torch.no_grad():  # timm's first heads give logits near zero, in which no pixel would show
            network.get_classifier().weight.mul_(0.1 / network.get_classifier().weight.std())
        torch.save(network.state_dict(), base / f"{name}.pth")
        networks[name] = (network, create_transform(**resolve_data_config({"img_size": size}, model=network)))
    config = load_config(PROJECT / "configs" / "votes.yaml", overrides=["device=cpu"])
    added = [f"{name}=timm:{architecture}@{base / f'{name}.pth'}" for name, (architecture, _) in ARCHITECTURES.items()]
    smaller = [f"{name}:input_size={size}" for name, (_, size) in ARCHITECTURES.items() if size == SMALLER]
    discover.discover(config, at(base), add=added, preprocess=smaller)
    return config, at(base), networks


def timm_logits(network, transform, paths) -> np.ndarray:
    batch = []
    for path in paths:
        with Image.open(path) as image:
            batch.append(transform(image.convert("RGB")))
    with torch.inference_mode():
        return network(torch.stack(batch)).numpy()


def test_stored_logits_and_predictions_are_those_of_timm(timm_workspace):
    config, workspace, networks = timm_workspace
    store = Store(config, workspace, catalog.read(workspace))
    members = [store.catalog.members[name] for name in networks]
    assert {member.name: member.img_size for member in members} == {n: size for n, (_, size) in ARCHITECTURES.items()}
    assert {m.name for m in members if m.preprocessing["source"] == "timm"} == {"clip", "vit"}
    extraction.ensure(store, members, ("test",))
    rules = {member.image_preprocessing.resizing().key for member in members}
    assert {path.name.partition("_")[0] for path in workspace.image_cache.glob("*.npy")} == rules
    paths = store.images("test").paths
    for member in members:
        expected = timm_logits(*networks[member.name], paths)
        rows = store.rows(member, "test")
        np.testing.assert_allclose(rows.logits, expected, atol=1e-4, rtol=0, err_msg=member.architecture)
        result = predict(
            config,
            workspace,
            paths=[str(path) for path in paths[:N_PREDICTED]],
            model_name=member.name,
            probabilities=True,
        )
        predicted = [list(row["probabilities"].values()) for row in result.document["images"]]
        np.testing.assert_allclose(predicted, softmax(expected[:N_PREDICTED]), atol=1e-4, err_msg=member.name)


def test_a_teachers_members_are_shown_the_same_images_by_their_own_preprocessing(timm_workspace):
    config, workspace, networks = timm_workspace
    store = Store(config, workspace, catalog.read(workspace))
    single = teachers.resolve(store, "vit", excluded_member="student")
    images = store.images("val")
    student = store.catalog.members["resnet"].image_preprocessing
    source = ImageSource(images, student, "none", image_cache=workspace.image_cache)
    expected = {name: softmax(timm_logits(*networks[name], images.paths)) for name in ("clip", "lite", "vit")}
    for names in (("clip",), ("lite",), ("clip", "lite", "vit")):
        teacher = replace(single, ensemble=replace(single.ensemble, members=names))
        predicted = teachers.predict_views(store, teacher, len(source), source.evaluation_batches, OpenNetworks())
        mean = np.mean([expected[name] for name in names], axis=0)
        np.testing.assert_allclose(predicted.log_probabilities, np.log(mean), atol=1e-3, err_msg=", ".join(names))
