"""Progress of a training on disk: a killed training resumes from its last saved epoch and ends with the same bytes."""

from __future__ import annotations

import random
import time
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import torch

from config import settings
from training.pipeline import write_checkpoint
from utils import logger

FORMAT = 2  # incremented whenever the record below changes
SHARE_OF_TIME = 20  # saving takes at most 1/20 of the time, even on a slow disk


class Progress:
    """The progress file of one training, `checkpoints/.progress/<backbone>_<unit>.pth`.

    A file that is damaged or was written for another `digest` is logged and removed. `seconds` is the minimum time
    between two saves (`DBT_PROGRESS_SECONDS`); 0 saves every epoch. `threads` is the number of intra-op threads that
    the training started with, None if it is not recorded; each save records it.
    """

    def __init__(self, path: Path, digest: str, seconds: float = settings.PROGRESS_SECONDS) -> None:
        self.path = path
        self.key = f"{FORMAT} {digest}"
        self.seconds = seconds
        self.threads: int | None = None
        self._saved = time.monotonic()
        self._cost = 0.0

    def load(self) -> dict[str, Any] | None:
        """The last saved record, its tensors on the CPU; None if there is no usable one."""
        if not self.path.is_file():
            return None
        try:
            with zipfile.ZipFile(self.path) as archive:
                broken = archive.testzip()  # torch does not verify checksums
            if broken:
                raise zipfile.BadZipFile(broken)
            record = torch.load(self.path, map_location="cpu", weights_only=True)
            problem = None if record["key"] == self.key else "belongs to other data, settings or another version"
        except Exception as error:  # a damaged file may raise anything
            problem = f"is damaged ({type(error).__name__})"
        if problem is None:
            self.threads = record.get("threads")
            return record
        logger.warning("%s %s; it is removed and the training starts again", self.path, problem)
        self.path.unlink(missing_ok=True)
        return None

    def due(self) -> bool:
        """Whether enough time has passed since the last save."""
        passed = time.monotonic() - self._saved
        return self.seconds == 0 or passed >= max(self.seconds, SHARE_OF_TIME * self._cost)

    def save(self, record: dict[str, Any]) -> None:
        """Replace the file. A failed write, for example on a full disk, is logged and does not end the training."""
        start = time.monotonic()
        try:
            write_checkpoint(self.path, record | {"key": self.key, "threads": self.threads})
        except (OSError, RuntimeError) as error:  # torch's writer raises either on a full disk
            logger.warning("%s: progress cannot be saved (%s); the training continues", self.path, error, dedupe=True)
        self._saved = time.monotonic()
        self._cost = self._saved - start


def random_state(device: torch.device) -> dict[str, Any]:
    """States of all random generators that training may use, as values that `weights_only` can load."""
    bits = np.random.get_state(legacy=False)
    state = {
        "torch": torch.get_rng_state(),
        "numpy": bits | {"state": bits["state"] | {"key": bits["state"]["key"].tolist()}},
        "random": random.getstate(),
    }
    if device.type == "cuda":
        state["cuda"] = torch.cuda.get_rng_state_all()
    return state


def restore_random_state(state: dict[str, Any], device: torch.device) -> None:
    """Set every generator to a state returned by `random_state`."""
    torch.set_rng_state(state["torch"])
    bits = state["numpy"]
    key = np.array(bits["state"]["key"], dtype=np.uint32)
    np.random.set_state(bits | {"state": bits["state"] | {"key": key}})
    random.setstate(state["random"])
    if device.type == "cuda" and "cuda" in state:
        torch.cuda.set_rng_state_all(state["cuda"])
