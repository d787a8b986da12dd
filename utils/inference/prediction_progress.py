"""Progress of a prediction, as log lines."""

from __future__ import annotations

import logging
import time

logger = logging.getLogger("disease_pipeline")

PROGRESS_SECONDS = 10.0
"""Between two lines of progress within a block."""


class PredictionProgress:
    """Logs progress and the estimated remaining time, every few seconds and after each block."""

    def __init__(self, n_images: int, n_networks: int) -> None:
        self.n_images, self.n_networks = n_images, n_networks
        self.total, self.done = n_images * n_networks, 0
        self.start = self.last_logged = time.monotonic()

    def step(self, n_images: int) -> None:
        """Count images that one network has processed."""
        self.done += n_images
        now = time.monotonic()
        if now - self.last_logged >= PROGRESS_SECONDS:
            self.last_logged = now
            remaining = (now - self.start) / self.done * (self.total - self.done)
            percent = 100 * self.done / self.total
            logger.info(
                "%.0f %% of %d images by %d networks; about %.0f s left",
                percent,
                self.n_images,
                self.n_networks,
                remaining,
            )

    def end_block(self, n_images: int) -> None:
        """Log that so many images are processed, including those that could not be read."""
        self.done = n_images * self.n_networks
        elapsed = time.monotonic() - self.start
        remaining = elapsed / n_images * (self.n_images - n_images)
        logger.info("[%d/%d] images; about %.0f s left", n_images, self.n_images, remaining)
