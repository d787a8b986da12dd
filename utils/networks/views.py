"""Test-time augmentation as a module: a network whose logits are averaged over several views of each image.

Softmax of mean logits is the normalised geometric mean of the views' probabilities, and a linear head's mean logits are
its logits of the mean embedding. Views are computed from preprocessed images (B, 3, S, S) and keep their size, as
networks with a fixed input size require.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from utils.core.errors import UserError

CROP = 0.875  # side of each of the five crops, relative to the image's
SCALES = (0.8, 1.25)  # a reduced image with reflection padding, and the centre of an enlarged one


class ViewAverage(nn.Module):
    """A network whose logits (B, C) are the mean over the views of preprocessed images (B, 3, S, S).

    `groups` are names of `VIEW_GROUPS`; the image itself is a view too unless `with_original` is false. Raises
    UserError for images that are not squares of `side` pixels.
    """

    def __init__(self, network: nn.Module, groups: Sequence[str], side: int, *, with_original: bool = True) -> None:
        super().__init__()
        self.network = network
        self.groups, self.side, self.with_original = tuple(groups), side, with_original
        # They determine the memory layout.
        self.architecture, self.size = (getattr(network, name, None) for name in ("architecture", "size"))

    def views(self, images: Tensor) -> list[Tensor]:
        """The views of images (B, 3, S, S), each (B, 3, S, S)."""
        if not torch.jit.is_tracing() and images.shape[2:] != (self.side, self.side):
            height, width = images.shape[2:]
            raise UserError(
                f"test-time augmentation: images of {height} x {width} pixels; the views {', '.join(self.groups)} are "
                f"made of squares of {self.side} pixels. Leave them out: --set tta.enable=false"
            )
        views = [images] if self.with_original else []
        for group in self.groups:
            views += VIEW_GROUPS[group](images, self.side)
        return views

    def forward(self, images: Tensor) -> Tensor:
        """Mean logits (B, C); the network runs once per view."""
        return torch.stack([self.network(view) for view in self.views(images)]).mean(dim=0)


def _flip(images: Tensor, side: int) -> list[Tensor]:
    """Horizontal flip."""
    return [images.flip(3)]


def _five_crop(images: Tensor, side: int) -> list[Tensor]:
    """Corner and centre crops (Krizhevsky et al. 2012), enlarged to the side."""
    crop = max(1, round(CROP * side))
    far, middle = side - crop, (side - crop) // 2
    corners = ((0, 0), (0, far), (far, 0), (far, far), (middle, middle))
    return [_resized(images[:, :, top : top + crop, left : left + crop], side) for top, left in corners]


def _rotations(images: Tensor, side: int) -> list[Tensor]:
    """Rotations by 90, 180 and 270 degrees, which need no interpolation."""
    return [images.transpose(2, 3).flip(2), images.flip(2).flip(3), images.transpose(2, 3).flip(3)]


def _multi_scale(images: Tensor, side: int) -> list[Tensor]:
    """A reduced image with reflection padding, and the centre of an enlarged image."""
    small, large = (max(1, round(scale * side)) for scale in SCALES)
    before = (side - small) // 2
    after = side - small - before
    reduced = F.pad(_resized(images, small), (before, after, before, after), mode="reflect")
    start = (large - side) // 2
    return [reduced, _resized(images, large)[:, :, start : start + side, start : start + side]]


def _resized(images: Tensor, side: int) -> Tensor:
    return F.interpolate(images, size=(side, side), mode="bilinear", align_corners=False)


VIEW_GROUPS: dict[str, Callable[[Tensor, int], list[Tensor]]] = {
    "flip": _flip,
    "five_crop": _five_crop,
    "rotations": _rotations,
    "multi_scale": _multi_scale,
}
"""{name of a group: its views of images (B, 3, S, S) for a side S}"""
