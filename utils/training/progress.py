"""The file with the state of an interrupted training, and conversions of states for it."""

from __future__ import annotations

import logging
import os
import time
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from utils.core.artifacts import replacing
from utils.core.links import remove_file

logger = logging.getLogger("disease_pipeline")

SECONDS = 5.0  # default minimum time between two saves; DBT_PROGRESS_SECONDS overrides it
MAX_TIME_FRACTION = 0.05  # largest fraction of the training time for saving


def copied_weights(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Contiguous CPU copies of the tensors of a state dict, independent of the network's memory format."""
    copied = {name: tensor.detach().cpu() for name, tensor in weights.items()}
    return {name: tensor.clone(memory_format=torch.contiguous_format) for name, tensor in copied.items()}


def schedule_state(schedule: torch.optim.lr_scheduler.LRScheduler) -> dict[str, Any]:
    """The state of a learning-rate schedule without functions, so that a file contains plain values only."""
    plain = (int, float, str, list, type(None))
    return {key: value for key, value in schedule.state_dict().items() if isinstance(value, plain)}


class TrainingProgress:
    """A file with the state of an interrupted training, valid for one key.

    `key` is the digest of everything that the training depends on. `seconds` is the minimum time between two saves.
    """

    def __init__(self, path: Path, key: str) -> None:
        self.path, self.key = path, key
        self.seconds = float(os.environ.get("DBT_PROGRESS_SECONDS") or SECONDS)
        self._last_save, self._save_seconds = time.monotonic(), 0.0

    def load(self) -> dict[str, Any] | None:
        """Read the last saved record; None if there is none.

        A file that is damaged or has another key is removed with a warning.
        """
        if not self.path.is_file():
            return None
        try:
            with zipfile.ZipFile(self.path) as archive:
                if archive.testzip():  # torch does not verify checksums
                    raise zipfile.BadZipFile
            record: dict[str, Any] = torch.load(self.path, map_location="cpu", weights_only=True)
            problem = None if record["key"] == self.key else "belongs to another teacher, other images or settings"
        except Exception as error:  # a damaged file may raise anything
            problem = f"is damaged ({type(error).__name__})"
        if problem is None:
            return record
        logger.warning("%s %s; it is removed and this training starts from the beginning", self.path, problem)
        remove_file(self.path)
        return None

    def is_due(self) -> bool:
        """Whether enough time has passed since the last save."""
        passed = time.monotonic() - self._last_save
        return self.seconds == 0 or passed >= max(self.seconds, self._save_seconds / MAX_TIME_FRACTION)

    def save(self, record: Mapping[str, Any]) -> None:
        """Replace the file."""
        start = time.monotonic()
        with replacing(self.path) as temporary, temporary.open("wb") as file:
            torch.save({**record, "key": self.key}, file)
        self._last_save = time.monotonic()
        self._save_seconds = self._last_save - start
