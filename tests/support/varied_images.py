"""Generated photographs of varied shapes, modes and formats."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image

SHAPES = ((320, 240), (240, 320), (500, 180), (180, 410), (224, 224), (256, 256), (90, 60), (61, 130), (300, 299))
"""(width, height): landscape, portrait, square, and smaller than a network's input."""
MODES = ("RGB", "RGB", "L", "RGBA", "RGB", "P", "RGB")


def write_varied_images(folder: Path, count: int, seed: int = 0) -> list[Path]:
    """`count` files with smooth structure and noise, `<number>.png` and `<number>.jpg`."""
    rng = np.random.default_rng(seed)
    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    for number in range(count):
        width, height = SHAPES[number % len(SHAPES)]
        coarse = Image.fromarray(rng.integers(0, 256, (5, 7, 3), dtype=np.uint8)).resize((width, height), 3)
        noisy = np.asarray(coarse, dtype=np.int16) + rng.integers(-40, 41, (height, width, 3))
        image = Image.fromarray(np.clip(noisy, 0, 255).astype(np.uint8)).convert(MODES[number % len(MODES)])
        if image.mode == "RGBA":
            image.putalpha(Image.fromarray(rng.integers(0, 256, (height, width), dtype=np.uint8)))
        suffix = "jpg" if image.mode in ("RGB", "L") and number % 2 else "png"
        paths.append(folder / f"{number:03d}.{suffix}")
        image.save(paths[-1])
    return paths
