"""Small networks of given widths, exported together with a combiner."""

from __future__ import annotations

import torch
from combiner_cases import C
from torch import nn

SIDE, N = 8, 70


WIDTHS = (5, 8, 4, 6)


class Small(nn.Module):
    """A network with timm's method names, its embedding of a width of its own."""

    def __init__(self, seed: int, width: int) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.convolution = nn.Conv2d(3, width, 3, stride=2)
        self.classifier = nn.Linear(width, C)
        nn.init.normal_(self.classifier.weight, std=4.0)

    def forward_features(self, images):
        return torch.relu(self.convolution(images))

    def forward_head(self, features, pre_logits=False):
        embedding = features.mean(dim=(2, 3))
        return embedding if pre_logits else self.classifier(embedding)

    def get_classifier(self):
        return self.classifier

    def forward(self, images):
        return self.forward_head(self.forward_features(images))
