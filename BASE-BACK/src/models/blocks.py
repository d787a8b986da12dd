"""Building blocks that timm lacks, and a network composed of them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from timm.layers import ConvNormAct
from torch import nn


class PooledNetwork(nn.Module):
    """A stack of convolutional blocks, global average pooling and a linear classifier, with timm's method names.

    `(B, 3, H, W)` -> logits `(B, num_classes)`.
    """

    def __init__(self, features: nn.Sequential, num_features: int, num_classes: int) -> None:
        super().__init__()
        self.features = features
        self.head_hidden_size = num_features
        self.fc = nn.Linear(num_features, num_classes)

    def forward_features(self, x: torch.Tensor) -> torch.Tensor:
        """`(B, 3, H, W)` -> feature map `(B, num_features, h, w)`."""
        return self.features(x)

    def forward_head(self, x: torch.Tensor, pre_logits: bool = False) -> torch.Tensor:
        """Feature map -> logits, or with `pre_logits` the pooled embedding `(B, num_features)`."""
        x = x.mean(dim=(2, 3))
        return x if pre_logits else self.fc(x)

    def get_classifier(self) -> nn.Linear:
        """The linear classifier."""
        return self.fc

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """`(B, 3, H, W)` -> logits `(B, num_classes)`."""
        return self.forward_head(self.forward_features(x))


def scaled_conv(width: float, act_layer: str) -> Callable[..., ConvNormAct]:
    """Factory of convolution, BatchNorm and activation whose channel counts are `width` times the requested ones.

    timm's inception blocks hard-code the channels of the paper; passing this factory to them gives narrower blocks.
    All of these channels are multiples of 32, so a `width` in steps of 1/32 is exact.
    """

    def conv(in_channels: int, out_channels: int, padding: int | tuple[int, int] = 0, **kwargs: Any) -> ConvNormAct:
        return ConvNormAct(
            round(in_channels * width),
            round(out_channels * width),
            padding=padding,
            act_layer=act_layer,
            act_kwargs={"inplace": True},
            **kwargs,
        )

    return conv


class RoutedConv2d(nn.Module):
    """Sum of expert convolutions, weighted per image by a routing function: `(B, I, H, W)` -> `(B, O, h, w)`.

    `y = sum_e r_e(x) * conv_e(x)` with `r(x) = sigmoid(linear(mean of x over H and W))`. A convolution is linear in
    its kernel, so this equals one convolution with the per-image kernel `sum_e r_e(x) W_e` (CondConv, Yang et al.
    2019). Unlike that form it needs no grouped convolution over the batch, so a trace keeps a dynamic batch size.
    """

    def __init__(
        self, in_channels: int, out_channels: int, *, kernel_size: int = 3, stride: int = 1, experts: int = 4
    ) -> None:
        super().__init__()
        self.num_experts = experts
        self.out_channels = out_channels
        self.router = nn.Linear(in_channels, experts)
        # The experts are concatenated along the output channels, so that one call computes them all.
        self.experts = nn.Conv2d(
            in_channels, experts * out_channels, kernel_size, stride, padding=kernel_size // 2, bias=False
        )

    def routing(self, x: torch.Tensor) -> torch.Tensor:
        """Weights of the experts in (0, 1): `(B, I, H, W)` -> `(B, experts)`."""
        return torch.sigmoid(self.router(x.mean(dim=(2, 3))))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """`(B, I, H, W)` -> `(B, O, h, w)`."""
        weights = self.routing(x)[:, :, None, None, None]
        outputs = self.experts(x).unflatten(1, (self.num_experts, self.out_channels))
        return (weights * outputs).sum(dim=1)


class RoutedBlock(nn.Module):
    """Residual block of two routed convolutions with BatchNorm: `(B, I, H, W)` -> `(B, O, h, w)`."""

    def __init__(
        self, in_channels: int, out_channels: int, *, stride: int, experts: int, act_layer: Callable[[], nn.Module]
    ) -> None:
        super().__init__()
        self.conv1 = RoutedConv2d(in_channels, out_channels, stride=stride, experts=experts)
        self.bn1 = nn.BatchNorm2d(out_channels)
        self.act1 = act_layer()
        self.conv2 = RoutedConv2d(out_channels, out_channels, experts=experts)
        self.bn2 = nn.BatchNorm2d(out_channels)
        self.act2 = act_layer()
        if stride == 1 and in_channels == out_channels:
            self.shortcut: nn.Module = nn.Identity()
        else:
            self.shortcut = ConvNormAct(in_channels, out_channels, 1, stride=stride, apply_act=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """`(B, I, H, W)` -> `(B, O, h, w)`."""
        y = self.act1(self.bn1(self.conv1(x)))
        y = self.bn2(self.conv2(y))
        return self.act2(y + self.shortcut(x))


class DistilledClassifier(nn.Module):
    """Two linear heads, one for the class token and one for the distillation token; their logits are averaged.

    `(B, 2 D)`, the concatenated tokens -> logits `(B, num_classes)` (DeiT, Touvron et al. 2021).
    """

    def __init__(self, token_features: int, num_classes: int) -> None:
        super().__init__()
        self.token_features = token_features
        self.head = nn.Linear(token_features, num_classes)
        self.head_dist = nn.Linear(token_features, num_classes)

    def forward(self, embedding: torch.Tensor) -> torch.Tensor:
        """`(B, 2 D)` -> `(B, num_classes)`."""
        class_token, distillation_token = embedding.split(self.token_features, dim=1)
        return (self.head(class_token) + self.head_dist(distillation_token)) / 2
