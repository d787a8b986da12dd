"""Progress of a prediction: a bar on a terminal, log lines elsewhere."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable

from utils.core import progress_bar

logger = logging.getLogger("disease_pipeline")

PROGRESS_SECONDS = 10.0
"""Minimum time between two progress lines within a block."""


class PredictionProgress:
    """Logs progress and the estimated remaining time, every few seconds and after each block.

    `advance(n_images)` moves a bar; if one is shown, nothing is logged.
    """

    def __init__(self, n_images: int, n_networks: int, advance: Callable[[int], object] = lambda count: None) -> None:
        self._advance, self._is_logged = advance, not progress_bar.is_shown()
        self.n_images, self.n_networks = n_images, n_networks
        self.total, self.done = n_images * n_networks, 0
        self.start = self.last_logged = time.monotonic()

    def step(self, n_images: int) -> None:
        """Count images that one network has processed."""
        self.done += n_images
        self._advance(n_images)
        now = time.monotonic()
        if self._is_logged and now - self.last_logged >= PROGRESS_SECONDS:
            self.last_logged = now
            remaining = (now - self.start) / self.done * (self.total - self.done)
            percent = 100 * self.done / self.total
            logger.info(
                "%.0f%% of %d images by %d networks; about %.0f s left",
                percent,
                self.n_images,
                self.n_networks,
                remaining,
            )

    def end_block(self, n_images: int) -> None:
        """Log that `n_images` further images are processed, including unreadable ones."""
        self._advance(n_images * self.n_networks - self.done)
        self.done = n_images * self.n_networks
        if not self._is_logged:
            return
        elapsed = time.monotonic() - self.start
        remaining = elapsed / n_images * (self.n_images - n_images)
        logger.info("[%d/%d] images; about %.0f s left", n_images, self.n_images, remaining)
