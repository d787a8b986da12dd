"""Classifiers whose head reads the activations of every stage."""

from __future__ import annotations

import numpy as np
import pytest
import timm
import torch
from torch import nn

from utils import base_back

stage_features = base_back.load_bundled("stage_features")


def build(architecture: str = "resnet10t", size: int = 32):
    torch.manual_seed(0)
    return stage_features.StageFeatures(timm.create_model(architecture, num_classes=7), 3, size).eval()


@pytest.mark.parametrize(("architecture", "size"), [("resnet10t", 32), ("test_vit", 160), ("convnext_atto", 64)])
def test_features_are_mean_and_deviation_of_every_stage(architecture, size):
    model = build(architecture, size)
    images = torch.randn(2, 3, size, size)
    stages = model.trunk.forward_intermediates(images, intermediates_only=True)
    assert len(stages) > 1
    pooled = [part for stage in stages for part in (stage.mean((2, 3)), stage.std((2, 3), correction=0))]
    with torch.inference_mode():
        features = model.forward_features(images)
        np.testing.assert_allclose(features, torch.cat(pooled, dim=1).detach(), atol=1e-5)
        assert features.shape == (2, model.num_features)
        assert torch.equal(model(images), model.head(features))
        assert torch.equal(model.forward_head(features, pre_logits=True), features)
    assert model.get_classifier() is model.head


def test_the_embedding_is_the_input_of_the_head():
    from utils.networks.embeddings import EmbeddingExtractor

    model = build()
    images = torch.randn(2, 3, 32, 32)
    outputs = EmbeddingExtractor(model, "stages")
    with torch.inference_mode():
        outputs.probe(images)
        logits, embeddings = outputs(images)
        assert torch.equal(embeddings, model.forward_features(images))
        assert torch.equal(logits, model(images))


class Scaled(nn.Module):
    """Two stages that are multiples of the images."""

    def forward_intermediates(self, images, intermediates_only):
        assert intermediates_only
        return [images, 2 * images]

    def reset_classifier(self, num_classes):
        assert num_classes == 0


def test_a_constant_channel_has_a_finite_gradient():
    model = stage_features.StageFeatures(Scaled(), 3, 32)
    images = torch.ones(2, 3, 32, 32, requires_grad=True)
    model(images).square().sum().backward()
    assert torch.isfinite(images.grad).all()


def test_a_network_without_outputs_of_stages_is_refused():
    with pytest.raises(ValueError, match=r"Sequential: timm gives no outputs of its stages.*\+stages"):
        stage_features.StageFeatures(nn.Sequential(nn.Flatten(), nn.Linear(3 * 32 * 32, 7)), 3, 32)


def test_batch_statistics_are_those_of_before():
    trunk = timm.create_model("resnet10t", num_classes=7).train()
    before = {name: value.clone() for name, value in trunk.state_dict().items()}
    model = stage_features.StageFeatures(trunk, 3, 32)
    assert model.trunk.training
    for name, value in model.trunk.state_dict().items():
        assert torch.equal(value, before[name]), name
