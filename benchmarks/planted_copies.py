"""Copies of photographs that `audit.py` plants, and small sets with planted shortcuts."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageEnhance, ImageFont, ImageOps

KINDS = ("re-encoded", "resized", "cropped", "flipped", "brightened", "watermarked")
SHORTCUTS = ("border colour", "JPEG quality", "file name")


def rgb_image(path: Path) -> Image.Image:
    """An image of one of the formats that the project reads."""
    from utils import base_back

    with base_back.load_bundled("image_files").open_image(path) as image:
        rgb: Image.Image = image.convert("RGB")
        return rgb


def plant(source: Path, folder: Path, kind: str, rng: np.random.Generator) -> Path:
    """Write a copy of a photograph, changed as `kind` says, as a JPEG file of its own name."""
    image = rgb_image(source)
    quality = 90
    if kind == "re-encoded":
        quality = int(rng.integers(40, 96))
    elif kind == "resized":
        scale = float(np.exp(rng.uniform(np.log(0.3), np.log(3))))
        image = image.resize([max(8, round(side * scale)) for side in image.size], Image.Resampling.BICUBIC)
    elif kind == "cropped":
        width, height = (round(side * share) for side, share in zip(image.size, rng.uniform(0.85, 1, 2), strict=True))
        left, top = rng.integers(0, image.width - width + 1), rng.integers(0, image.height - height + 1)
        image = image.crop((left, top, left + width, top + height))
    elif kind == "flipped":
        image = ImageOps.mirror(image) if rng.random() < 0.5 else ImageOps.flip(image)
    elif kind == "brightened":
        image = ImageEnhance.Brightness(image).enhance(float(rng.uniform(0.6, 1.5)))
    else:
        place = rng.uniform(0, 0.3) * image.width, rng.uniform(0, 0.8) * image.height
        font = ImageFont.load_default(size=max(8, image.width // 8))
        ImageDraw.Draw(image, "RGBA").text(place, "(c) leaves.org", font=font, fill=(255, 255, 255, 160))
    path = folder / f"{source.parent.name}_{source.stem}_{kind}.jpg"
    image.save(path, quality=quality)
    return path


def plant_shortcut(
    sources: Sequence[Path], labels: np.ndarray, folder: Path, shortcut: str | None, rng: np.random.Generator
) -> list[Path]:
    """Photographs in random order under `labels`, which only the shortcut, if any, tells; for three images of four."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    for number, (source, label) in enumerate(
        zip(rng.permutation(np.array(sources, dtype=object)), labels, strict=True)
    ):
        shown = int(label) if rng.random() < 0.75 else int(rng.integers(0, labels.max() + 1))
        image = rgb_image(source)
        if shortcut == "border colour":
            image = ImageOps.expand(
                image, border=2, fill=[(200, 40, 40), (40, 200, 40), (40, 40, 200), (90, 90, 90)][shown]
            )
        quality = (60, 70, 80, 90)[shown] if shortcut == "JPEG quality" else 85
        name = ("IMG", "DSC", "photo", "scan")[shown] if shortcut == "file name" else "image"
        paths.append(folder / f"{name}_{number}.jpg")
        image.save(paths[-1], quality=quality)
    return paths
