"""Class-activation maps: of every architecture, equal to CAM where it is defined, faithful to what was learned."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from utils import base_back
from utils.core.errors import UserError
from utils.networks.class_maps import ClassMaps
from utils.numeric.means import paired_interval

SIDE = 32


def images(count=3, side=SIDE):
    return torch.randn(count, 3, side, side, generator=torch.Generator().manual_seed(0))


def mapped(model, name, batch, targets):
    maps = ClassMaps(model, name)
    maps.probe(batch[:2])
    return maps(batch, torch.tensor(targets))


@pytest.fixture(scope="module")
def models():
    return base_back.load("models")


def test_all_fifteen_backbones_have_maps_of_what_their_weights_say(models):
    assert len(models.BACKBONE_MAP) == 15
    for name in models.BACKBONE_MAP:
        networks = []
        for seed in (0, 1):
            torch.manual_seed(seed)
            networks.append(models.create_custom_backbone_safe(name, 5, size="tiny", img_size=SIDE))
        maps = ClassMaps(networks[0], name)
        maps.probe(images(2))
        found = [maps(images(), torch.arange(3))]
        maps.model.load_state_dict(networks[1].state_dict())  # the same network with other random weights
        found.append(maps(images(), torch.arange(3)))
        assert found[0].shape[1] == found[0].shape[2] >= 4, name
        assert found[0].min() >= 0
        torch.testing.assert_close(found[0].sum(dim=(1, 2)), torch.ones(3))
        assert float((found[0] - found[1]).abs().sum(dim=(1, 2)).mean()) > 0.2, name


@pytest.mark.parametrize(("architecture", "grid"), [("vit_tiny_patch16_224", 4), ("resnet18", 8)])
def test_networks_of_timm_have_maps(architecture, grid):
    import timm

    options = {"img_size": 64} if architecture.startswith("vit") else {}
    model = timm.create_model(architecture, num_classes=5, **options)
    found = mapped(model, architecture, images(side=64), [0, 1, 2])
    assert found.shape == (3, grid, grid)
    torch.testing.assert_close(found.sum(dim=(1, 2)), torch.ones(3))


class Pooled(nn.Module):
    """Feature maps, global average pooling and a linear head."""

    def __init__(self, classes=4):
        super().__init__()
        self.features = nn.Sequential(nn.Conv2d(3, 8, 5, 2, 2), nn.ReLU(), nn.Conv2d(8, 12, 3, 2, 1), nn.ReLU())
        self.head = nn.Linear(12, classes)

    def forward(self, batch):
        return self.head(self.features(batch).mean(dim=(2, 3)))


class Branches(Pooled):
    """Its feature map is the sum of two branches."""

    def __init__(self):
        super().__init__()
        self.whole = nn.Sequential(nn.Conv2d(3, 6, 3, 2, 1), nn.ReLU())
        self.left, self.right = nn.Conv2d(6, 12, 3, 1, 1), nn.Conv2d(6, 12, 1)

    def forward(self, batch):
        shared = self.whole(batch)
        return self.head((self.left(shared) + self.right(shared)).mean(dim=(2, 3)))


class Flattened(nn.Module):
    """No positions: a perceptron on pixels."""

    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(nn.Flatten(), nn.Linear(3 * SIDE * SIDE, 10), nn.ReLU(), nn.Linear(10, 4))

    def forward(self, batch):
        return self.layers(batch)


def test_a_pooled_network_has_the_map_of_cam():
    torch.manual_seed(0)
    model, batch, targets = Pooled().eval(), images(), [0, 1, 3]
    with torch.no_grad():
        features, weight = model.features(batch), model.head.weight - model.head.weight.mean(dim=0)
        expected = torch.einsum("bkhw,bk->bhw", features, weight[targets]).clamp_min(0)
    expected = expected / expected.sum(dim=(1, 2), keepdim=True)
    torch.testing.assert_close(mapped(model, "pooled", batch, targets), expected)


def test_the_layer_is_one_that_everything_passes_through():
    torch.manual_seed(0)
    maps = ClassMaps(Branches(), "branches")
    maps.probe(images())
    assert maps._call.layer in (maps.model.whole, maps.model.whole[1])


class Deep(Pooled):
    """Its last feature map has 4 x 4 positions, the one before it 8 x 8."""

    def __init__(self):
        super().__init__()
        self.last = nn.Conv2d(12, 12, 3, 2, 1)

    def forward(self, batch):
        return self.head(self.last(self.features(batch)).relu().mean(dim=(2, 3)))


class Narrow(Deep):
    """All of its feature maps have 4 x 4 positions."""

    def __init__(self):
        super().__init__()
        self.features[0] = nn.Conv2d(3, 8, 8, 8)
        self.features[2] = nn.Conv2d(8, 12, 3, 1, 1)
        self.last = nn.Conv2d(12, 12, 3, 1, 1)


@pytest.mark.parametrize(("network", "side"), [(Deep, 8), (Narrow, 4), (Pooled, 8)])
def test_a_coarse_last_feature_map_is_left_for_a_finer_one(network, side):
    assert mapped(network(), network.__name__, images(), [0, 1, 2]).shape == (3, side, side)


class Mixed(Pooled):
    """Behind its feature map every position is a sum of all, on the same grid."""

    def __init__(self):
        super().__init__()
        self.mixing, self.last = nn.Linear(64, 64), nn.ReLU()

    def forward(self, batch):
        features = self.features(batch)
        mixed = self.mixing(features.flatten(2)).unflatten(2, (8, 8))
        return self.head(self.last(mixed).mean(dim=(2, 3)))


class Attending(nn.Module):
    """Tokens of a convolution, two layers of attention over all of them, and a linear head on their mean."""

    def __init__(self):
        super().__init__()
        self.tokens = nn.Conv2d(3, 16, 4, 4)
        self.layers = nn.ModuleList(nn.TransformerEncoderLayer(16, 2, 32, batch_first=True) for _ in range(2))
        self.head = nn.Linear(16, 4)

    def forward(self, batch):
        tokens = self.tokens(batch).flatten(2).mT
        for layer in self.layers:
            tokens = layer(tokens)
        return self.head(tokens.mean(dim=1))


@pytest.mark.parametrize("network", [Mixed, Attending])
def test_the_layer_is_one_whose_positions_see_their_own_place(network):
    torch.manual_seed(0)
    maps = ClassMaps(network(), network.__name__)
    maps.probe(images())
    before = maps.model.features if network is Mixed else maps.model.tokens
    assert maps._call.layer in set(before.modules())


def test_a_network_without_positions_is_refused_in_words():
    with pytest.raises(UserError, match=r"flat: no layer with a grid of 4 x 4 positions .* run without --maps"):
        ClassMaps(Flattened(), "flat").probe(images())


def marked(count, seed):
    """Noise with a textured square off the centre, whose stripes are the class; where the square is, bool (N, S, S)."""
    rng = np.random.default_rng(seed)
    pixels = rng.normal(scale=0.5, size=(count, 3, SIDE, SIDE)).astype(np.float32)
    labels = rng.integers(4, size=count)
    stripes = np.sign(np.sin(np.arange(10) * 2.2))
    patterns = [np.tile(stripes, (10, 1)), np.tile(stripes[:, None], (1, 10)), np.ones((10, 10)), -np.ones((10, 10))]
    for image, label in zip(pixels, labels, strict=True):
        top, left = (int(rng.choice([0, 1, 2, 20, 21, 22])) for _ in range(2))
        image[:, top : top + 10, left : left + 10] += 2 * patterns[label]
    return torch.from_numpy(pixels), torch.from_numpy(labels)


def blanked(batch, where):
    """Images with the pixels of a mask (N, S, S) replaced by the mean value."""
    return torch.where(where[:, None], torch.zeros_like(batch), batch)


def test_deleting_what_the_map_shows_costs_more_than_deleting_the_centre():
    """Petsiuk et al. 2018 (RISE), against a centred square of the same area, since objects are often in the middle."""
    torch.manual_seed(0)
    model = Pooled()
    optimizer = torch.optim.Adam(model.parameters(), 0.01)
    batch, labels = marked(256, seed=1)
    for _ in range(60):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(batch), labels).backward()
        optimizer.step()
    model.eval()
    unseen, truth = marked(60, seed=2)
    with torch.no_grad():
        assert float((model(unseen).argmax(dim=1) == truth).float().mean()) > 0.8
    maps = mapped(model, "pooled", unseen, truth.tolist())
    large = nn.functional.interpolate(maps[:, None], size=(SIDE, SIDE), mode="bilinear", align_corners=False)[:, 0]
    area = 196  # of 1,024 pixels
    threshold = large.flatten(1).topk(area, dim=1).values[:, -1]
    shown = large >= threshold[:, None, None]
    centred = torch.zeros_like(shown)
    centred[:, 9:23, 9:23] = True
    with torch.no_grad():
        chances = [
            torch.softmax(model(blanked(unseen, where)), dim=1).gather(1, truth[:, None])[:, 0].numpy()
            for where in (shown, centred)
        ]
    interval = paired_interval(chances[1] - chances[0])
    assert interval is not None
    assert interval[0] > 0
