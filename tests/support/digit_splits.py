"""Shared by tests: helpers that several test modules use."""

from __future__ import annotations

import hashlib

import numpy as np

from utils.predictions.image_splits import ImageSplit

COUNT = 21


def split_of(folder, count: int = COUNT, classes: int = 3) -> ImageSplit:
    """Random images of three shapes and as many classes."""
    from PIL import Image

    rng = np.random.default_rng(3)
    paths = []
    for number in range(count):
        path = folder / str(number % classes) / f"{number:03d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        shape = ((36, 36), (36, 50), (60, 36))[number % 3]
        Image.fromarray(rng.integers(0, 255, (*shape, 3), dtype=np.uint8)).save(path)
        paths.append(path)
    ids = tuple(f"{path.parent.name}/{path.name}" for path in paths)
    contents = tuple(hashlib.sha256(path.read_bytes()).hexdigest() for path in paths)
    names = tuple(map(str, range(classes)))
    return ImageSplit("train", names, ids, np.arange(count) % classes, tuple(paths), contents, "digest")
