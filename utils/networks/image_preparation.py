"""Preprocessing inside an exported network: normalisation of resized images, or all steps from decoded pixels.

Images are float32 (B, 3, S, S) in [0, 1], resized by the member's rule, or decoded uint8 (B, H, W, 3) of any size. In a
trace, the batch size and the height and width of uint8 images stay dynamic.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import cache
from typing import Any

import PIL
import torch
from torch import Tensor, nn

from utils import base_back
from utils.networks.preprocessing import Preprocessing

TALL_FIRST = (
    13  # Pillow release from which columns are resampled first if the height shrinks by more than twice the width
)
BITS = 22  # precision of the fixed-point weights with which Pillow resamples 8-bit images


def _triangle(distance: Tensor) -> Tensor:
    return torch.clamp(1.0 - distance.abs(), min=0.0)


def _cubic(distance: Tensor) -> Tensor:
    """Cubic convolution of Keys (1981) with a = -1/2."""
    x = distance.abs()
    inner = (1.5 * x - 2.5) * x * x + 1.0
    outer = (((x - 5.0) * x + 8.0) * x - 4.0) * -0.5
    return torch.where(x < 1.0, inner, torch.where(x < 2.0, outer, torch.zeros_like(x)))


def _sinc(distance: Tensor) -> Tensor:
    x = distance * math.pi
    return torch.where(x == 0.0, torch.ones_like(x), torch.sin(x) / torch.where(x == 0.0, torch.ones_like(x), x))


def _hamming(distance: Tensor) -> Tensor:
    window = 0.54 + 0.46 * torch.cos(distance * math.pi)
    return torch.where(distance.abs() < 1.0, _sinc(distance) * window, torch.zeros_like(distance))


def _lanczos(distance: Tensor) -> Tensor:
    return torch.where(distance.abs() < 3.0, _sinc(distance) * _sinc(distance / 3.0), torch.zeros_like(distance))


KERNELS: dict[str, Callable[[Tensor], Tensor]] = {
    "bilinear": _triangle,
    "bicubic": _cubic,
    "hamming": _hamming,
    "lanczos": _lanczos,
}
"""Pillow's interpolation -> weight of a pixel by its distance, in pixels of the smaller image.

`box` is missing: whether a pixel on its edge is included depends on the last bit.
"""


def resampling_problem(preprocessing: Preprocessing) -> str | None:
    """The reason why an exported network cannot resize decoded images by this rule; None if it can."""
    if preprocessing.resize == "pad":
        return "pads images"
    if preprocessing.interpolation not in KERNELS:
        return f"resizes by {preprocessing.interpolation} interpolation"
    if preprocessing.resized < preprocessing.input_size:
        return "crops a square larger than the resized image"
    return None


class Preparation(nn.Module):
    """Raw images -> normalised squares (B, 3, S, S), bit-identical to the member's evaluation transform.

    uint8 images are resampled like in the Pillow release that is installed when the network is built: with 22-bit
    weights along the rows, then along the columns (from release 13 on in the other order for some tall images), rounded
    to 8 bits after each; float64 represents all of this exactly. Without `resizes`, images must have their final size.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, preprocessing: Preprocessing, *, takes_uint8: bool, resizes: bool = True) -> None:
        super().__init__()
        self.preprocessing, self.takes_uint8, self.resizes = preprocessing, takes_uint8, resizes
        self.tall_first = int(PIL.__version__.partition(".")[0]) >= TALL_FIRST
        self.register_buffer("mean", torch.tensor(preprocessing.mean).view(1, 3, 1, 1))
        self.register_buffer("std", torch.tensor(preprocessing.std).view(1, 3, 1, 1))

    def forward(self, images: Tensor) -> Tensor:
        """Raw images -> (B, 3, S, S)."""
        if self.takes_uint8:
            planes = images.permute(0, 3, 1, 2)
            pixels = self._resize_and_crop(planes.double()).float() if self.resizes else planes.float()
            images = pixels / 255
        if self.preprocessing.channels == "BGR":
            images = images.flip(1)
        low, high = self.preprocessing.value_range
        if (low, high) != (0, 1):
            images = images * (high - low) + low
        return (images - self.mean) / self.std

    def _resize_and_crop(self, planes: Tensor) -> Tensor:
        """Resize (B, 3, H, W) in float64 and crop the centre: integers (B, 3, S, S)."""
        shape = torch._shape_as_tensor(planes)  # a tensor, so that a trace keeps sizes dynamic
        height, width = shape[2:3], shape[3:4]
        side = self.preprocessing.resized
        if self.preprocessing.resize == "squash":
            tall, wide = torch.full_like(height, side), torch.full_like(width, side)
        else:
            short = torch.minimum(height, width)
            tall, wide = side * height // short, side * width // short
        rows = self._weights(planes[0, 0, :, 0], height, tall)
        columns = self._weights(planes[0, 0, 0, :], width, wide).transpose(0, 1)
        if not self.tall_first:
            return _rounded(rows @ _rounded(planes @ columns))
        removed_rows, removed_columns = height - tall, width - wide
        return _by_the_shorter_way()(planes, rows, columns, (removed_rows > 0) & (removed_rows > 2 * removed_columns))

    def _weights(self, line: Tensor, length: Tensor, resized: Tensor) -> Tensor:
        """Weights (S, length) that resize a `line` of pixels (length,) and crop its centre.

        `length` and `resized` have the shape (1,): the ONNX exporter converts double scalars to floats.
        """
        size = self.preprocessing.input_size
        margin = resized - size
        start = margin // 2
        if self.preprocessing.crop_offset == "round":  # like Python, halves to even
            start = start + (margin % 2) * (margin // 2 % 2)
        scale = length.double() / resized.double()
        support = torch.clamp(scale, min=1.0)
        crop = torch.arange(size, dtype=torch.float64) + 0.5
        centre = (crop + start.double()) * scale
        pixels = torch.cumsum(torch.ones_like(line), 0) - 1.0
        distance = (pixels[None] - centre[:, None] + 0.5) * torch.reciprocal(support)
        weights = KERNELS[self.preprocessing.interpolation](distance)
        weights = weights / weights.sum(dim=1, keepdim=True)
        return torch.floor(0.5 + weights * 2.0**BITS)


def _rounded(sums: Tensor) -> Tensor:
    """Sums of pixels times 22-bit weights -> integers from 0 to 255."""
    return torch.clamp(torch.floor((sums + 2.0 ** (BITS - 1)) / 2.0**BITS), 0.0, 255.0)


@cache
def _by_the_shorter_way() -> Any:
    """The two passes in either order, as a scripted function, so that tracing keeps its branch."""
    with base_back.load_bundled("torchscript").torchscript_without_notices():
        return torch.jit.script(_passes)


def _passes(planes: Tensor, rows: Tensor, columns: Tensor, tall: Tensor) -> Tensor:
    half, one = 2097152.0, 4194304.0  # 2 ** (BITS - 1) and 2 ** BITS
    if bool(tall):
        down = torch.clamp(torch.floor((torch.matmul(rows, planes) + half) / one), 0.0, 255.0)
        return torch.clamp(torch.floor((torch.matmul(down, columns) + half) / one), 0.0, 255.0)
    across = torch.clamp(torch.floor((torch.matmul(planes, columns) + half) / one), 0.0, 255.0)
    return torch.clamp(torch.floor((torch.matmul(rows, across) + half) / one), 0.0, 255.0)
