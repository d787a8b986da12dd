"""The training transform on batches of tensors: one affine warp, colour jitter and erasing, sampled per image.

The distribution is that of `create_optimized_transforms(is_training=True)`; working on decoded pixels saves decoding
and a dozen image objects per image and epoch, and needs no loader processes. Parameters are sampled on the CPU, so that
they do not depend on the device; a GPU receives uint8 pixels and computes the transform of the whole batch.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

MEAN = (0.485, 0.456, 0.406)
STD = (0.229, 0.224, 0.225)
KINDS = ("full", "no_flip", "none")


def normalise(pixels: Tensor) -> Tensor:
    """uint8 or float 0-255 pixels (B, 3, H, W) -> float32, normalised by ImageNet's mean and standard deviation."""
    return _standardise(pixels.float() / 255)


def _standardise(pixels: Tensor) -> Tensor:
    """Normalise pixels in 0-1 by ImageNet's mean and standard deviation, in place."""
    mean, std = (copied(torch.tensor(values), pixels.device).view(1, 3, 1, 1) for values in (MEAN, STD))
    return pixels.sub_(mean).div_(std)


def copied(values: Tensor, device: torch.device | str) -> Tensor:
    """Tensor of the CPU on a device; a GPU copies it from pinned memory, without waiting for its computations."""
    if torch.device(device).type == "cuda":
        values = values.pin_memory()
    return values.to(device, non_blocking=True)


@dataclass(frozen=True)
class Normalisation:
    """The normalisation of a preprocessing record."""

    mean: tuple[float, ...]
    """(R, G, B), for values from 0 to 1."""
    std: tuple[float, ...]
    is_bgr: bool = False
    """Whether the channel order of the network is BGR."""

    @classmethod
    def of_record(cls, record: Mapping[str, Any]) -> Normalisation:
        """The normalisation of a preprocessing record, with its value range and channel order."""
        low, high = record["value_range"]
        mean = [(value - low) / (high - low) for value in record["mean"]]
        std = [value / (high - low) for value in record["std"]]
        step = -1 if record["channels"] == "BGR" else 1
        return cls(tuple(mean[::step]), tuple(std[::step]), step == -1)

    def apply(self, pixels: Tensor) -> Tensor:
        """uint8 or float 0-255 RGB pixels (B, 3, H, W) -> normalised float32."""
        mean, std = (copied(torch.tensor(each), pixels.device).view(1, 3, 1, 1) for each in (self.mean, self.std))
        return self._ordered((pixels.float() / 255).sub_(mean).div_(std))

    def replace_imagenet(self, images: Tensor) -> Tensor:
        """RGB images (B, 3, H, W) normalised by ImageNet's mean and deviation -> normalised by this one, float32."""
        old_mean, old_std = torch.tensor(MEAN), torch.tensor(STD)
        mean, std = torch.tensor(self.mean), torch.tensor(self.std)
        factor, shift = old_std / std, (old_mean - mean) / std
        factor, shift = (copied(values, images.device).view(1, 3, 1, 1) for values in (factor, shift))
        return self._ordered(images * factor + shift)

    def _ordered(self, images: Tensor) -> Tensor:
        return images.flip(1) if self.is_bgr else images


@dataclass(frozen=True)
class Views:
    """Sampled augmentation parameters of N images, independent of the output size."""

    warps: Tensor
    """(N, 2, 3), affine maps from output to input coordinates, both from -1 to 1"""
    factors: Tensor
    """(N, 3), factors of brightness, contrast and saturation"""
    hues: Tensor
    """(N,), hue rotations in radians"""
    erased: Tensor
    """(N, 5): whether a rectangle is erased (0 or 1), its share of the area, its aspect ratio, and its vertical and
    horizontal position in 0-1"""

    def take(self, rows: Tensor) -> Views:
        """The parameters of the images at indices `rows` (B,)."""
        return Views(*(getattr(self, field.name)[rows] for field in fields(self)))

    @classmethod
    def joined(cls, parts: Sequence[Views]) -> Views:
        """Concatenate along the images."""
        return cls(*(torch.cat([getattr(part, field.name) for part in parts]) for field in fields(cls)))


def draw_views(heights: Tensor, widths: Tensor, kind: str, generator: torch.Generator) -> Views:
    """Sample views of images with float32 heights and widths (N,); kind: `full` or `no_flip`."""
    count = len(heights)
    warps = _warps(heights, widths, kind, generator)
    factors = torch.stack([_uniform(count, 0.8, 1.2, generator) for _ in range(3)], dim=1)
    hues = _uniform(count, -0.05 * 2 * math.pi, 0.05 * 2 * math.pi, generator)
    is_erased = (torch.rand(count, generator=generator) < 0.15).float()
    shapes = [_uniform(count, 0.02, 0.33, generator), _uniform(count, math.log(0.3), math.log(3.3), generator).exp()]
    positions = [torch.rand(count, generator=generator) for _ in range(2)]
    return Views(warps, factors, hues, torch.stack([is_erased, *shapes, *positions], dim=1))


def augment(
    images: list[Tensor], size: int, kind: str, generator: torch.Generator, device: torch.device | str = "cpu"
) -> Tensor:
    """uint8 images, each (3, h, w) of its own shape -> normalised float32 batch (B, 3, size, size) on `device`.

    kind: `full`, `no_flip` (for characters and digits, which must not be flipped) or `none` (centre crop only). All
    random numbers come from `generator`.
    """
    if kind == "none":
        return show(images, size, None, device)
    heights, widths = (torch.tensor([image.shape[side] for image in images], dtype=torch.float32) for side in (1, 2))
    return show(images, size, draw_views(heights, widths, kind, generator), device)


def show(images: list[Tensor], size: int, views: Views | None, device: torch.device | str = "cpu") -> Tensor:
    """Apply `views` to uint8 images, each (3, h, w) of its own shape -> normalised float32 (B, 3, size, size).

    Images and views are on the CPU, the result on `device`. Without views, return the centre crops of the evaluation
    transform.
    """
    if views is None:
        return normalise(copied(torch.stack([_centre(image, size) for image in images]), device))
    return _standardise(shown(images, size, views, device))


def shown(images: list[Tensor], size: int, views: Views, device: torch.device | str = "cpu") -> Tensor:
    """Apply `views` to uint8 images, each (3, h, w) of its own shape -> float32 (B, 3, size, size) in 0-1.

    Images and views are on the CPU, the result on `device`.
    """
    pixels = _warp(images, views.warps, size, device) / 255
    return _erase(_colour(pixels, views), views.erased)


def _centre(image: Tensor, size: int) -> Tensor:
    top, left = (round((length - size) / 2) for length in image.shape[1:])
    return image[:, top : top + size, left : left + size]


def _uniform(count: int, low: float, high: float, generator: torch.Generator) -> Tensor:
    return torch.rand(count, generator=generator) * (high - low) + low


def _warps(heights: Tensor, widths: Tensor, kind: str, generator: torch.Generator) -> Tensor:
    """Matrices (B, 2, 3) that map output to input coordinates, both from -1 to 1.

    Crop of 80-100% of the area with aspect ratio 3/4 to 4/3, flips, two rotations (up to 15 and 0 degrees), a shift by
    up to 10% and a zoom of 95-105%.
    """
    count = len(heights)
    area = _uniform(count, 0.8, 1.0, generator) * heights * widths
    ratio = torch.exp(_uniform(count, math.log(3 / 4), math.log(4 / 3), generator))
    crop_width = torch.minimum(torch.sqrt(area * ratio), widths) / widths
    crop_height = torch.minimum(torch.sqrt(area / ratio), heights) / heights
    centre_x = (1 - crop_width) * _uniform(count, -1, 1, generator)
    centre_y = (1 - crop_height) * _uniform(count, -1, 1, generator)
    angle = _uniform(count, -math.pi / 12, math.pi / 12, generator)
    zoom = 1 / _uniform(count, 0.95, 1.05, generator)
    shift_x, shift_y = (_uniform(count, -0.2, 0.2, generator) for _ in range(2))  # coordinates span 2
    flip_x = torch.where(torch.rand(count, generator=generator) < 0.5, -1.0, 1.0)
    flip_y = torch.where(torch.rand(count, generator=generator) < 0.2, -1.0, 1.0)
    if kind == "no_flip":
        flip_x, flip_y = torch.ones(count), torch.ones(count)
    cosine, sine = torch.cos(angle) * zoom, torch.sin(angle) * zoom
    rows_x = torch.stack([cosine, -sine, shift_x], dim=1) * (crop_width * flip_x).unsqueeze(1)
    rows_y = torch.stack([sine, cosine, shift_y], dim=1) * (crop_height * flip_y).unsqueeze(1)
    rows_x[:, 2] += centre_x
    rows_y[:, 2] += centre_y
    return torch.stack([rows_x, rows_y], dim=1)


def _warp(images: list[Tensor], matrices: Tensor, size: int, device: torch.device | str) -> Tensor:
    """Sample each image bilinearly, black outside: float32 0-255 (B, 3, size, size) on `device`."""
    output = torch.empty(len(images), 3, size, size, device=device)
    shapes: dict[tuple[int, ...], list[int]] = {}
    for row, image in enumerate(images):
        shapes.setdefault(tuple(image.shape), []).append(row)
    for rows in shapes.values():  # images of the same shape are sampled together
        maps = copied(matrices[rows], device)
        grid = functional.affine_grid(maps, [len(rows), 3, size, size], align_corners=False)
        stacked = copied(torch.stack([images[row] for row in rows]), device).float()
        sampled = functional.grid_sample(stacked, grid, mode="bilinear", align_corners=False)
        output.index_copy_(0, copied(torch.tensor(rows), device), sampled)
    return output


def _colour(pixels: Tensor, views: Views) -> Tensor:
    """Scale brightness, contrast, saturation and rotate hues of pixels 0-1 (B, 3, H, W), which are overwritten."""
    factors = copied(views.factors.T.contiguous(), pixels.device)
    brightness, contrast, saturation = factors.view(3, -1, 1, 1, 1)
    weights = copied(torch.tensor([0.299, 0.587, 0.114]), pixels.device).view(1, 3, 1, 1)
    pixels = pixels.mul_(brightness).clamp_(0, 1)
    mean = (pixels * weights).sum(1, keepdim=True).mean((2, 3), keepdim=True)
    pixels = pixels.sub_(mean).mul_(contrast).add_(mean).clamp_(0, 1)
    grey = (pixels * weights).sum(1, keepdim=True)
    pixels = pixels.sub_(grey).mul_(saturation).add_(grey).clamp_(0, 1)
    turns = copied(_hue_turns(views.hues), pixels.device)
    return torch.einsum("bij,bjhw->bihw", turns, pixels).clamp_(0, 1)


def _hue_turns(hues: Tensor) -> Tensor:
    """Rotation matrices about the grey axis of the RGB cube, (B, 3, 3), which keep grey unchanged."""
    angle = hues.view(-1, 1, 1)
    axis = torch.full((3, 3), 1 / 3)
    cross = torch.tensor([[0.0, -1.0, 1.0], [1.0, 0.0, -1.0], [-1.0, 1.0, 0.0]]) / math.sqrt(3)
    return torch.cos(angle) * torch.eye(3) + torch.sin(angle) * cross + (1 - torch.cos(angle)) * axis


def _erase(pixels: Tensor, erased: Tensor) -> Tensor:
    """Blacken a rectangle of 2-33% of the area in 15% of the images (random erasing, Zhong et al. 2020), in place."""
    _, _, height, width = pixels.shape
    is_erased, share, ratio, vertical, horizontal = erased.unbind(1)
    area = share * height * width
    tall = torch.sqrt(area * ratio).round().clamp(1, height).int()
    wide = torch.sqrt(area / ratio).round().clamp(1, width).int()
    top = (vertical * (height - tall + 1)).int()
    left = (horizontal * (width - wide + 1)).int()
    rows = is_erased.nonzero().flatten()
    if not len(rows):
        return pixels
    ys, xs = torch.arange(height), torch.arange(width)
    in_rows = (ys >= top[rows, None]) & (ys < (top + tall)[rows, None])
    in_columns = (xs >= left[rows, None]) & (xs < (left + wide)[rows, None])
    down, across, rows = (copied(values, pixels.device) for values in (in_rows, in_columns, rows))
    inside = down[:, None, :, None] & across[:, None, None, :]
    return pixels.index_copy_(0, rows, pixels[rows].masked_fill_(inside, 0))
