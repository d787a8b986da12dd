"""The fifteen architectures by name, and the functions that create them."""

from __future__ import annotations

import difflib
from collections.abc import Iterable

from timm.layers import get_act_layer
from torch import nn

from models.backbone import Backbone
from models.convolutional import (
    CustomConvNeXt,
    CustomCSPDarkNet,
    CustomDenseNetHybrid,
    CustomDynamicConvNet,
    CustomEfficientNetV4,
    CustomGhostNetV2,
    CustomInceptionV4,
    CustomMobileOne,
    CustomRegNet,
    CustomResNetMish,
)
from models.transformers import CustomCoAtNet, CustomDeiTStyle, CustomMaxViT, CustomSwinTransformer, CustomViTHybrid
from utils import logger

BACKBONE_MAP: dict[str, type[Backbone]] = {
    architecture.__name__: architecture
    for architecture in (
        CustomConvNeXt,
        CustomEfficientNetV4,
        CustomGhostNetV2,
        CustomResNetMish,
        CustomCSPDarkNet,
        CustomInceptionV4,
        CustomViTHybrid,
        CustomSwinTransformer,
        CustomCoAtNet,
        CustomRegNet,
        CustomDenseNetHybrid,
        CustomDeiTStyle,
        CustomMaxViT,
        CustomMobileOne,
        CustomDynamicConvNet,
    )
}

ACTIVATIONS = ("relu", "leaky_relu", "gelu", "silu", "swish", "mish", "hard_swish", "sigmoid", "tanh")


def _unknown_name(kind: str, name: str, names: Iterable[str]) -> ValueError:
    """The error for a name that is not among `names`; it suggests the closest name and lists all."""
    by_lower_case = {candidate.lower(): candidate for candidate in names}
    nearest = difflib.get_close_matches(str(name).lower(), by_lower_case, n=1, cutoff=0.5)
    hint = f"; did you mean {by_lower_case[nearest[0]]!r}?" if nearest else "."
    return ValueError(f"unknown {kind} {name!r}{hint} Known: {', '.join(by_lower_case.values())}")


def get_activation_fn(name: str = "relu") -> nn.Module:
    """Create an activation module by its name in `ACTIVATIONS`. Raises ValueError for an unknown name."""
    if name not in ACTIVATIONS:
        raise _unknown_name("activation", name, ACTIVATIONS)
    return get_act_layer(name)()


def create_custom_backbone(
    name: str, num_classes: int = 1000, *, size: str | None = None, img_size: int | None = None
) -> Backbone:
    """Create a randomly initialised network by name: `(B, 3, H, W)` -> logits `(B, num_classes)`.

    `size` is "full" or "tiny", `img_size` in pixels; None uses the setting. To load a checkpoint, pass the values it
    was trained with. Raises ValueError for an unknown name or size, and for an unsupported image size.
    """
    if name not in BACKBONE_MAP:
        raise _unknown_name("backbone", name, BACKBONE_MAP)
    return BACKBONE_MAP[name](num_classes, size=size, img_size=img_size)


class SafeFactory:
    """`create_custom_backbone` that logs exceptions and returns None instead; `last_error` holds the message."""

    def __init__(self) -> None:
        self.last_error: str | None = None

    def __call__(
        self, name: str, num_classes: int = 1000, *, size: str | None = None, img_size: int | None = None
    ) -> Backbone | None:
        """A new network, or None if it cannot be built; `last_error` is the error message, or None on success."""
        self.last_error = None
        try:
            return create_custom_backbone(name, num_classes, size=size, img_size=img_size)
        except Exception as error:
            self.last_error = f"{type(error).__name__}: {error}"
            logger.error(f"Could not build {name}: {self.last_error}")
            return None


create_custom_backbone_safe = SafeFactory()
