"""The ensemble as one network: preprocessing, members and combiner."""

from __future__ import annotations

import io
import warnings

import numpy as np
import onnxruntime
import pytest
import torch
from battery_networks import SIDE, WIDTHS, C, Small
from PIL import Image
from torch import nn

from utils.combiners.heads import MeanOfProbabilities
from utils.networks import ensemble_network
from utils.networks.ensemble_network import EnsembleNetwork, MemberNetworks, Preparation
from utils.networks.preprocessing import Preprocessing
from utils.predictions.image_splits import normalise

SIZES = [(8, 8), (9, 7), (33, 31), (36, 36), (41, 300), (333, 127), (1, 3)]


def images_of(count: int) -> torch.Tensor:
    return torch.rand(count, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(0))


def part(seed: int, **known) -> MemberNetworks:
    return MemberNetworks(f"m{seed}", [Small(seed, WIDTHS[seed]).eval()], SIDE, range(C), **known)


@pytest.fixture(scope="module")
def in_onnx():
    """A preparation of uint8 images for 32 px in onnxruntime."""
    file = io.BytesIO()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.onnx.export(
            Preparation(32, takes_uint8=True),
            (torch.zeros(2, 40, 50, 3, dtype=torch.uint8),),
            file,
            dynamo=False,
            opset_version=17,
            input_names=["images"],
            output_names=["prepared"],
            dynamic_axes={"images": {0: "batch", 1: "height", 2: "width"}, "prepared": {0: "batch"}},
        )
    session = onnxruntime.InferenceSession(file.getvalue(), providers=["CPUExecutionProvider"])
    return lambda images: session.run(None, {"images": images})[0]


@pytest.mark.parametrize("height", [size[0] for size in SIZES])
def test_uint8_images_are_prepared_bit_for_bit_as_the_project_does_it(height, in_onnx):
    width = dict(SIZES)[height]
    pixels = np.random.default_rng(height).integers(0, 256, (height, width, 3), dtype=np.uint8)
    preprocessing = Preprocessing.of_base_pipeline(32)
    square = preprocessing.resizing().square(Image.fromarray(pixels))
    expected = normalise(torch.from_numpy(square)[None], preprocessing)
    given = torch.from_numpy(pixels)[None]
    torch.testing.assert_close(Preparation(32, takes_uint8=True)(given), expected, rtol=0, atol=0)
    torch.testing.assert_close(torch.from_numpy(in_onnx(given.numpy())), expected, rtol=0, atol=1e-6)


def test_preparation_shows_no_warning(monkeypatch):
    """Also none that pytest's own configuration ignores, where the branch is compiled for the first time."""
    ensemble_network._by_the_shorter_way.cache_clear()
    monkeypatch.setattr(ensemble_network.PIL, "__version__", "13.0.0")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        Preparation(32, takes_uint8=True)(torch.zeros(1, 40, 50, 3, dtype=torch.uint8))
    assert ensemble_network._by_the_shorter_way.cache_info().misses == 1


def test_images_in_0_to_1_are_normalised():
    found = Preparation(SIDE, takes_uint8=False)(images_of(2))
    torch.testing.assert_close(found[:, 1], (images_of(2)[:, 1] - 0.456) / 0.224)


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
    plain = EnsembleNetwork([MemberNetworks("m", [network], SIDE, [0, 1])], None)(images_of(2))[1]
    turned = EnsembleNetwork([MemberNetworks("m", [network], SIDE, [1, 0])], None)(images_of(2))[1]
    assert plain.shape == (2, 2)
    torch.testing.assert_close(turned, plain.flip(1))


def test_the_fold_networks_answer_by_their_mean_and_the_full_one_embeds():
    folds, full = [Small(seed, 5).eval() for seed in (1, 2)], Small(0, 5).eval()
    seen = []

    class Keep(nn.Module):
        def forward(self, logits, embeddings):
            seen.extend([logits, embeddings[0]])
            return logits[:, 0]

    EnsembleNetwork([MemberNetworks("m", folds, SIDE, range(C), full)], Keep(), embeds=True)(images_of(3))
    prepared = Preparation(SIDE, takes_uint8=False)(images_of(3))
    mean = torch.stack([torch.softmax(fold(prepared), dim=1) for fold in folds]).mean(dim=0)
    torch.testing.assert_close(torch.softmax(seen[0][:, 0], dim=1), mean)
    torch.testing.assert_close(seen[1], full.forward_head(full.forward_features(prepared), pre_logits=True))


def test_outputs_on_request():
    network = EnsembleNetwork([part(0), part(1)], MeanOfProbabilities(), member_probabilities=True, member_outputs=True)
    found = dict(zip(network.output_names, network(images_of(2)), strict=True))
    assert list(found) == ["probabilities", "member_probabilities", "member_logits"]
    torch.testing.assert_close(found["member_probabilities"].mean(dim=1), found["probabilities"])
    torch.testing.assert_close(torch.softmax(found["member_logits"], dim=2), found["member_probabilities"])


def test_members_of_unequal_size_share_raw_images_alone():
    parts = [part(0), MemberNetworks("large", [Small(1, 4).eval()], 2 * SIDE, range(C))]
    with pytest.raises(ValueError, match="cannot share"):
        EnsembleNetwork(parts, MeanOfProbabilities())
    raw = torch.randint(0, 256, (2, 11, 23, 3), dtype=torch.uint8)
    assert EnsembleNetwork(parts, MeanOfProbabilities(), takes_uint8=True)(raw).shape == (2, C)


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
    network = EnsembleNetwork([MemberNetworks("foreign", [own], SIDE, range(C))], Embeddings(), embeds=True)
    traced = torch.jit.trace(network, images_of(2), check_trace=False)
    for count in (1, 5):
        prepared = Preparation(SIDE, takes_uint8=False)(images_of(count))
        pooled = own.convolution(prepared).mean(dim=(2, 3))
        expected = torch.cat([own(prepared), pooled, pooled * 2], dim=1)
        torch.testing.assert_close(network(images_of(count)), expected)
        torch.testing.assert_close(traced(images_of(count)), expected)
