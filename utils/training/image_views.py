"""What a student is shown: which images make a batch, how each is shown and mixed, decided before any is opened.

Everything random is drawn from (seed, epoch), so that an epoch can be repeated without those before it, and from values
that know no image size, so that a teacher can be shown the very same views.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from utils import base_back
from utils.distillation_methods import Mixing, draw_mixing
from utils.predictions import image_splits
from utils.predictions.image_splits import ImageSplit

HELD = 1 << 28  # bytes of shown images that are kept while several networks look at the same ones
EVALUATION_BATCH_SIZE = 256
AUGMENTATION_KINDS = ("full", "no_flip", "none")
NO_VIEW = "none"  # the kind of augmentation that shows everything as the evaluation transform does


def seed_of(*parts: object) -> int:
    """A seed below 2**31 for one purpose."""
    return int.from_bytes(hashlib.sha256(repr(parts).encode()).digest()[:4], "big") >> 1


def augmentation_kind(facts: Mapping[str, str]) -> str:
    """The base pipeline's kind of augmentation: the one that a checkpoint records, else the settings'."""
    kind = facts.get("augment", getattr(base_back.settings(), "AUGMENT", "full"))
    return kind if kind in AUGMENTATION_KINDS else "full"


class Album:
    """Images and the ways to show them; pixels come from the decoded-image cache, at whatever size is asked for.

    `kind` is the base pipeline's augmentation: full, no_flip or none.
    """

    def __init__(self, images: ImageSplit, size: int, kind: str, *, image_cache: Path, threads: int = 1) -> None:
        self.images = images
        self.size = size
        self.kind = kind
        self._cache, self._threads = image_cache, threads
        self._opened: dict[int, Any] = {}
        self._ways = base_back.load_bundled("augmentation")

    def __len__(self) -> int:
        return len(self.images.paths)

    def draw(self, seed: int) -> Any:
        """A view of every image; None where the augmentation is none."""
        if self.kind == NO_VIEW:
            return None
        pixels = self._pixels(self.size)
        heights, widths = (torch.from_numpy(side.astype(np.float32)) for side in (pixels.height, pixels.width))
        return self._ways.draw_views(heights, widths, self.kind, torch.Generator().manual_seed(seed))

    def join(self, parts: Sequence[Any]) -> Any:
        """Several views of every image, one after the other."""
        return None if parts[0] is None else type(parts[0]).joined(parts)

    def show(self, rows: Tensor, size: int, views: Any) -> Tensor:
        """Normalised float32 (B, 3, size, size) of some rows, as `views` of theirs say; None: evaluation's crop."""
        pixels = self._pixels(size)
        if views is None:
            return image_splits.normalise(torch.from_numpy(pixels.centre_crops(rows.numpy(), size)))
        images = [torch.from_numpy(pixels.image(row).copy()).permute(2, 0, 1) for row in rows.tolist()]
        return self._ways.show(images, size, views)  # type: ignore[no-any-return]

    def _pixels(self, size: int) -> Any:
        if size not in self._opened:
            self._opened[size] = image_splits.open_images(
                self.images, size, image_cache=self._cache, threads=self._threads
            )
        return self._opened[size]


@dataclass(frozen=True)
class Batch:
    """Some rows and how they are shown."""

    rows: Tensor
    """int64 (B,)"""
    plain: Tensor
    """bool (B,): shown as the evaluation transform does"""
    mixing: Mixing | None


@dataclass
class Lessons:
    """All epochs of one student: batches, views, mixing.

    `plain` says of each image whether it may be shown as the evaluation transform does: never, `always`, or `half` of
    the times, in the first half of its batches. `views` (0: new ones in every epoch) is the number of views of an image
    that come back again and again.
    """

    album: Album
    batch_size: int
    seed: int
    plain: np.ndarray
    """unicode (N,): never, half, always"""
    views: int = 0
    mix: str = "none"
    is_shared: bool = False
    """Whether several networks look at each epoch."""
    _pages: dict[int, tuple[int, Any]] = field(default_factory=dict, init=False, repr=False)
    _drawn: tuple[int, Any] | None = field(default=None, init=False, repr=False)

    def __len__(self) -> int:
        """Batches in an epoch."""
        return len(self._bounds())

    @property
    def is_apart(self) -> bool:
        """Whether the teacher's part is taken on images shown plainly, and the labels' part on the others."""
        return bool((self.plain != "never").any())

    def _bounds(self) -> list[tuple[int, int]]:
        """As the base pipeline deals them: a last batch of one image joins the one before, for BatchNorm's sake."""
        count = len(self.album)
        starts = list(range(0, count, self.batch_size))
        if len(starts) > 1 and count - starts[-1] == 1:
            starts.pop()
        return list(zip(starts, [*starts[1:], count], strict=True))

    def plan(self, epoch: int) -> list[Batch]:
        """The batches of an epoch, counted from 0."""
        rng = np.random.default_rng([self.seed, epoch])
        order = rng.permutation(len(self.album))
        found = []
        for start, stop in self._bounds():
            rows = order[start:stop]
            first = np.arange(len(rows)) < (len(rows) + 1) // 2
            plain = (self.plain[rows] == "always") | ((self.plain[rows] == "half") & first)
            mixing = draw_mixing(self.mix, len(rows), rng) if self.mix != "none" else None
            found.append(Batch(torch.from_numpy(rows), torch.from_numpy(plain), mixing))
        return found

    def view_of(self, epoch: int) -> np.ndarray:
        """Which of its views each image is shown by in an epoch, int64 (N,); 0 where there are new ones every time."""
        if not self.views:
            return np.zeros(len(self.album), dtype=np.int64)
        first = np.random.default_rng([self.seed, 1]).integers(self.views, size=len(self.album))
        return (first + epoch) % self.views

    def all_views(self) -> Any:
        """The views that come back: those numbered 0 of all images, then those numbered 1..."""
        return self.album.join([self.album.draw(seed_of(self.seed, "view", number)) for number in range(self.views)])

    def drawn(self, epoch: int) -> Any:
        """The views of all images in an epoch; None where the augmentation is none."""
        key = epoch if not self.views else -1
        if self._drawn is None or self._drawn[0] != key:
            new = self.all_views() if self.views else self.album.draw(seed_of(self.seed, "epoch", epoch))
            self._drawn = (key, new)
        found = self._drawn[1]
        if found is None or not self.views:
            return found
        return found.take(torch.from_numpy(self.view_of(epoch) * len(self.album) + np.arange(len(self.album))))

    def shown(self, batch: Batch, views: Any, size: int) -> Tensor:
        """The images of a batch, float32 (B, 3, size, size), by the `views` of all images in its epoch."""
        if views is None or bool(batch.plain.all()):
            images = self.album.show(batch.rows, size, None)
        else:
            images = torch.empty(len(batch.rows), 3, size, size)
            for places, chosen in ((batch.plain, False), (~batch.plain, True)):
                if bool(places.any()):
                    rows = batch.rows[places]
                    images[places] = self.album.show(rows, size, views.take(rows) if chosen else None)
        return images if batch.mixing is None else batch.mixing.images(images)

    def pages(self, epoch: int, size: int) -> Pages:
        """The batches of an epoch with their images, at one size; the same object while the epoch is the last one."""
        if self._pages.get(size, (-1, None))[0] != epoch:
            self._pages[size] = (epoch, Pages(self, epoch, size))
        return self._pages[size][1]


@dataclass
class Pages:
    """The batches of one epoch with their images, shown anew for every pass, or kept where they are few."""

    lessons: Lessons
    epoch: int
    size: int
    _kept: list[tuple[Batch, Tensor]] | None = field(default=None, init=False, repr=False)

    def __iter__(self) -> Iterator[tuple[Batch, Tensor]]:
        if self._kept is not None:
            yield from self._kept
            return
        views = self.lessons.drawn(self.epoch)
        keeps = self.lessons.is_shared and len(self.lessons.album) * 3 * self.size**2 * 4 <= HELD
        kept = []
        for batch in self.lessons.plan(self.epoch):
            found = (batch, self.lessons.shown(batch, views, self.size))
            if keeps:
                kept.append(found)
            yield found
        self._kept = kept if keeps else None
