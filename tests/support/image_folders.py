"""Small photographs for tests of image sets: each of its own content, written in any layout."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import numpy as np
from PIL import Image


def write_photo(path: Path, seed: int, size: tuple[int, int] = (20, 16), **options) -> Path:
    """One image of random blocks, in the format of its suffix; `options` go to Pillow's `save`."""
    path.parent.mkdir(parents=True, exist_ok=True)
    blocks = np.random.default_rng(seed).integers(0, 255, (4, 4, 3), dtype=np.uint8)
    Image.fromarray(blocks).resize(size, Image.Resampling.NEAREST).save(path, **options)
    return path


def write_photos(folder: Path, names: Iterable[str]) -> list[Path]:
    """One image for each name, below `folder`."""
    return [write_photo(folder / name, seed) for seed, name in enumerate(names)]


def write_class_folders(folder: Path, classes: Iterable[str], count: int, *, first_seed: int = 0) -> Path:
    """`<class>/<number>.png`, `count` for each class."""
    for place, name in enumerate(classes):
        for number in range(count):
            write_photo(folder / name / f"{number}.png", first_seed + 1000 * place + number)
    return folder


def write_manifest(folder: Path, text: str, *, name: str = "metadata.csv") -> Path:
    """A manifest, and an image for each first field of its lines that ends like one."""
    lines = [line.split(",")[0].strip('"') for line in text.splitlines()]
    write_photos(folder, dict.fromkeys(line for line in lines if line.endswith((".png", ".jpg"))))
    path = folder / name
    path.write_text(text)
    return path
