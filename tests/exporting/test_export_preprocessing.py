"""One ONNX file of networks with preprocessings of their own: the delivered program against timm's transforms."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from export_runs import NAME, folder_of
from finished_workspace import CONFIG, at
from in_process import run as command_line
from PIL import Image
from torch import nn
from two_members import two_members

from utils import base_back
from utils.combiners.heads import MeanOfProbabilities
from utils.core.config_file import load_config
from utils.exporting import export_comparison, export_formats, parity_rows
from utils.exporting.exported_network import ExportSignature, ExportSource, describe_network
from utils.inference import onnx_prediction
from utils.inference.predict import predict, predict_from_export
from utils.networks.ensemble_network import EnsembleNetwork, MemberNetworks
from utils.predictions.catalog import TIMM, Member

__all__ = ["two_members"]

CLASSES = ("ant", "bee", "cat", "dog", "elk")
ARCHITECTURES = {
    "vit_tiny_patch16_224": {"depth": 2},
    "tf_efficientnet_lite0": {},
    "resnet18": {"layers": (1, 1, 1, 1)},
    "vit_xsmall_patch16_clip_224": {"depth": 2},
    "convnext_atto": {"depths": (1, 1, 1, 1)},
}
"""{architecture, which decides the preprocessing: options that make it shallow, since writing a layer takes long}"""
MEMBERS = ("--set", "backbones.include=[CustomViTHybrid,vit,resnet]", "--set", "exports.enable=true")
SIZES = [(60, 90), (131, 97), (300, 41), (64, 64)]


def image_files(folder) -> list:
    """Images of noise and gradients in several sizes, modes and formats."""
    rng = np.random.default_rng(0)
    paths = []
    for number, (width, height) in enumerate(SIZES):
        ramp = np.linspace(0, 255, width)[None, :, None] + np.linspace(-80, 80, height)[:, None, None]
        noise = rng.normal(scale=60, size=(height, width, 3))
        pixels = np.clip(ramp * [1, 0.6, 0.2] + noise, 0, 255).astype(np.uint8)
        suffix = (".png", ".jpg", ".webp", ".tiff")[number]
        image = Image.fromarray(pixels)
        paths.append(folder / f"{number}{suffix}")
        (image.convert("L") if number == 3 else image).save(paths[-1])
    return paths


def network_of(architecture: str, size: int):
    """A timm network with random weights whose logits differ between images, and its own transform."""
    import timm
    from timm.data import create_transform, resolve_data_config

    torch.manual_seed(len(architecture))
    options = {"img_size": size} if "vit" in architecture else {}
    network = timm.create_model(architecture, num_classes=len(CLASSES), **options, **ARCHITECTURES[architecture])
    with torch.no_grad():
        for module in network.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.running_mean.normal_(std=0.1)
        nn.init.normal_(network.get_classifier().weight)
        network.eval()
        images = torch.randn(8, 3, size, size).cumsum(dim=3)
        network.get_classifier().weight *= 2 / network(images / images.std()).std(dim=0).mean()
    config = resolve_data_config({"input_size": (3, size, size)}, model=network)
    return network, create_transform(**config, is_training=False)


@pytest.fixture(scope="module", params=[64, pytest.param(224, marks=pytest.mark.slow)])
def exported(request, tmp_path_factory):
    """(ONNX file, image files, probabilities of the mean of timm's networks on timm's transforms, description)"""
    size, folder = request.param, tmp_path_factory.mktemp("exported")
    files = image_files(folder)
    members, parts, expected = [], [], []
    for architecture in ARCHITECTURES:
        network, transform = network_of(architecture, size)
        record = base_back.load_bundled("resizing").timm_record(architecture, size)
        facts = {"checkpoints": (), "exports": (), "metrics": None, "oof": None, "recorded_accuracy": None}
        member = Member(
            architecture, TIMM + architecture, "full", size, CLASSES, **facts, digest=architecture, preprocessing=record
        )
        members.append(member)
        parts.append(MemberNetworks(architecture, [network], member.image_preprocessing, range(len(CLASSES))))
        with torch.no_grad():
            images = torch.stack([transform(Image.open(path).convert("RGB")) for path in files])
            expected.append(torch.softmax(network(images), dim=1).double())
    source = ExportSource("five", "soft_voting", tuple(members), CLASSES, None, "full", "digest")
    network = EnsembleNetwork(parts, MeanOfProbabilities())
    description = describe_network(source, ExportSignature(), network, "digest")
    sample = [torch.zeros(1, 3, size, size) for _ in network.input_names]
    done = export_formats.write_packaged_formats(
        network, "five", ["onnx"], folder / "five", sample, description, CLASSES
    )["onnx"]
    assert done["status"] == "ok", done["reason"]
    return folder / "five" / done["path"], files, torch.stack(expected).mean(dim=0).numpy(), description


def test_members_with_equal_resize_rules_share_an_input(exported):
    description = exported[3]
    rules = [entry["resizing"] for entry in description["input"]["inputs"]]
    assert [entry["name"] for entry in description["input"]["inputs"]] == ["images_1", "images_2", "images_3"]
    assert len({json.dumps(rule) for rule in rules}) == 3 < len(ARCHITECTURES)
    assert len({json.dumps(member["preprocessing"]) for member in description["members"]}) > 3


def test_the_delivered_program_agrees_with_timms_transforms_and_networks(exported, tmp_path):
    model, files, expected, _ = exported
    program = tmp_path / "predict.py"
    shutil.copyfile(onnx_prediction.__file__, program)
    command = [sys.executable, "-P", str(program), "--model", str(model), *map(str, files), "--json"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    answers = [json.loads(line)["probabilities"] for line in done.stdout.splitlines()]
    given = np.array([[answer[name] for name in CLASSES] for answer in answers])
    assert np.ptp(expected, axis=0).max() > 0.05  # a constant answer would not do
    np.testing.assert_allclose(given, expected, rtol=0, atol=1e-4)


def test_predict_from_export_agrees_too(exported):
    model, files, expected, _ = exported
    images = predict_from_export(paths=[str(files[0].parent)], from_export=str(model), probabilities=True).document[
        "images"
    ]
    assert [record["path"] for record in images] == [str(path) for path in files]
    given = np.array([[record["probabilities"][name] for name in CLASSES] for record in images])
    np.testing.assert_allclose(given, expected, rtol=0, atol=1e-4)


@pytest.fixture(scope="module")
def workspace(two_members, tmp_path_factory):
    """A workspace with an ensemble of a base pipeline's member and two timm networks, all resized by other rules."""
    import timm

    base = Path(shutil.copytree(two_members, tmp_path_factory.mktemp("rules") / "workspace"))
    for name, architecture, options in (("vit", "test_vit", {"img_size": 64}), ("resnet", "test_resnet", {})):
        torch.manual_seed(len(name))
        network = timm.create_model(architecture, num_classes=4, **options)
        nn.init.normal_(network.get_classifier().weight, std=0.5)
        torch.save({"state_dict": network.state_dict()}, base / f"{name}.pth")
    declared = [f"vit=timm:test_vit@{base / 'vit.pth'}", f"resnet=timm:test_resnet@{base / 'resnet.pth'}"]
    vit = ("input_size=64", "resize=squash", "interpolation=bicubic", "mean=0.5,0.5,0.5", "std=0.5,0.5,0.5")
    resnet = ("input_size=48", "resized=50", "channels=BGR", "range=0,255", "mean=104,117,124", "std=57,57,58")
    rules = [*(f"vit:{rule}" for rule in vit), *(f"resnet:{rule}" for rule in resnet)]
    done = command_line("discover", "--add", *declared, "--preprocess", *rules, "--config", CONFIG, workspace=base)
    assert done.code == 0, done.stderr
    done = command_line("build-ensemble", "--config", CONFIG, *MEMBERS, workspace=base)
    assert done.code == 0, done.stderr
    return base


def test_every_format_of_members_with_different_rules_is_proved(workspace, monkeypatch):
    monkeypatch.setattr(parity_rows, "N_CALIBRATION_IMAGES", 32)
    done = command_line(
        *("export", "--config", CONFIG, *MEMBERS, "--model-name", NAME, "--json"),
        *("--formats", "state_dict", "torchscript", "onnx", "--precision", "fp32", "fp16", "int8"),
        workspace=workspace,
    )
    assert done.code == 0, done.stderr
    for name in ("state_dict", "torchscript", "onnx", "onnx_fp16", "onnx_int8"):
        entry = done.document["formats"][name]
        assert entry["status"] == "ok", entry["reason"]
        assert (entry["parity"]["rows"], entry["parity"]["batch_sizes"]) == (64, [1, 3, 17])
    assert done.document["formats"]["onnx_int8"]["test_accuracy"]["rows"] > 0
    folder = folder_of(workspace)
    metadata = json.loads((folder / "metadata.json").read_text(encoding="utf-8"))
    assert metadata["input_shape"] == [[None, 3, 32, 32], [None, 3, 48, 48], [None, 3, 64, 64]]
    assert "- `images_2`: float32 (batch, 3, 48, 48)" in (folder / "custom" / "README.md").read_text(encoding="utf-8")
    done = command_line("export", "--verify", folder, "--json", workspace=workspace)
    assert (done.code, done.stderr) == (0, "")
    verified = done.document["formats"]
    assert {name: facts["status"] for name, facts in verified.items()} == dict.fromkeys(verified, "ok")
    assert {"state_dict", "torchscript", "onnx", "onnx_int8"} <= verified.keys()
    assert "onnx" in export_comparison.compare_exports(at(workspace)).text


@pytest.mark.parametrize("kind", ["float-nchw", "uint8-nhwc"])
def test_predict_from_export_agrees_with_the_members_of_the_workspace(workspace, kind):
    done = command_line(
        *("export", "--config", CONFIG, *MEMBERS, "--model-name", NAME, "--formats", "onnx", "--input", kind),
        workspace=workspace,
    )
    assert done.code == 0, done.stderr
    options = {"paths": [str(workspace / "split_dataset" / "test")], "probabilities": True}
    expected = predict(load_config(CONFIG), at(workspace), model_name=NAME, **options).document["images"]
    file = folder_of(workspace) / "onnx" / f"{NAME}.onnx"
    records = predict_from_export(from_export=str(file), **options).document["images"]
    given, wanted = (
        np.array([list(record["probabilities"].values()) for record in answers]) for answers in (records, expected)
    )
    np.testing.assert_allclose(given, wanted, rtol=0, atol=2e-5)
