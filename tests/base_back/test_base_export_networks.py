"""The base pipeline's export of its own backbones, and the form in which a network is deployed."""

from __future__ import annotations

import json
from pathlib import Path

import onnx
import onnxruntime
import pytest
import torch
from packaging_cases import BUILT, CLASSES, FILES, SAMPLE, Leaf, package, written
from torch import nn

from export import export_and_package_model, formats, onnx_files
from models import BACKBONE_MAP, create_custom_backbone


def check_backbone_package(name: str, root: Path) -> None:
    """A backbone in a size of its own, whatever the settings say."""
    model = create_custom_backbone(name, 3, size="tiny", img_size=32)
    random_state = torch.get_rng_state()
    result = export_and_package_model(model, name, export_formats=BUILT, deploy_root=root, class_names=CLASSES)
    assert torch.equal(torch.get_rng_state(), random_state)
    assert result["successful_exports"] == BUILT, result["export_results"]
    metadata = json.loads((root / name / "metadata.json").read_text(encoding="utf-8"))
    assert (metadata["model_size"], metadata["img_size"], metadata["input_shape"]) == ("tiny", 32, [1, 3, 32, 32])
    full = torch.load(root / name / f"checkpoint/{name}_checkpoint_full.pth", weights_only=True)
    assert full["extra"] == {"backbone_name": name, "classes": CLASSES, "model_size": "tiny", "img_size": 32}


@pytest.mark.parametrize("name", ["CustomViTHybrid", "CustomMobileOne"])  # the latter has branches that are fused
def test_a_backbone_is_packaged_in_its_own_size(tmp_path, name):
    check_backbone_package(name, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(BACKBONE_MAP))
def test_every_backbone_can_be_packaged(tmp_path, name):
    check_backbone_package(name, tmp_path)


def test_a_backbone_file_is_opened_into_a_freshly_built_network(tmp_path):
    model = create_custom_backbone("CustomConvNeXt", 3, size="tiny", img_size=32)
    model.register_buffer("left_over", torch.zeros(1))
    result = package(tmp_path, model, ["state_dict"], sample_input=None)
    assert result["failed_exports"] == ["state_dict"]
    assert "left_over" in result["export_results"]["state_dict"]["reason"]


def test_mobile_one_is_deployed_as_plain_convolutions(tmp_path):
    model = create_custom_backbone("CustomMobileOne", 3, size="tiny", img_size=32)
    result = package(tmp_path, model, sample_input=None)
    assert result["successful_exports"] == BUILT
    nodes = [node.op_type for node in onnx.load(str(tmp_path / "leaf" / FILES["onnx"][0])).graph.node]
    branches = sum(isinstance(module, nn.Conv2d) for module in model.modules())
    assert "BatchNormalization" not in nodes
    assert nodes.count("Conv") < branches


def test_a_tensor_that_shares_its_bytes_is_kept_once_for_each_name(tmp_path):
    model = Leaf()
    model.register_buffer("head", model[6].weight.detach()[:1])
    assert package(tmp_path, model, ["state_dict"])["successful_exports"] == ["state_dict"]
    weights = torch.load(tmp_path / "leaf" / FILES["state_dict"][0], weights_only=True)
    assert weights["head"].untyped_storage().nbytes() == weights["head"].nbytes


def test_weights_that_are_too_many_for_one_onnx_file_lie_beside_it(tmp_path, monkeypatch):
    monkeypatch.setattr(onnx_files, "LARGEST_IN_ONE_FILE", 100)
    model = nn.Sequential(nn.Conv2d(3, 64, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, len(CLASSES)))
    result = package(tmp_path, model, ["onnx"])
    assert result["successful_exports"] == ["onnx"]
    assert written(tmp_path / "leaf/onnx") == {"leaf.onnx", "leaf.onnx.data"}
    assert "onnx/leaf.onnx.data" in result["checksums"]
    monkeypatch.undo()
    package(tmp_path, model, ["onnx"], force=True)
    assert written(tmp_path / "leaf/onnx") == {"leaf.onnx"}


class Branched(nn.Module):
    """Two branches in training, one convolution afterwards."""

    def __init__(self) -> None:
        super().__init__()
        self.branches = nn.ModuleList(nn.Conv2d(3, 3, 1) for _ in range(2))

    def forward(self, images):
        return sum(branch(images) for branch in self.branches)

    def reparameterize(self):
        with torch.no_grad():
            self.branches[0].weight += self.branches[1].weight
            self.branches[0].bias += self.branches[1].bias
        del self.branches[1]


def test_the_form_for_inference_shares_what_does_not_change():
    network = nn.Sequential(Branched(), Leaf()).eval()
    before = network(SAMPLE)
    deployed = formats.Package("leaf", network, {}, {}, [SAMPLE], [before]).deployed
    assert len(deployed[0].branches) == 1
    torch.testing.assert_close(deployed(SAMPLE), before)
    assert len(network[0].branches) == 2
    assert torch.equal(network(SAMPLE), before)
    kept = dict(network[1].state_dict(keep_vars=True))
    assert all(kept[name] is tensor for name, tensor in deployed[1].state_dict(keep_vars=True).items())


class TwoSizes(nn.Module):
    """Logits of images of two sizes: a network with two inputs."""

    input_names = ("small", "large")

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.small, self.large = nn.Conv2d(3, len(CLASSES), 3), nn.Conv2d(3, len(CLASSES), 5)

    def forward(self, small: torch.Tensor, large: torch.Tensor) -> torch.Tensor:
        return self.small(small).mean(dim=(2, 3)) + 2 * self.large(large).amax(dim=(2, 3))


def test_a_network_with_several_inputs_is_packaged(tmp_path):
    sample = (torch.zeros(1, 3, 8, 8), torch.zeros(1, 3, 12, 12))
    result = package(tmp_path, TwoSizes().eval(), sample_input=sample)
    assert result["successful_exports"] == BUILT, result["export_results"]
    session = onnxruntime.InferenceSession(str(tmp_path / "leaf" / "onnx" / "leaf.onnx"))
    assert [(given.name, given.shape) for given in session.get_inputs()] == [
        ("small", ["batch", 3, 8, 8]),
        ("large", ["batch", 3, 12, 12]),
    ]
