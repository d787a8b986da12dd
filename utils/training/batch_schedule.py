"""The batches of every epoch: images, their views and their mixing.

All random numbers are derived from (seed, epoch), so that an epoch is reproducible without earlier epochs, and none
depends on the preprocessing, so that a teacher and its student load identical views.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from utils.distillation_methods import Mixing, draw_mixing
from utils.networks.preprocessing import Preprocessing
from utils.training.image_source import ImageSource

CACHE_BYTES = 1 << 28  # limit of cached images of one epoch while several networks read them
NEVER, HALF, ALWAYS = "never", "half", "always"


def derived_seed(*parts: object) -> int:
    """A seed below 2**31 derived from all `parts`."""
    return int.from_bytes(hashlib.sha256(repr(parts).encode()).digest()[:4], "big") >> 1


@dataclass(frozen=True)
class Batch:
    """Images of one batch and their transforms."""

    rows: Tensor
    """int64 (B,), indices of the images."""
    unaugmented: Tensor
    """bool (B,), whether each image is loaded with the evaluation transform."""
    mixing: Mixing | None


@dataclass
class BatchSchedule:
    """The batches, views and mixing of every epoch of a training."""

    image_source: ImageSource
    batch_size: int
    seed: int
    unaugmented: np.ndarray
    """unicode (N,), whether each image is loaded with the evaluation transform: `never`, `half` (if it is in the first
    half of its batch) or `always`."""
    n_views: int = 0
    """Number of views of each image that recur over the epochs; 0 samples new views in every epoch."""
    mix: str = "none"
    """Mixing of the images of a batch: none, mixup, cutmix or both (one of the two per batch)."""
    mixes_targets: bool = False
    """Whether the teacher's targets are those of the unmixed images and are mixed with the same weights."""
    views_seed: int | None = None
    """Seed of the recurring views; None means `seed`. Trainings with several seeds share the targets by it."""
    is_shared: bool = False
    """Whether several networks read each epoch, so that its images are cached."""
    device: str = "cpu"
    """Where the images of a batch are transformed, and remain."""
    _loaders: dict[Preprocessing, EpochLoader] = field(default_factory=dict, init=False, repr=False)
    _views: tuple[int, Any] | None = field(default=None, init=False, repr=False)

    def __len__(self) -> int:
        """Number of batches in an epoch."""
        return len(self._bounds())

    @property
    def separates_losses(self) -> bool:
        """Whether unaugmented images enter only the distillation loss, and augmented ones only the label loss."""
        return bool((self.unaugmented != NEVER).any())

    def _bounds(self) -> list[tuple[int, int]]:
        """Bounds of the batches; as in the base pipeline, a last batch of one image is merged into the previous one."""
        count = len(self.image_source)
        starts = list(range(0, count, self.batch_size))
        if len(starts) > 1 and count - starts[-1] == 1:
            starts.pop()
        return list(zip(starts, [*starts[1:], count], strict=True))

    def batches(self, epoch: int) -> list[Batch]:
        """The batches of an epoch, counted from 0."""
        rng = np.random.default_rng([self.seed, epoch])
        order = rng.permutation(len(self.image_source))
        batches = []
        for start, stop in self._bounds():
            rows = order[start:stop]
            first_half = np.arange(len(rows)) < (len(rows) + 1) // 2
            frequency = self.unaugmented[rows]
            unaugmented = (frequency == ALWAYS) | ((frequency == HALF) & first_half)
            mixing = draw_mixing(self.mix, len(rows), rng) if self.mix != "none" else None
            batches.append(Batch(torch.from_numpy(rows), torch.from_numpy(unaugmented), mixing))
        return batches

    def view_numbers(self, epoch: int) -> np.ndarray:
        """Index of each image's recurring view in an epoch, int64 (N,); 0 if every epoch samples new views."""
        if not self.n_views:
            return np.zeros(len(self.image_source), dtype=np.int64)
        first_views = np.random.default_rng([self.seed, 1]).integers(self.n_views, size=len(self.image_source))
        return (first_views + epoch) % self.n_views

    def recurring_views(self) -> Any:
        """All recurring views: view 0 of every image, then view 1 of every image, and so on."""
        views_seed = self.seed if self.views_seed is None else self.views_seed
        seeds = [derived_seed(views_seed, "view", number) for number in range(self.n_views)]
        return self.image_source.join_views([self.image_source.draw_views(seed) for seed in seeds])

    def epoch_views(self, epoch: int) -> Any:
        """The views of all images in an epoch; None without augmentation."""
        key = epoch if not self.n_views else -1
        if self._views is None or self._views[0] != key:
            seed = derived_seed(self.seed, "epoch", epoch)
            self._views = (key, self.recurring_views() if self.n_views else self.image_source.draw_views(seed))
        views = self._views[1]
        if views is None or not self.n_views:
            return views
        count = len(self.image_source)
        return views.take(torch.from_numpy(self.view_numbers(epoch) * count + np.arange(count)))

    def load(self, batch: Batch, views: Any, preprocessing: Preprocessing) -> Tensor:
        """Load the images of a batch, float32 (B, 3, S, S); `views` are those of all images in the epoch."""
        if views is None or bool(batch.unaugmented.all()):
            images = self.image_source.load(batch.rows, preprocessing, None, self.device)
        else:
            size = preprocessing.input_size
            images = torch.empty(len(batch.rows), 3, size, size, device=self.device)
            for mask, is_augmented in ((batch.unaugmented, False), (~batch.unaugmented, True)):
                if bool(mask.any()):
                    rows = batch.rows[mask]
                    row_views = views.take(rows) if is_augmented else None
                    indices = mask.nonzero().flatten().to(self.device, non_blocking=True)
                    images.index_copy_(0, indices, self.image_source.load(rows, preprocessing, row_views, self.device))
        return images if batch.mixing is None else batch.mixing.images(images)

    def loader(self, epoch: int, preprocessing: Preprocessing) -> EpochLoader:
        """The loader of an epoch with a preprocessing; the same object until another epoch is requested."""
        if preprocessing not in self._loaders or self._loaders[preprocessing].epoch != epoch:
            self._loaders[preprocessing] = EpochLoader(self, epoch, preprocessing)
        return self._loaders[preprocessing]


@dataclass
class EpochLoader:
    """Iterable over the batches of one epoch with their images.

    Every pass loads the images again, unless the schedule is shared and they fit into `CACHE_BYTES`.
    """

    schedule: BatchSchedule
    epoch: int
    preprocessing: Preprocessing
    _cached: list[tuple[Batch, Tensor]] | None = field(default=None, init=False, repr=False)

    def __iter__(self) -> Iterator[tuple[Batch, Tensor]]:
        if self._cached is not None:
            yield from self._cached
            return
        views = self.schedule.epoch_views(self.epoch)
        n_bytes = len(self.schedule.image_source) * 3 * self.preprocessing.input_size**2 * 4
        is_cached = self.schedule.is_shared and n_bytes <= CACHE_BYTES
        loaded = []
        for batch in self.schedule.batches(self.epoch):
            pair = (batch, self.schedule.load(batch, views, self.preprocessing))
            if is_cached:
                loaded.append(pair)
            yield pair
        self._cached = loaded if is_cached else None
