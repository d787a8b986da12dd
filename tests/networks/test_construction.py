"""Networks of any origin: number of outputs, weights that do not fit, outputs beyond the classes."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from head_networks import CLASSES, Foreign, factory, spec
from preprocessings import BASE_32
from torch import nn

from utils import base_back
from utils.core.errors import UserError
from utils.networks import construction
from utils.networks.construction import NetworkSpec, build_network, extra_outputs_problem
from utils.networks.embeddings import EmbeddingExtractor


@pytest.fixture
def images():
    return torch.randn(7, 3, 32, 32, generator=torch.Generator().manual_seed(1))


def test_a_factory_without_sizes_and_integer_buffers(images):
    torch.manual_seed(3)
    original = Foreign(5).eval()
    original.index.copy_(torch.tensor([5, 4, 3, 2, 1, 0]))
    model = build_network(spec("Foreign"), original.state_dict(), factory)
    assert not model.training
    assert model.index.dtype == torch.int64
    with torch.inference_mode():
        assert torch.equal(model(images), original(images))


@pytest.mark.parametrize("classes", [CLASSES, CLASSES[:2]])
def test_the_weights_say_how_many_outputs_there_are(classes):
    model = build_network(spec("Foreign", classes), Foreign(13).state_dict(), factory)
    assert model.head[-1].out_features == 13


def test_where_the_last_matrix_misleads_the_shapes_decide():
    class HeadFirst(nn.Module):
        def __init__(self, num_classes=1000):
            super().__init__()
            self.head, self.stem = nn.Linear(8, num_classes), nn.Linear(4, 8)

    found = build_network(
        spec("HeadFirst"), HeadFirst(3).state_dict(), lambda name, num_classes: HeadFirst(num_classes)
    )
    assert found.head.out_features == 3


def test_a_bundled_network_takes_its_sizes_and_its_classes_from_the_file():
    from models import create_custom_backbone, create_custom_backbone_safe

    # Its two heads come before everything else in the file, so the last matrix is not the classifier.
    weights = create_custom_backbone("CustomDeiTStyle", 3, size="tiny", img_size=32).state_dict()
    asked = NetworkSpec("CustomDeiTStyle", Path("d.pth"), "tiny", BASE_32, CLASSES[:3])
    assert build_network(asked, weights, create_custom_backbone_safe).num_classes == 3


@pytest.mark.parametrize("name", ["resnet10t", "deit_tiny_distilled_patch16_224"])
def test_a_timm_model_by_name(name, images):
    import timm

    torch.manual_seed(0)
    options = {"img_size": 32} if "deit" in name else {}
    original = timm.create_model(name, pretrained=False, num_classes=5, **options).eval()
    model = build_network(spec(name, source="timm"), original.state_dict())
    outputs = EmbeddingExtractor(model, name)
    with torch.inference_mode():
        outputs.probe(images[:2])
        logits, embeddings = outputs(images)
        torch.testing.assert_close(logits, original(images))
    assert embeddings.shape[1] == {"resnet10t": 512, "deit_tiny_distilled_patch16_224": 2 * 192}[name]


def test_a_head_on_the_stages_of_a_timm_model(images):
    import timm

    torch.manual_seed(0)
    features = base_back.load_bundled("stage_features")
    original = features.StageFeatures(timm.create_model("resnet10t"), 5, 32).eval()
    model = build_network(spec("resnet10t+stages", source="timm"), original.state_dict())
    with torch.inference_mode():
        torch.testing.assert_close(model(images), original(images))
    assert construction.timm_model_name("resnet10t+stages") == construction.timm_model_name("resnet10t") == "resnet10t"


@pytest.mark.parametrize("name", ["resnet10", "hf-hub:timm/resnet10t.c3_in1k"])
def test_a_timm_model_that_is_not_installed_is_named_and_not_fetched(name):
    with pytest.raises(UserError, match=r"has no model '.*resnet10.*Name one of timm.list_models"):
        build_network(spec(name, source="timm"), Foreign(5).state_dict())


def test_weights_that_do_not_fit_say_in_which_way():
    def refusal(weights, name="Foreign"):
        with pytest.raises(UserError) as caught:
            build_network(spec(name), weights, factory)
        return str(caught.value)

    weights = Foreign(5).state_dict()
    assert "'module.', as DataParallel saves" in refusal({f"module.{name}": value for name, value in weights.items()})
    other = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Linear(4, 5)).state_dict()
    assert "another architecture: they share 0 of 7 names" in refusal(other)
    assert "1 name(s) are missing, first index" in refusal({k: v for k, v in weights.items() if k != "index"})
    assert "1 are not the network's, first ema" in refusal({"ema": torch.ones(1)} | weights)
    wider = weights | {"stem.bias": torch.zeros(7)}
    assert "1 have other shapes, first stem.bias is (7,), expected (6,)" in refusal(wider)
    assert "no weights (epoch); expected a dictionary of tensors" in refusal(weights | {"epoch": 3})
    assert "no weights (empty)" in refusal({})
    assert "the network Nothing cannot be built (see the log above)" in refusal(weights, "Nothing")


def test_extra_outputs_are_removable_unless_they_are_predicted_or_hold_probability():
    rng = np.random.default_rng(0)
    logits = rng.normal(size=(200, 13)) * 2
    assert "is the largest on" in extra_outputs_problem(logits, 10)
    logits[:, 10:] = logits[:, :10].min(axis=1, keepdims=True)  # never the largest, and yet alive
    weak = logits * 0.1
    assert "of the probability, 0.046 at most" in extra_outputs_problem(weak, 10)
    logits[:, 10:] -= 20
    assert extra_outputs_problem(logits, 10) is None


def test_what_label_smoothing_leaves_on_extra_outputs_is_removable():
    target = np.full((50, 13), 0.1 / 13)
    target[np.arange(50), np.arange(50) % 10] += 0.9
    assert extra_outputs_problem(np.log(target), 10) is None


def test_the_table_of_layouts_names_bundled_architectures_only():
    from models import BACKBONE_MAP, create_custom_backbone

    assert set().union(*construction.CHANNELS_LAST.values()) <= set(BACKBONE_MAP)
    listed, other = (
        create_custom_backbone(name, 3, size="tiny", img_size=32) for name in ("CustomRegNet", "CustomDeiTStyle")
    )
    assert construction.evaluation_format(listed) == torch.channels_last
    assert construction.evaluation_format(other) == torch.contiguous_format
    assert construction.evaluation_format(Foreign(3)) == torch.contiguous_format


@pytest.mark.parametrize("name", ["test_resnet", "mobileone_s0"])  # the latter is trained contiguous
def test_networks_of_timm_are_evaluated_channels_last(name):
    import timm

    assert construction.evaluation_format(timm.create_model(name, num_classes=3)) == torch.channels_last
