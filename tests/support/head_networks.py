"""Shared by tests: small networks whose logits come from one head, two, a stack or none, and a factory for them."""

from __future__ import annotations

from pathlib import Path

import torch
from preprocessings import BASE_32
from torch import nn

from utils.networks.construction import NetworkSpec, build_network

CLASSES = ("a", "b", "c", "d", "e")


class Foreign(nn.Module):
    """A network as the public base pipeline makes them: no timm method, an integer buffer, a stack as its head."""

    def __init__(self, num_classes: int = 1000) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 6, 4, stride=4)
        self.register_buffer("index", torch.arange(6))
        self.head = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Dropout(), nn.Linear(8, num_classes))

    def features(self, x):
        return self.stem(x).mean((2, 3))[:, self.index]

    def forward(self, x):
        return self.head(self.features(x))


class TwoHeads(Foreign):
    """Two heads whose logits are averaged."""

    def __init__(self, num_classes: int = 1000) -> None:
        super().__init__(num_classes)
        self.head, self.head_dist = nn.Linear(6, num_classes), nn.Linear(6, num_classes)

    def forward(self, x):
        return (self.head(self.features(x)) + self.head_dist(self.features(x).tanh())) / 2


class Bottleneck(Foreign):
    """An earlier layer has as many outputs as there are classes, and one that does not matter comes last."""

    def __init__(self, num_classes: int = 1000) -> None:
        super().__init__(num_classes)
        self.squeeze = nn.Linear(6, num_classes)
        self.head = nn.Linear(num_classes, num_classes)
        self.auxiliary = nn.Linear(6, num_classes)

    def forward(self, x):
        logits = self.head(self.squeeze(self.features(x)).relu())
        self.auxiliary(self.features(x))
        return logits


class Shared(Foreign):
    """One head, called on two views and averaged."""

    def __init__(self, num_classes: int = 1000) -> None:
        super().__init__(num_classes)
        self.head = nn.Linear(6, num_classes)

    def forward(self, x):
        return (self.head(self.features(x)) + self.head(self.features(x.flip(3) ** 2))) / 2


class Hidden(Foreign):
    """The logits are scaled after the last layer, so no linear map of its input gives them."""

    def forward(self, x):
        return super().forward(x) * 3


class Methods(Foreign):
    """Has timm's method names, but its forward pass goes another way."""

    def forward_features(self, x):
        return self.features(x)

    def forward_head(self, x, pre_logits=False):
        return x if pre_logits else self.head(x)

    def get_classifier(self):
        return self.head[-1]


NETWORKS = {kind.__name__: kind for kind in (Foreign, TwoHeads, Bottleneck, Shared, Hidden, Methods)}


def factory(name, num_classes=1000):
    """Without size and image size, as upstream's."""
    return NETWORKS[name](num_classes) if name in NETWORKS else None


def spec(name, classes=CLASSES, **options):
    return NetworkSpec(name, Path(f"{name}_final.pth"), "full", BASE_32, classes, **options)


def built_network(name, outputs=5):
    torch.manual_seed(0)
    return build_network(spec(name), NETWORKS[name](outputs).state_dict(), factory)
