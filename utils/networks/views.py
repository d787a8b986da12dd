"""Test-time augmentation as a module: one network over several views of each image, its logits averaged.

The mean of logits followed by softmax is the normalised geometric mean of the views' probabilities, and a linear head's
mean logits are its logits of the mean embedding. Views are made from prepared images (B, 3, S, S) and have their size,
so that they suit networks that are bound to one size.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from utils.core.errors import UserError

CROP = 0.875  # of the side, that each of the five crops keeps
SCALES = (0.8, 1.25)  # an image within a reflected margin, and the centre of an enlarged one


class ViewAverage(nn.Module):
    """A network whose logits (B, C) are the mean over the views of prepared images (B, 3, S, S).

    `groups` are names of `VIEW_GROUPS`; the image itself is a view too unless `with_original` is false. Raises
    UserError for images of another shape than the square of `side` pixels.
    """

    def __init__(self, network: nn.Module, groups: Sequence[str], side: int, *, with_original: bool = True) -> None:
        super().__init__()
        self.network = network
        self.groups, self.side, self.with_original = tuple(groups), side, with_original
        # By which the memory layout is chosen.
        self.architecture, self.size = (getattr(network, name, None) for name in ("architecture", "size"))

    def views(self, images: Tensor) -> list[Tensor]:
        """The views of images, each (B, 3, S, S)."""
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
        """Mean logits (B, C); the network runs once for each view."""
        return torch.stack([self.network(view) for view in self.views(images)]).mean(dim=0)


def _flip(images: Tensor, side: int) -> list[Tensor]:
    """Mirrored from left to right."""
    return [images.flip(3)]


def _five_crop(images: Tensor, side: int) -> list[Tensor]:
    """The corners and the centre (Krizhevsky et al. 2012), enlarged to the side."""
    crop = max(1, round(CROP * side))
    far, middle = side - crop, (side - crop) // 2
    corners = ((0, 0), (0, far), (far, 0), (far, far), (middle, middle))
    return [_resized(images[:, :, top : top + crop, left : left + crop], side) for top, left in corners]


def _rotations(images: Tensor, side: int) -> list[Tensor]:
    """By 90, 180 and 270 degrees, which need no interpolation."""
    return [images.transpose(2, 3).flip(2), images.flip(2).flip(3), images.transpose(2, 3).flip(3)]


def _multi_scale(images: Tensor, side: int) -> list[Tensor]:
    """Made smaller within a reflected margin, and larger with the margin cut."""
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
