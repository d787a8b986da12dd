"""Embeddings: found for any architecture, and refused where they do not explain the logits."""

from __future__ import annotations

import pytest
import torch
from head_networks import Foreign, Shared, TwoHeads, built_network
from torch import nn
from torch.nn import functional as F

from utils.core.errors import UserError
from utils.networks.embeddings import EmbeddingExtractor


@pytest.fixture
def images():
    return torch.randn(7, 3, 32, 32, generator=torch.Generator().manual_seed(1))


def linear_map(model, embeddings):
    """The logits that a network's last layers make of its embeddings."""
    if isinstance(model, TwoHeads):
        first, second = embeddings.split(6, dim=1)
        return (model.head(first) + model.head_dist(second)) / 2
    if isinstance(model, Shared):
        return sum(map(model.head, embeddings.split(6, dim=1))) / 2
    return (model.head[-1] if isinstance(model.head, nn.Sequential) else model.head)(embeddings)


@pytest.mark.parametrize(
    ("name", "outputs", "width"),
    [("Foreign", 5, 8), ("Foreign", 8, 8), ("TwoHeads", 5, 12), ("Bottleneck", 5, 5), ("Shared", 5, 12)],
)
def test_embeddings_are_what_the_last_layers_read(name, outputs, width, images):
    model = built_network(name, outputs)
    ways = EmbeddingExtractor(model, name)
    with torch.inference_mode():
        ways.probe(images[:2])
        logits, embeddings = ways(images)
        assert torch.equal(logits, model(images))
        assert embeddings.shape == (7, width)
        torch.testing.assert_close(linear_map(model, embeddings), logits, atol=1e-5, rtol=0)
    assert ways.count == outputs
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_an_early_layer_with_as_many_outputs_is_not_the_head(images):
    model = built_network("Foreign", 8)  # head.0 has 8 outputs as well
    ways = EmbeddingExtractor(model, "Foreign")
    with torch.inference_mode():
        ways.probe(images[:2])
        _, embeddings = ways(images)
        assert torch.equal(embeddings, F.relu(model.head[0](model.features(images))))


def test_methods_are_believed_only_where_they_give_the_logits(images):
    model = built_network("Methods")  # forward_head stops before the stack, get_classifier is its end
    ways = EmbeddingExtractor(model, "Methods")
    with torch.inference_mode():
        ways.probe(images[:2])
        logits, embeddings = ways(images)
        torch.testing.assert_close(model.head[-1](embeddings), logits)


def test_a_network_without_embeddings_is_named_once_and_keeps_its_logits(images, heard):
    model = built_network("Hidden")
    ways = EmbeddingExtractor(model, "Hidden_final.pth")
    with torch.inference_mode():
        ways.probe(images[:2])
        for _ in range(2):
            logits, embeddings = ways(images)
        assert torch.equal(logits, model(images))
    assert embeddings.shape == (7, 0)
    warnings = [record for record in heard.records if "no linear layer's outputs are its logits" in record.getMessage()]
    assert len({id(record) for record in warnings}) == 1


def test_a_network_that_goes_another_way_for_some_images_is_refused(images):
    class Moody(Foreign):
        def forward(self, x):
            return super().forward(x) * (1 if len(x) < 5 else 2)

    ways = EmbeddingExtractor(Moody(5).eval(), "Moody")
    with torch.inference_mode():
        ways.probe(images[:2])
        with pytest.raises(UserError, match="explain the logits of some images and not of others"):
            ways(images)


def test_what_is_no_tensor_of_logits_is_refused(images):
    class Pair(Foreign):
        def forward(self, x):
            return super().forward(x), None

    with pytest.raises(UserError, match="returns tuple; expected one tensor of logits"):
        EmbeddingExtractor(Pair(5).eval(), "Pair").probe(images)
