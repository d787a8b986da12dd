"""Estimates of the time and disk space of a pass over all images, or of a training."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass

BYTES_PER_PARAMETER = 4
# Image networks of the last ten years need 90 to 210 multiply-adds per parameter for an image of 224 pixels.
MULTIPLY_ADDS_PER_PARAMETER = 160
REFERENCE_SIDE = 224
PER_CORE, PER_GPU = 20e9, 3e12  # multiply-adds per second of whole networks, well below the peak
READING = 500e6  # bytes of checkpoints per second
SECONDS_PER_MEMBER = 0.5  # for construction and clean-up
SECONDS_PER_BATCH = 0.02
DECODED_PER_SECOND = 100  # photographs, on one core
ENLARGED = 1.14  # shorter side of a decoded image, in image sizes; photographs are 4:3
FLOATS_PER_ROW = 1024  # embedding and logits of a usual network
STEP = 3  # cost of a training step in forward passes
COPIES = 7  # of the weights in a progress file: current and best, each with two optimizer moments, and a margin


@dataclass(frozen=True)
class Estimate:
    """Estimated cost of one piece of work for several members."""

    seconds: float
    megabytes: float
    """Disk space in 10^6 bytes."""

    def __str__(self) -> str:
        time = f"{self.seconds / 60:.0f} min" if self.seconds >= 90 else f"{max(1, self.seconds):.0f} s"
        return f"about {time} and {max(1, self.megabytes):.0f} MB"


def estimate_extraction(
    checkpoint_bytes: Sequence[int],
    images: int,
    *,
    batch_size: int,
    img_size: int = REFERENCE_SIDE,
    to_decode: int = 0,
    on_cuda: bool = False,
    cores: int | None = None,
) -> Estimate:
    """Time and disk space for running one member per checkpoint on `images` images, `to_decode` of them not cached.

    `checkpoint_bytes` holds the size of each member's file, which is assumed to contain only parameters. Accurate
    within a factor of about three.
    """
    cores = cores or os.cpu_count() or 1
    speed = PER_GPU if on_cuda else PER_CORE * cores
    batches = -(-images // batch_size)
    seconds = images * sum(_multiply_adds(size, img_size) for size in checkpoint_bytes) / speed
    seconds += len(checkpoint_bytes) * (SECONDS_PER_MEMBER + batches * SECONDS_PER_BATCH)
    seconds += sum(checkpoint_bytes) / READING + to_decode / (DECODED_PER_SECOND * cores)
    side = int(img_size * ENLARGED)
    pixels = to_decode * side * side * 4 / 3 * 3
    rows = len(checkpoint_bytes) * images * FLOATS_PER_ROW * 4
    return Estimate(seconds, (pixels + rows) / 1e6)


def estimate_training(
    checkpoint_bytes: Sequence[int],
    images: int,
    *,
    epochs: int,
    kept: int,
    batch_size: int,
    img_size: int = REFERENCE_SIDE,
    on_cuda: bool = False,
    cores: int | None = None,
) -> Estimate:
    """Time and disk space for training one network per checkpoint, `epochs` epochs on `images` images each.

    Each network leaves `kept` files. On a GPU one network is trained at a time; otherwise one per core in parallel.
    `checkpoint_bytes` holds the size of a weights file of each network. The disk space is that of the final files and
    of the largest progress files. Accurate within a factor of about three.
    """
    speed, workers = (PER_GPU, 1) if on_cuda else (PER_CORE, cores or os.cpu_count() or 1)
    batches = epochs * -(-images // batch_size)
    seconds_per_network = [
        STEP * (epochs * images * _multiply_adds(size, img_size) / speed + batches * SECONDS_PER_BATCH)
        for size in checkpoint_bytes
    ]
    seconds = max([sum(seconds_per_network) / workers, *seconds_per_network])
    under_way = sorted(checkpoint_bytes)[-workers:]
    return Estimate(seconds, (kept * sum(checkpoint_bytes) + (COPIES + kept) * sum(under_way)) / 1e6)


def pass_fraction(passed: Sequence[tuple[int, int]], trained: tuple[int, int], *, epochs: int) -> float:
    """Cost of one forward pass of networks on the images of a training, as a fraction of the training's cost.

    Networks are (bytes of the weights, input size in px). Independent of the machine.
    """
    forward_pass = sum(_multiply_adds(n_bytes, img_size) for n_bytes, img_size in passed)
    return forward_pass / (STEP * epochs * _multiply_adds(*trained))


def _multiply_adds(checkpoint_bytes: int, img_size: int) -> float:
    """Multiply-adds of one image in a network."""
    return checkpoint_bytes / BYTES_PER_PARAMETER * MULTIPLY_ADDS_PER_PARAMETER * (img_size / REFERENCE_SIDE) ** 2
