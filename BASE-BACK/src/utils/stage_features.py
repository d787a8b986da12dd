"""timm classifiers whose linear head uses the activations of every stage, not only the last embedding.

The architecture `ARCH+stages` is timm's network ARCH with this head. Early stages describe colour and texture, which
the last embedding of a network trained on objects discards (Evci, Dumoulin, Larochelle, Mozer 2022, "Head2Toe:
Utilizing intermediate representations for better transfer learning"). Reads no settings.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

SUFFIX = "+stages"
LEAST_VARIANCE = 1e-12  # lower bound that keeps the derivative of the square root finite


def timm_name(architecture: str) -> str:
    """timm's name of an architecture: `resnet18` for `resnet18` and for `resnet18+stages`."""
    return architecture.removesuffix(SUFFIX)


def create_timm(name: str, num_classes: int, img_size: int) -> nn.Module:
    """Build a timm network with random weights; `img_size` is passed to networks with a fixed input size.

    Raises timm's errors if it cannot be built: TypeError, ValueError, RuntimeError or AssertionError.
    """
    import timm

    defaults = timm.get_pretrained_cfg(name)
    is_fixed = defaults is not None and defaults.fixed_input_size and defaults.input_size[-1] != img_size
    options: dict[str, Any] = {"img_size": img_size} if is_fixed else {}
    network: nn.Module = timm.create_model(name, pretrained=False, num_classes=num_classes, **options)
    return network


class StageFeatures(nn.Module):
    """A timm network, `trunk`, and a linear layer, `head`, on the mean and standard deviation of each channel.

    Both are computed over all positions of the output of each stage of the trunk. The methods are those of timm
    classifiers. Raises ValueError for a trunk that does not expose the outputs of at least two stages.
    """

    def __init__(self, trunk: Any, num_classes: int, img_size: int) -> None:
        super().__init__()
        name = type(trunk).__name__
        if not hasattr(trunk, "forward_intermediates"):
            raise ValueError(f"{name}: timm gives no outputs of its stages; name the architecture without {SUFFIX}")
        trunk.reset_classifier(0)
        self.trunk = trunk
        self.num_classes = num_classes
        was_training = trunk.training
        trunk.eval()
        with torch.no_grad():
            features = self.forward_features(torch.zeros(1, 3, img_size, img_size))
        trunk.train(was_training)
        self.num_features = features.shape[1]
        self.head = nn.Linear(self.num_features, num_classes)

    def forward_features(self, images: Tensor) -> Tensor:
        """Normalised images (B, 3, S, S) -> mean and standard deviation of every channel of every stage, (B, D)."""
        parts = []
        for activations in self.trunk.forward_intermediates(images, intermediates_only=True):
            variance, mean = torch.var_mean(activations, dim=(2, 3), correction=0)
            parts += [mean, variance.clamp_min(LEAST_VARIANCE).sqrt()]
        return torch.cat(parts, dim=1)

    def forward_head(self, features: Tensor, pre_logits: bool = False) -> Tensor:
        """Features (B, D) -> logits (B, C); with `pre_logits`, the features, which are the embedding."""
        if pre_logits:
            return features
        logits: Tensor = self.head(features)
        return logits

    def forward(self, images: Tensor) -> Tensor:
        """Normalised images (B, 3, S, S) -> logits (B, C)."""
        return self.forward_head(self.forward_features(images))

    def get_classifier(self) -> nn.Linear:
        """The linear head."""
        return self.head
