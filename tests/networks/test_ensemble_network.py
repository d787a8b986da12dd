"""The ensemble as one network: preprocessing, members and combiner."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from battery_networks import SIDE, WIDTHS, C, Small
from torch import nn

from utils.combiners.heads import MeanOfProbabilities
from utils.networks.ensemble_network import EnsembleNetwork, MemberNetworks
from utils.networks.image_preparation import Preparation
from utils.networks.preprocessing import Preprocessing

SMALL = Preprocessing.of_base_pipeline(SIDE)


def images_of(count: int) -> torch.Tensor:
    return torch.rand(count, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(0))


def part(seed: int, **known) -> MemberNetworks:
    return MemberNetworks(f"m{seed}", [Small(seed, WIDTHS[seed]).eval()], SMALL, range(C), **known)


def test_each_network_runs_once_and_images_are_prepared_once():
    parts = [part(0), part(1)]
    calls = []
    for own in parts:
        own.networks[0].register_forward_hook(lambda *_: calls.append(1))
    network = EnsembleNetwork(parts, MeanOfProbabilities())
    assert len(network.preparations) == 1
    found = network(images_of(3))
    assert len(calls) == 2
    assert network.output_names == ("probabilities",)
    torch.testing.assert_close(found.sum(dim=1), torch.ones(3))


def test_columns_follow_the_ensembles_order_and_dead_outputs_are_cut():
    network = Small(0, WIDTHS[0]).eval()
    plain = EnsembleNetwork([MemberNetworks("m", [network], SMALL, [0, 1])], None)(images_of(2))[1]
    turned = EnsembleNetwork([MemberNetworks("m", [network], SMALL, [1, 0])], None)(images_of(2))[1]
    assert plain.shape == (2, 2)
    torch.testing.assert_close(turned, plain.flip(1))


def test_the_fold_networks_answer_by_their_mean_and_the_full_one_embeds():
    folds, full = [Small(seed, 5).eval() for seed in (1, 2)], Small(0, 5).eval()
    seen = []

    class Keep(nn.Module):
        def forward(self, logits, embeddings):
            seen.extend([logits, embeddings[0]])
            return logits[:, 0]

    EnsembleNetwork([MemberNetworks("m", folds, SMALL, range(C), full)], Keep(), embeds=True)(images_of(3))
    prepared = Preparation(SMALL, takes_uint8=False)(images_of(3))
    mean = torch.stack([torch.softmax(fold(prepared), dim=1) for fold in folds]).mean(dim=0)
    torch.testing.assert_close(torch.softmax(seen[0][:, 0], dim=1), mean)
    torch.testing.assert_close(seen[1], full.forward_head(full.forward_features(prepared), pre_logits=True))


def test_outputs_on_request():
    network = EnsembleNetwork([part(0), part(1)], MeanOfProbabilities(), member_probabilities=True, member_outputs=True)
    found = dict(zip(network.output_names, network(images_of(2)), strict=True))
    assert list(found) == ["probabilities", "member_probabilities", "member_logits"]
    torch.testing.assert_close(found["member_probabilities"].mean(dim=1), found["probabilities"])
    torch.testing.assert_close(torch.softmax(found["member_logits"], dim=2), found["member_probabilities"])


def test_members_of_different_resize_rules_have_an_input_each():
    """Small images first; a preprocessing that differs in its normalisation alone shares the input."""
    large, other_mean = Preprocessing.of_base_pipeline(2 * SIDE), replace(SMALL, mean=(0.5, 0.5, 0.5))
    network = Small(1, 4).eval()
    members = [MemberNetworks(f"m{n}", [network], each, range(C)) for n, each in enumerate((large, SMALL, other_mean))]
    ensemble = EnsembleNetwork(members, MeanOfProbabilities())
    assert ensemble.input_names == ("images_1", "images_2")
    assert ensemble.free_axes == {"images_1": {0: "batch"}, "images_2": {0: "batch"}}
    small_images, large_images = images_of(3), torch.rand(3, 3, 2 * SIDE, 2 * SIDE)
    inputs = {large: large_images, SMALL: small_images, other_mean: small_images}
    logits = [network(Preparation(each, takes_uint8=False)(images)) for each, images in inputs.items()]
    expected = torch.stack([torch.softmax(part, dim=1) for part in logits]).mean(dim=0)
    torch.testing.assert_close(ensemble(small_images, large_images), expected)
    raw = torch.randint(0, 256, (2, 11, 23, 3), dtype=torch.uint8)
    decoded = EnsembleNetwork(members, MeanOfProbabilities(), takes_uint8=True)
    assert decoded.input_names == ("images",)
    assert decoded(raw).shape == (2, C)
    with pytest.raises(ValueError, match="by 2 rules cannot be one input"):
        EnsembleNetwork(members, MeanOfProbabilities(), takes_uint8=True, resizes=False)


def test_names_of_weights_stay_those_of_the_base_pipelines_preprocessing():
    network = EnsembleNetwork([part(0), part(1)], MeanOfProbabilities())
    assert [name for name in network.state_dict() if name.startswith("prep")] == [
        f"preparations.{SIDE}.mean",
        f"preparations.{SIDE}.std",
    ]


class Foreign(nn.Module):
    """A network that offers no method but its forward pass; two heads, whose outputs are averaged."""

    def __init__(self) -> None:
        super().__init__()
        self.convolution = nn.Conv2d(3, 5, 3)
        self.one, self.other = nn.Linear(5, C), nn.Linear(5, C)

    def forward(self, images):
        pooled = self.convolution(images).mean(dim=(2, 3))
        return (self.one(pooled) + self.other(pooled * 2)) / 2


class Embeddings(nn.Module):
    def forward(self, logits, embeddings):
        return torch.cat([logits.mean(dim=1), *embeddings], dim=1)


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
def test_embeddings_of_a_network_without_methods_outlive_a_trace():
    torch.manual_seed(0)
    own = Foreign().eval()
    network = EnsembleNetwork([MemberNetworks("foreign", [own], SMALL, range(C))], Embeddings(), embeds=True)
    traced = torch.jit.trace(network, images_of(2), check_trace=False)
    for count in (1, 5):
        prepared = Preparation(SMALL, takes_uint8=False)(images_of(count))
        pooled = own.convolution(prepared).mean(dim=(2, 3))
        expected = torch.cat([own(prepared), pooled, pooled * 2], dim=1)
        torch.testing.assert_close(network(images_of(count)), expected)
        torch.testing.assert_close(traced(images_of(count)), expected)
