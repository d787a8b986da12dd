"""Runs in TensorBoard's format: `evaluate --tensorboard DIR`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from utils import base_back
from utils.core.artifacts import digest_of, read_record, write_json
from utils.core.errors import UserError, cannot_write
from utils.core.record_forms import Each, Form
from utils.evaluation.trackers.tracked_runs import TrackedRun

INSTALL = 'Install the extra tensorboard: pip install "ensemble-system[tensorboard]", or pip install tensorboard'
RECORD = "evaluation.json"
"""File in a run's folder: `{scores_digest, step, tags}` of the last evaluation in it."""
FORM: Form = {"scores_digest": str, "step": int, "tags": Each(str)}


class TensorboardTracker:
    """A folder of runs `<workspace>-<digest of its path>/<split>/<model>`; evaluations with new scores are steps."""

    title = "tensorboard"

    def __init__(self, folder: str) -> None:
        """Raises UserError without TensorBoard and if `folder` is a file."""
        self.place = folder
        self._folder = Path(folder).expanduser().absolute()
        if self._folder.exists() and not self._folder.is_dir():
            raise UserError(f"evaluate --tensorboard {folder}: a file. Expected a folder, which may be new")
        try:
            import torch.utils.tensorboard  # noqa: F401
        except ImportError as error:
            raise UserError(f"evaluate --tensorboard: TensorBoard cannot be imported ({error}). {INSTALL}") from error

    def write(self, runs: Sequence[TrackedRun]) -> int:
        """Write the runs whose scores are not stored yet, update the tags of the others; return the number of new runs.

        Raises UserError if the folder cannot be written.
        """
        try:
            return sum(self._write(run) for run in runs)
        except OSError as error:
            raise cannot_write(self._folder, error) from error

    def _write(self, run: TrackedRun) -> bool:
        """Write a run or update its tags; return whether it is new."""
        from torch.utils.tensorboard import SummaryWriter

        root = Path(run.tags["workspace"])
        folder = self._folder / f"{root.name}-{digest_of(str(root))[:8]}" / run.tags["split"] / run.folder
        earlier = read_record(folder / RECORD, remedy="Remove it, then evaluate again", form=FORM)
        is_new = earlier is None or earlier["scores_digest"] != run.scores_digest
        if earlier and not is_new and earlier["tags"] == run.tags:
            return False
        step = 0 if earlier is None else earlier["step"] + is_new
        with SummaryWriter(str(folder)) as writer:
            table = [f"| {key} | {value} |" for key, value in run.tags.items()]
            writer.add_text("tags", "\n".join(["| tag | value |", "|---|---|", *table]), step)
            if is_new:
                for name, value in run.scalars.items():
                    writer.add_scalar(name, value, step)
                for kind, path in run.pictures.items():
                    writer.add_image(kind, _pixels(path), step, dataformats="HWC")
        write_json(folder / RECORD, {"scores_digest": run.scores_digest, "step": step, "tags": dict(run.tags)})
        return is_new


def _pixels(path: Path) -> np.ndarray:
    """Return the pixels of a picture, uint8 (H, W, 3)."""
    with base_back.load_bundled("image_files").open_image(path) as image:
        return np.asarray(image.convert("RGB"))
