"""The images of a split: ids, labels and contents; decoded once into a cache for all preprocessings."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cache, lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from utils import base_back
from utils.core import engines
from utils.core.artifacts import FileDigests, digest_of
from utils.core.errors import UserError
from utils.core.links import require_unlinked
from utils.networks.preprocessing import Preprocessing

if TYPE_CHECKING:
    from torch import Tensor

logger = logging.getLogger("disease_pipeline")


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
    """SHA-256 of each file"""
    digest: str
    """Digest of ids, labels and contents"""

    def take(self, rows: Sequence[int] | np.ndarray) -> ImageSplit:
        """The images at indices `rows`, in that order; the digest remains that of the whole split."""
        return replace(
            self,
            sample_ids=tuple(self.sample_ids[row] for row in rows),
            labels=self.labels[rows],
            paths=tuple(self.paths[row] for row in rows),
            contents=tuple(self.contents[row] for row in rows),
        )


def list_images(split_dir: Path, split: str, digests: FileDigests) -> ImageSplit:
    """List the images of one split, with content digests. Raises UserError for a missing split or an empty class."""
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


def decode(
    splits: Sequence[ImageSplit], preprocessings: Iterable[Preprocessing], *, image_cache: Path, threads: int = 1
) -> None:
    """Decode the images that the cache lacks, each file once for all preprocessings.

    Raises UserError naming the unreadable files, after all readable ones are cached.
    """
    rules = _rules(preprocessings)
    for images in splits:
        if error := _decoded(images, rules, image_cache, threads):
            raise _unreadable(error) from error


def decode_readable(
    images: ImageSplit, preprocessings: Iterable[Preprocessing], *, image_cache: Path, threads: int = 1
) -> dict[Path, str]:
    """Like `decode`, but return {unreadable file: reason} instead of raising."""
    error: Any = _decoded(images, _rules(preprocessings), image_cache, threads)
    return dict(error.problems) if error else {}


def _rules(preprocessings: Iterable[Preprocessing]) -> list[Any]:
    """The distinct resize rules, sorted by key; rules with equal keys share their pixels."""
    rules = {rule.key: rule for rule in (preprocessing.resizing() for preprocessing in preprocessings)}
    return [rules[key] for key in sorted(rules)]


def _decoded(images: ImageSplit, rules: Sequence[Any], image_cache: Path, threads: int) -> Exception | None:
    """Cache all readable images; returns the error that names the unreadable ones, or None."""
    decoder = base_back.load_bundled("image_cache")
    require_unlinked(image_cache / "pack")
    try:
        decoder.decode_images(images.paths, images.contents, rules, image_cache, threads=threads)
    except decoder.UnreadableImages as error:
        return error
    return None


def open_images(images: ImageSplit, preprocessing: Preprocessing, *, image_cache: Path, threads: int) -> Any:
    """Decoded pixels of a split for one preprocessing; images that the cache lacks are decoded first.

    `.crops(rows)` returns the centre squares, uint8 (B, S, S, 3), the input of `normalise`; `.image(row)` returns one
    whole resized image.
    """
    decoder = base_back.load_bundled("image_cache")
    require_unlinked(image_cache / "pack")
    rule = preprocessing.resizing()
    try:
        return decoder.open_images(images.paths, images.contents, rule, image_cache, threads=threads)
    except decoder.UnreadableImages as error:
        raise _unreadable(error) from error


def _unreadable(error: Exception) -> UserError:
    return UserError(f"{error}. Remove or replace the files, then run discover again")


def normalise(pixels: Tensor, preprocessing: Preprocessing, *, layout: Any = None, out: Tensor | None = None) -> Tensor:
    """RGB uint8 (B, H, W, 3) -> float32 (B, 3, H, W) with the preprocessing's channel order, range, mean and deviation.

    Equals the base pipeline's evaluation transform, and torchvision's and timm's, bit for bit. One copy converts the
    bytes to floats in the requested memory format (contiguous by default), into `out` if given; the arithmetic is in
    place.
    """
    import torch

    planes = pixels.permute(0, 3, 1, 2)
    if out is None:
        layout = layout or torch.contiguous_format
        out = torch.empty(planes.shape, device=pixels.device, memory_format=layout)
    return _standardised(out.copy_(_in_channel_order(planes, preprocessing)).div_(255), preprocessing)


def standardise(values: Tensor, preprocessing: Preprocessing) -> Tensor:
    """RGB float32 (B, 3, H, W) in [0, 1] -> the same with the preprocessing's channel order, range, mean, deviation.

    `values` may be overwritten.
    """
    return _standardised(_in_channel_order(values, preprocessing), preprocessing)


def _in_channel_order(planes: Tensor, preprocessing: Preprocessing) -> Tensor:
    return planes.flip(1) if preprocessing.channels == "BGR" else planes


def _standardised(values: Tensor, preprocessing: Preprocessing) -> Tensor:
    """Rescale and standardise values in [0, 1], in place."""
    low, high = preprocessing.value_range
    if (low, high) != (0, 1):
        values = values.mul_(high - low).add_(low)
    mean, std = (channel_constants(tuple(each), str(values.device)) for each in (preprocessing.mean, preprocessing.std))
    return values.sub_(mean).div_(std)


@lru_cache(maxsize=64)
def channel_constants(parameters: tuple[float, ...], device: str) -> Tensor:
    """Parameters (1, 3, 1, 1) on a device; cached, since creating them synchronises with a GPU in every batch."""
    import torch

    with torch.inference_mode(mode=False):  # inference tensors cannot be used in training
        return torch.tensor(parameters, device=device).view(1, 3, 1, 1)


def decoding_threads(requested: int) -> int:
    """`dataset.num_workers`, at least 1 and at most the number of cores; warns if it is reduced."""
    cores = engines.cores()
    if requested > cores:
        _warn_of_cores(requested, cores)
    return max(1, min(requested, cores))


@cache
def _warn_of_cores(requested: int, cores: int) -> None:
    """Cached, so that the warning appears once per process."""
    logger.warning("dataset.num_workers is %d; this machine has %d cores, which is what is used", requested, cores)
