"""Images of one split, loaded from the decoded-image cache at any size, with or without augmentation."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from utils import base_back
from utils.predictions import image_splits
from utils.predictions.image_splits import ImageSplit

EVALUATION_BATCH_SIZE = 256
AUGMENTATIONS = ("full", "no_flip", "none")
NO_AUGMENTATION = "none"  # every view is that of the evaluation transform


def augmentation_kind(facts: Mapping[str, str]) -> str:
    """The base pipeline's kind of augmentation: the one that a checkpoint records, else the settings'."""
    kind = facts.get("augment", getattr(base_back.settings(), "AUGMENT", "full"))
    return kind if kind in AUGMENTATIONS else "full"


class ImageSource:
    """Images of a split with one kind of augmentation.

    A view is the set of random augmentation parameters of one image. Views are drawn without regard to the image size,
    so that networks of different input sizes load the same view.

    Parameters
    ----------
    images : the split
    size : image size of the network for which views are drawn
    augmentation : the base pipeline's kind: full, no_flip or none
    image_cache : folder of the decoded-image cache
    threads : number of threads that decode images
    """

    def __init__(
        self, images: ImageSplit, size: int, augmentation: str, *, image_cache: Path, threads: int = 1
    ) -> None:
        self.images = images
        self.size = size
        self.augmentation = augmentation
        self._image_cache, self._threads = image_cache, threads
        self._pixels_by_size: dict[int, Any] = {}
        self._transforms = base_back.load_bundled("augmentation")

    def __len__(self) -> int:
        return len(self.images.paths)

    def draw_views(self, seed: int) -> Any:
        """Draw one view of every image; None where the augmentation is none."""
        if self.augmentation == NO_AUGMENTATION:
            return None
        pixels = self._pixels(self.size)
        heights, widths = (torch.from_numpy(side.astype(np.float32)) for side in (pixels.height, pixels.width))
        generator = torch.Generator().manual_seed(seed)
        return self._transforms.draw_views(heights, widths, self.augmentation, generator)

    def join_views(self, views: Sequence[Any]) -> Any:
        """Concatenate several views of every image."""
        return None if views[0] is None else type(views[0]).joined(views)

    def load(self, rows: Tensor, size: int, views: Any) -> Tensor:
        """Load normalised images float32 (B, 3, size, size).

        `rows` int64 (B,) are indices of the images, `views` their B views; None loads the evaluation crops.
        """
        pixels = self._pixels(size)
        if views is None:
            return image_splits.normalise(torch.from_numpy(pixels.centre_crops(rows.numpy(), size)))
        images = [torch.from_numpy(pixels.image(row).copy()).permute(2, 0, 1) for row in rows.tolist()]
        augmented: Tensor = self._transforms.show(images, size, views)
        return augmented

    def evaluation_batches(self, size: int, start: int = 0) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield (rows int64 (B,), evaluation crops float32 (B, 3, size, size)) in order, from the image `start` on."""
        for rows in torch.arange(start, len(self)).split(EVALUATION_BATCH_SIZE):
            yield rows, self.load(rows, size, None)

    def _pixels(self, size: int) -> Any:
        if size not in self._pixels_by_size:
            self._pixels_by_size[size] = image_splits.open_images(
                self.images, size, image_cache=self._image_cache, threads=self._threads
            )
        return self._pixels_by_size[size]
