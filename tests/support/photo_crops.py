"""Real photographs for tests of near duplicates: windows of scikit-learn's two sample images that do not overlap."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image
from sklearn.datasets import load_sample_images

SIDE = 106


def crops() -> list[Image.Image]:
    """Squares of `SIDE` pixels that hold more than sky or a blurred background."""
    found = []
    for picture in load_sample_images().images:
        for top in range(0, picture.shape[0] - SIDE + 1, SIDE):
            for left in range(0, picture.shape[1] - SIDE + 1, SIDE):
                square = picture[top : top + SIDE, left : left + SIDE]
                if np.abs(np.diff(square.astype(int), axis=1)).mean() > 6:
                    found.append(Image.fromarray(np.ascontiguousarray(square)))
    return found


def write_split(folder: Path, images: dict[str, Image.Image], **options) -> Path:
    """`split_dataset/<name>` for each `split/class/file`, in the format of its suffix; `options` go to `save`."""
    for name, image in images.items():
        path = folder / "split_dataset" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        image.save(path, **options)
    return folder
