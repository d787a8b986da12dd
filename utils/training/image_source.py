"""Images of one split, loaded from the image cache with any preprocessing, with or without augmentation."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from utils import base_back
from utils.networks.preprocessing import Preprocessing
from utils.predictions import image_splits
from utils.predictions.image_splits import ImageSplit

EVALUATION_BATCH_SIZE = 256
AUGMENTATIONS = ("full", "no_flip", "none")
NO_AUGMENTATION = "none"  # every view is that of the evaluation transform


def augmentation_kind(facts: Mapping[str, str]) -> str:
    """The base pipeline's kind of augmentation: from a checkpoint's `facts`, else from the settings."""
    kind = facts.get("augment", getattr(base_back.settings(), "AUGMENT", "full"))
    return kind if kind in AUGMENTATIONS else "full"


class ImageSource:
    """Images of a split with one kind of augmentation.

    A view is the set of random augmentation parameters of one image: a warp in coordinates relative to the whole
    resized image, colour changes and an erased rectangle. Views do not depend on the preprocessing, so that networks
    with different preprocessing load the same view: each warps its resized image (squashed ones included) to its input
    size, and normalises with its mean and deviation. All receive the same part of the photograph; if only some apply an
    EXIF orientation, each receives the part in its orientation. Crop and padding of an evaluation transform do not
    affect views.

    Parameters
    ----------
    images : the split
    preprocessing : preprocessing of the network for which views are sampled
    augmentation : the base pipeline's kind: full, no_flip or none
    image_cache : folder of the decoded-image cache
    threads : number of decoding threads
    """

    def __init__(
        self,
        images: ImageSplit,
        preprocessing: Preprocessing,
        augmentation: str,
        *,
        image_cache: Path,
        threads: int = 1,
    ) -> None:
        self.images = images
        self.preprocessing = preprocessing
        self.augmentation = augmentation
        self._image_cache, self._threads = image_cache, threads
        self._pixels_by_rule: dict[Any, Any] = {}
        self._transforms = base_back.load_bundled("augmentation")

    def __len__(self) -> int:
        return len(self.images.paths)

    def draw_views(self, seed: int) -> Any:
        """Sample one view of every image; None without augmentation."""
        if self.augmentation == NO_AUGMENTATION:
            return None
        pixels = self._pixels(self.preprocessing)
        heights, widths = (torch.from_numpy(side.astype(np.float32)) for side in (pixels.height, pixels.width))
        generator = torch.Generator().manual_seed(seed)
        return self._transforms.draw_views(heights, widths, self.augmentation, generator)

    def join_views(self, views: Sequence[Any]) -> Any:
        """Concatenate several views of every image."""
        return None if views[0] is None else type(views[0]).joined(views)

    def load(self, rows: Tensor, preprocessing: Preprocessing, views: Any, device: str = "cpu") -> Tensor:
        """Load normalised images, float32 (B, 3, S, S) on `device`, for a network with this preprocessing.

        `rows`, int64 (B,), are indices of the images, `views` their B views; None loads the evaluation crops. A GPU
        receives uint8 pixels and transforms the batch itself.
        """
        pixels = self._pixels(preprocessing)
        if views is None:
            crops = self._transforms.copied(torch.from_numpy(pixels.crops(rows.numpy())), device)
            return image_splits.normalise(crops, preprocessing)
        images = [torch.from_numpy(pixels.image(row).copy()).permute(2, 0, 1) for row in rows.tolist()]
        augmented: Tensor = self._transforms.shown(images, preprocessing.input_size, views, device)
        return image_splits.standardise(augmented, preprocessing)

    def evaluation_batches(
        self, preprocessing: Preprocessing, start: int = 0, device: str = "cpu"
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield (rows int64 (B,), evaluation crops float32 (B, 3, S, S) on `device`) in order from image `start` on."""
        for rows in torch.arange(start, len(self)).split(EVALUATION_BATCH_SIZE):
            yield rows, self.load(rows, preprocessing, None, device)

    def _pixels(self, preprocessing: Preprocessing) -> Any:
        rule = preprocessing.resizing()
        if rule not in self._pixels_by_rule:
            self._pixels_by_rule[rule] = image_splits.open_images(
                self.images, preprocessing, image_cache=self._image_cache, threads=self._threads
            )
        return self._pixels_by_rule[rule]
