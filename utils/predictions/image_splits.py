"""The images of a split: their ids, labels and contents, decoded once into a cache for networks of every image size."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from utils import base_back
from utils.core import engines
from utils.core.artifacts import FileDigests, digest_of
from utils.core.errors import UserError

if TYPE_CHECKING:
    from torch import Tensor

logger = logging.getLogger("disease_pipeline")

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


@dataclass(frozen=True)
class ImageSplit:
    """The labelled images of one split, sorted by sample id."""

    split: str
    classes: tuple[str, ...]
    sample_ids: tuple[str, ...]
    labels: np.ndarray
    """int64 (N,)"""
    paths: tuple[Path, ...]
    contents: tuple[str, ...]
    """SHA-256 of each file."""
    digest: str
    """Of ids, labels and contents."""

    def take(self, rows: Sequence[int] | np.ndarray) -> ImageSplit:
        """Some of the images, in the order of `rows`; the digest stays the whole split's."""
        return replace(
            self,
            sample_ids=tuple(self.sample_ids[row] for row in rows),
            labels=self.labels[rows],
            paths=tuple(self.paths[row] for row in rows),
            contents=tuple(self.contents[row] for row in rows),
        )


def list_images(split_dir: Path, split: str, digests: FileDigests) -> ImageSplit:
    """The images of one split with their content digests. Raises UserError for a missing split or an empty class."""
    samples_module = base_back.load_bundled("samples")
    try:
        classes, samples = samples_module.scan(split_dir / split)
    except (FileNotFoundError, ValueError) as error:
        raise UserError(
            f"{error}. Split the images first: python {_shown(base_back.locate())}/src/main.py --stages split"
        ) from error
    contents = [digests.of(sample.path) for sample in samples]
    labels = np.array([sample.label for sample in samples], dtype=np.int64)
    ids = [sample.sample_id for sample in samples]
    return ImageSplit(
        split=split,
        classes=tuple(classes),
        sample_ids=tuple(ids),
        labels=labels,
        paths=tuple(sample.path for sample in samples),
        contents=tuple(contents),
        digest=digest_of([classes, ids, contents]),
    )


def _shown(path: Path) -> str:
    return path.relative_to(Path.cwd()).as_posix() if path.is_relative_to(Path.cwd()) else str(path)


def decode(splits: Sequence[ImageSplit], sizes: Sequence[int], *, image_cache: Path, threads: int = 1) -> None:
    """Decode what the image cache lacks of the splits, each file once, for networks of all the given image sizes.

    Raises UserError that names the files which cannot be read, after everything readable was kept.
    """
    for images in splits:
        if error := _decoded(images, sizes, image_cache, threads):
            raise _unreadable(error) from error


def decode_readable(
    images: ImageSplit, sizes: Sequence[int], *, image_cache: Path, threads: int = 1
) -> dict[Path, str]:
    """Decode as `decode` does; gives {file: why it cannot be read} and goes on."""
    error: Any = _decoded(images, sizes, image_cache, threads)
    return dict(error.problems) if error else {}


def _decoded(images: ImageSplit, sizes: Sequence[int], image_cache: Path, threads: int) -> Exception | None:
    """Keep everything readable in the cache; gives the error that names the rest."""
    decoder = base_back.load_bundled("image_cache")
    sides = sorted({decoder.resized_side(size) for size in sizes})
    try:
        decoder.decode_images(images.paths, images.contents, sides, image_cache, threads=threads)
    except decoder.UnreadableImages as error:
        return error  # type: ignore[no-any-return]
    return None


def open_images(images: ImageSplit, img_size: int, *, image_cache: Path, threads: int) -> Any:
    """Decoded pixels of a split for networks of one image size; what the cache lacks is decoded first."""
    decoder = base_back.load_bundled("image_cache")
    side = decoder.resized_side(img_size)
    try:
        return decoder.open_images(images.paths, images.contents, side, image_cache, threads=threads)
    except decoder.UnreadableImages as error:
        raise _unreadable(error) from error


def _unreadable(error: Exception) -> UserError:
    return UserError(f"{error}. Remove or replace the files, then run discover again")


def normalise(pixels: Tensor, *, layout: Any = None, out: Tensor | None = None) -> Tensor:
    """uint8 (B, H, W, 3) -> float32 (B, 3, H, W), as the base pipeline's evaluation transform ends, bit for bit.

    One copy turns bytes into floats in the memory layout wanted (default: contiguous), into `out` where it is given;
    the arithmetic is done in place.
    """
    import torch

    planes = pixels.permute(0, 3, 1, 2)
    if out is None:
        layout = layout or torch.contiguous_format
        out = torch.empty(planes.shape, device=pixels.device, memory_format=layout)
    mean, std = (
        torch.tensor(values, device=pixels.device).view(1, 3, 1, 1) for values in (IMAGENET_MEAN, IMAGENET_STD)
    )
    return out.copy_(planes).div_(255).sub_(mean).div_(std)


def decoding_threads(wanted: int) -> int:
    """`dataset.num_workers`, one at the least and no more than the cores; says so when it is cut."""
    cores = engines.cores()
    if wanted > cores:
        _tell_of_cores(wanted, cores)
    return max(1, min(wanted, cores))


@cache
def _tell_of_cores(wanted: int, cores: int) -> None:
    """Once per process, however often images are decoded."""
    logger.warning("dataset.num_workers is %d; this machine has %d cores, which is what is used", wanted, cores)
