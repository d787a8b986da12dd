"""Timing of a sparse combiner: real networks on real images, with only the members that each image needs."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Self

import numpy as np

from utils.combiners.routing import SparseCombiner, run_sparse
from utils.networks.construction import NetworkSpec
from utils.networks.preprocessing import Preprocessing
from utils.predictions import image_splits, streaming
from utils.predictions.catalog import Member
from utils.predictions.image_splits import ImageSplit
from utils.predictions.store import Store

if TYPE_CHECKING:
    from torch import Tensor

MOST, ENOUGH = 5, 0.5  # timing ends after 5 runs or 0.5 s
KEPT_BYTES = 256 * 2**20  # of checkpoints, whose networks stay open between runs; of others one is open at a time


@dataclass
class Stopwatch:
    """Run members' networks on some images of a split and measure forward passes and routing.

    Opening networks, decoding and a warm-up with one image are not counted, since a service keeps its networks in
    memory. Pixels are on the device before the timing starts. Use as a context: small networks stay open within it.
    """

    store: Store
    members: Sequence[Member]
    images: ImageSplit
    device: str
    uncounted: float = field(default=0.0, init=False)
    _kept: dict[int, Any] = field(default_factory=dict, init=False)
    """{member: (forward, place) of its open network}"""
    _kept_bytes: int = field(default=0, init=False)
    _networks: ExitStack = field(default_factory=ExitStack, init=False)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self._networks.close()

    def of_combiner(self, combiner: SparseCombiner) -> float:
        """Return the milliseconds per image of a combiner, in batches of `dataset.batch_size` per member."""
        shape = (len(self.members), len(self.images.sample_ids), len(self.store.catalog.classes))
        return self._per_image(lambda: run_sparse(combiner, self.run, shape))

    def of_member(self, member: int) -> float:
        """Return the milliseconds per image of one member on all images."""
        rows = np.arange(len(self.images.sample_ids))
        return self._per_image(lambda: self.run(member, rows))

    def run(self, member: int, rows: np.ndarray) -> np.ndarray:
        """Return logits (n, C) of one member on `rows` (n,)."""
        entry, logits = self.members[member], []
        spec, size = entry.network(self.store.workspace), self.store.config.dataset.batch_size
        with ExitStack() as stack:
            with self._pause():
                pixels = self._pixels(spec.preprocessing)
                network, placed = self._open(member, spec, stack)
                network(placed(_normalised(pixels, rows[:1], spec.preprocessing))).cpu()
            for part in np.array_split(rows, -(-len(rows) // size)):
                with self._pause():
                    batch = placed(_normalised(pixels, part, spec.preprocessing))
                logits.append(network(batch).float().cpu().numpy())
            with self._pause():
                stack.close()
        return np.concatenate(logits)[:, _columns(self.store, entry)]

    def _open(self, member: int, spec: NetworkSpec, stack: ExitStack) -> Any:
        """Return (forward, place) of a network, which stays open or is closed with `stack`."""
        if member not in self._kept:
            n_bytes = spec.checkpoint.stat().st_size
            if self._kept_bytes + n_bytes > KEPT_BYTES:
                return stack.enter_context(streaming.network_on_device(spec, self.device))
            self._kept_bytes += n_bytes
            self._kept[member] = self._networks.enter_context(streaming.network_on_device(spec, self.device))
        return self._kept[member]

    @contextmanager
    def _pause(self) -> Iterator[None]:
        start = time.perf_counter()
        try:
            yield
        finally:
            self.uncounted += time.perf_counter() - start

    def _pixels(self, preprocessing: Preprocessing) -> Any:
        threads = image_splits.decoding_threads(self.store.config.dataset.num_workers)
        cache = self.store.workspace.image_cache
        return image_splits.open_images(self.images, preprocessing, image_cache=cache, threads=threads)

    def _per_image(self, once: Callable[[], Any]) -> float:
        """Return the median milliseconds per image over the runs; a slow combiner is run once."""
        seconds: list[float] = []
        while not seconds or (sum(seconds) < ENOUGH and len(seconds) < MOST):
            self.uncounted, start = 0.0, time.perf_counter()
            once()
            seconds.append(time.perf_counter() - start - self.uncounted)
        return round(1000 * float(np.median(seconds)) / len(self.images.sample_ids), 4)


def _normalised(pixels: Any, rows: np.ndarray, preprocessing: Preprocessing) -> Tensor:
    import torch

    return image_splits.normalise(torch.from_numpy(pixels.crops(rows.tolist())), preprocessing)


def _columns(store: Store, member: Member) -> list[int]:
    """Return the indices (C,) of the workspace's classes among the member's outputs."""
    return [member.classes.index(name) for name in store.catalog.classes]
