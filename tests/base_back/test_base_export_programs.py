"""ONNX files by the exporter `dynamo`, programs of `torch.export`, and what either cannot take."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from packaging_cases import CLASSES, Leaf, package, written
from torch import nn

from export import export_and_package_model, onnx_files, programs
from models import BACKBONE_MAP, create_custom_backbone

KINDS = ["onnx", "exported_program"]
REFUSED = [
    f"torch {torch.__version__} cannot capture every network; expected 2.13 or newer",
    "it takes images of any height and width, which scripted code resizes",
]
NEEDS_TORCH = pytest.mark.skipif(
    programs.refusal(nn.Identity()) is not None, reason="this torch cannot capture every network"
)


class AnySize(nn.Module):
    """Decoded images of any size, as an ensemble with `--input uint8-nhwc` takes them."""

    input_names, output_names = ("images",), ("probabilities",)
    free_axes = {"images": {0: "batch", 1: "height", 2: "width"}}  # noqa: RUF012
    onnx_exporter = "dynamo"

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return images.float().mean(dim=(1, 2)).softmax(1)


class TwoInputs(nn.Module):
    """Images of two sizes, the second one by `*others`, as an ensemble takes them."""

    input_names = ("small", "large")

    def __init__(self) -> None:
        super().__init__()
        self.small, self.large = nn.Conv2d(3, len(CLASSES), 3), nn.Conv2d(3, len(CLASSES), 5)

    def forward(self, small: torch.Tensor, *others: torch.Tensor) -> torch.Tensor:
        return self.small(small).mean(dim=(2, 3)) + self.large(others[0]).mean(dim=(2, 3))


def by_dynamo(network: nn.Module) -> nn.Module:
    network.onnx_exporter = "dynamo"
    return network.eval()


@pytest.fixture(scope="module")
def captured(tmp_path_factory) -> tuple[Path, nn.Module, dict]:
    """(folder, network, result) of one packaged by dynamo. Shared: read it, never write into it."""
    root, network = tmp_path_factory.mktemp("captured"), by_dynamo(Leaf())
    return root, network, package(root, network, KINDS)


def open_onnx(root: Path, name: str = "leaf") -> onnxruntime.InferenceSession:
    return onnxruntime.InferenceSession(root / name / "onnx" / f"{name}.onnx", providers=["CPUExecutionProvider"])


def check_batches(network: nn.Module, root: Path, name: str, side: int) -> None:
    """Both files answer as the network does in batches of 1, 2 and 7."""
    session = open_onnx(root, name)
    program = torch.export.load(root / name / "exported_program" / f"{name}.pt2").module()
    for rows in (1, 2, 7):
        images = torch.rand(rows, 3, side, side)
        with torch.no_grad():
            expected = network(images).numpy()
            # An untrained network can give logits of 1e7, each the difference of terms of that size.
            limits = {"rtol": 0, "atol": 1e-4 + 1e-5 * np.abs(expected).max()}
            np.testing.assert_allclose(program(images).numpy(), expected, **limits)
        np.testing.assert_allclose(session.run(None, {"input": images.numpy()})[0], expected, **limits)


def test_the_list_of_refusals_is_this_one():
    assert list(programs.REFUSALS) == REFUSED


@pytest.mark.parametrize(("version", "is_refused"), [("2.6.0+cu124", True), ("2.12.1", True), ("2.13.0", False)])
def test_an_older_torch_is_refused(monkeypatch, version, is_refused):
    monkeypatch.setattr(torch, "__version__", version)
    assert (programs.refusal(Leaf()) == REFUSED[0]) == is_refused


@NEEDS_TORCH
def test_both_files_answer_in_every_batch_size(captured):
    root, network, result = captured
    assert result["successful_exports"] == KINDS, result["export_results"]
    check_batches(network, root, "leaf", 8)
    metadata = open_onnx(root).get_modelmeta().custom_metadata_map
    assert (metadata["exporter"], metadata["opset"]) == (f"torch {torch.__version__}, dynamo=True", "18")
    assert json.loads(metadata["classes"]) == CLASSES
    assert [given.shape for given in open_onnx(root).get_inputs()] == [["batch", 3, 8, 8]]
    assert [given.name for given in open_onnx(root).get_outputs()] == ["output"]


@NEEDS_TORCH
def test_files_hold_nothing_of_the_machine(captured):
    root = captured[0] / "leaf"
    path = root / "onnx" / "leaf.onnx"
    for content in (path.read_bytes(), (root / "exported_program" / "leaf.pt2").read_bytes()):
        assert str(Path(__file__).parents[2]).encode() not in content
        assert Path(torch.__file__).parent.name.encode() + b"/nn" not in content
    keys = {entry.key for node in onnx.load(str(path)).graph.node for entry in node.metadata_props}
    assert keys == {onnx_files.SCOPES}


@NEEDS_TORCH
def test_several_inputs_have_one_batch_size(tmp_path):
    sample = (torch.zeros(1, 3, 8, 8), torch.zeros(1, 3, 12, 12))
    result = package(tmp_path, by_dynamo(TwoInputs()), KINDS, sample_input=sample)
    assert result["successful_exports"] == KINDS, result["export_results"]
    assert [(given.name, given.shape) for given in open_onnx(tmp_path).get_inputs()] == [
        ("small", ["batch", 3, 8, 8]),
        ("large", ["batch", 3, 12, 12]),
    ]


@NEEDS_TORCH
def test_weights_that_are_too_many_for_one_file_lie_beside_it(tmp_path, monkeypatch):
    monkeypatch.setattr(onnx_files, "LARGEST_IN_ONE_FILE", 100)
    network = nn.Sequential(nn.Conv2d(3, 64, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, len(CLASSES)))
    result = package(tmp_path, by_dynamo(network), ["onnx"])
    assert result["successful_exports"] == ["onnx"], result["export_results"]
    assert written(tmp_path / "leaf/onnx") == {"leaf.onnx", "leaf.onnx.data"}


def test_a_refused_network_is_written_by_tracing_and_has_no_program(tmp_path, monkeypatch):
    warnings: list[str] = []
    monkeypatch.setattr(onnx_files, "logger", SimpleNamespace(warning=warnings.append))
    sample = torch.zeros(1, 8, 8, 3, dtype=torch.uint8)
    result = package(tmp_path, AnySize().eval(), KINDS, sample_input=sample)
    assert (result["successful_exports"], result["failed_exports"]) == (["onnx"], ["exported_program"])
    assert REFUSED[1] in result["export_results"]["exported_program"]["reason"]
    assert open_onnx(tmp_path).get_modelmeta().custom_metadata_map["exporter"].endswith("dynamo=False")
    assert [f"written by the tracing exporter, not by dynamo: {REFUSED[1]}" in line for line in warnings] == [True]


@NEEDS_TORCH
def test_another_exporter_writes_the_file_again_and_with_the_same_bytes_every_time(captured, tmp_path):
    package(tmp_path, Leaf(), ["onnx"])
    assert package(tmp_path, Leaf(), ["onnx"])["skipped_exports"] == ["onnx"]
    assert package(tmp_path, by_dynamo(Leaf()), ["onnx"])["skipped_exports"] == []
    assert open_onnx(tmp_path).get_modelmeta().custom_metadata_map["exporter"].endswith("dynamo=True")
    first, again = ((root / "leaf" / "onnx" / "leaf.onnx").read_bytes() for root in (captured[0], tmp_path))
    assert first == again


@NEEDS_TORCH
@pytest.mark.slow
@pytest.mark.parametrize("size", ["tiny", "full"])
@pytest.mark.parametrize("name", sorted(BACKBONE_MAP))
def test_every_backbone(tmp_path, name, size):
    network = by_dynamo(create_custom_backbone(name, 3, size=size))
    result = export_and_package_model(network, name, export_formats=KINDS, deploy_root=tmp_path, class_names=CLASSES)
    assert result["successful_exports"] == KINDS, result["export_results"]
    for module in network.modules():
        if hasattr(module, "reparameterize"):
            module.reparameterize()
    check_batches(network, tmp_path, name, network.img_size)


@NEEDS_TORCH
@pytest.mark.slow
@pytest.mark.parametrize("name", ["resnet10t", "mobilenetv3_small_050", "vit_tiny_patch16_224", "convnext_atto"])
def test_networks_of_timm(tmp_path, name):
    timm = pytest.importorskip("timm")
    network = by_dynamo(timm.create_model(name, num_classes=3))
    sample = torch.zeros(1, 3, 224, 224)
    options = {"export_formats": KINDS, "deploy_root": tmp_path, "class_names": CLASSES}
    result = export_and_package_model(network, name, sample, **options)
    assert result["successful_exports"] == KINDS, result["export_results"]
    check_batches(network, tmp_path, name, 224)
