"""The base class of the fifteen architectures: sizes, image sizes and their interface."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar, NamedTuple

import torch
from torch import nn

DEFAULT_IMG_SIZE = {"full": 224, "tiny": 32}


class ImageRule(NamedTuple):
    """Image sizes that a network accepts: at least `minimum` pixels and a multiple of `step`."""

    minimum: int
    step: int = 1

    def allows(self, img_size: int) -> bool:
        """Whether a square image with sides of `img_size` pixels is accepted."""
        return img_size >= self.minimum and img_size % self.step == 0

    def __str__(self) -> str:
        return f"{self.minimum} or more" + (f", in steps of {self.step}" if self.step > 1 else "")


def resolve_sizes(size: str | None, img_size: int | None) -> tuple[str, int]:
    """Replace None by the settings: `size` by MODEL_SIZE, `img_size` by IMG_SIZE.

    IMG_SIZE applies only to MODEL_SIZE: for the other size, its default is used (224 or 32 pixels).
    Raises ValueError for an unknown size or an image size that is not a positive integer.
    """
    if size is None or img_size is None:
        from config import settings

        setting = settings.MODEL_SIZE
        size = setting if size is None else size
        if img_size is None:
            img_size = settings.IMG_SIZE if size == setting else DEFAULT_IMG_SIZE.get(size)
    if size not in DEFAULT_IMG_SIZE:
        raise ValueError(f"unknown model size {size!r}: expected one of {', '.join(DEFAULT_IMG_SIZE)}")
    if isinstance(img_size, bool) or not isinstance(img_size, int) or img_size < 1:
        raise ValueError(f"img_size must be a positive integer of pixels, found {img_size!r}")
    return size, img_size


class Backbone(nn.Module):
    """An image classifier: `(B, 3, H, W)` normalised float32 -> logits `(B, num_classes)` in train and eval mode.

    A subclass defines the keyword arguments of both sizes (`plans`), the image sizes they accept (`image_rules`) and
    `build`; with `fixed_img_size`, images must have exactly `img_size` pixels. In every subclass,
    `get_classifier()(forward_head(f, pre_logits=True))` equals `forward_head(f)`.
    Attributes: `architecture` (the class name), `size` ("full" or "tiny"), `img_size` (pixels), `num_classes`,
    `num_features` (width of the embedding).
    Raises ValueError for an unsupported size, image size or number of classes.
    """

    plans: ClassVar[dict[str, dict[str, Any]]]
    image_rules: ClassVar[dict[str, ImageRule]]
    build: Callable[..., nn.Module]
    """Builds the network of one size, with timm's `forward_features`, `forward_head` and `get_classifier`."""
    fixed_img_size: ClassVar[bool] = False

    def __init__(self, num_classes: int = 1000, *, size: str | None = None, img_size: int | None = None) -> None:
        super().__init__()
        if isinstance(num_classes, bool) or not isinstance(num_classes, int) or num_classes < 1:
            raise ValueError(f"num_classes must be a positive integer, found {num_classes!r}")
        self.architecture = type(self).__name__
        self.num_classes = num_classes
        self.size, self.img_size = resolve_sizes(size, img_size)
        rule = self.image_rules[self.size]
        if not rule.allows(self.img_size):
            raise ValueError(
                f"img_size={self.img_size} does not fit {self.architecture} in size {self.size!r}: "
                f"allowed are {rule} pixels"
            )
        network: Any = self.build(**self.plans[self.size])
        self.network = network
        self.num_features: int = network.head_hidden_size
        for module in network.modules():
            # Fused attention needs ONNX opset 14 and is no faster with so few tokens.
            if hasattr(module, "fused_attn"):
                module.fused_attn = False

    def forward_features(self, x: torch.Tensor) -> torch.Tensor:
        """`(B, 3, H, W)` -> the last feature map or token sequence, before pooling.

        Raises ValueError when a network built for one image size receives another.
        """
        # Not while tracing, where sizes are tensors and a comparison emits a warning.
        if self.fixed_img_size and not torch.jit.is_tracing() and x.shape[2:] != (self.img_size, self.img_size):
            raise ValueError(
                f"{self.architecture} was built for img_size={self.img_size}, found images of {tuple(x.shape[2:])} "
                "pixels; resize them or build it with their img_size"
            )
        features: torch.Tensor = self.network.forward_features(x)
        return features

    def forward_head(self, features: torch.Tensor, pre_logits: bool = False) -> torch.Tensor:
        """Features -> logits `(B, num_classes)`, or with `pre_logits` the embedding `(B, num_features)`."""
        outputs: torch.Tensor = self.network.forward_head(features, pre_logits=pre_logits)
        return outputs

    def get_classifier(self) -> nn.Module:
        """The module that maps the embedding `(B, num_features)` to the logits."""
        classifier: nn.Module = self.network.get_classifier()
        return classifier

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """`(B, 3, H, W)` -> logits `(B, num_classes)`."""
        return self.forward_head(self.forward_features(x))
