"""A scan of a workspace with one listed train image of each class, whose files are not there."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from given_predictions import CONFIG, empty_workspace

from utils.core.artifacts import FileDigests
from utils.discovery.identification import Scan
from utils.predictions.image_splits import ImageSplit

CLASSES = ("ant", "bee", "cat")


def scan_of(folder: Path) -> Scan:
    """The scan of a new workspace in `folder`, which has an empty folder for checkpoints."""
    workspace = empty_workspace(folder)
    workspace.checkpoints.mkdir()
    ids = tuple(f"{name}/a.png" for name in CLASSES)
    train = ImageSplit("train", CLASSES, ids, np.arange(3), tuple(map(Path, ids)), ("0", "1", "2"), "digest")
    return Scan(CONFIG, workspace, FileDigests(workspace.digests), {"train": train})
