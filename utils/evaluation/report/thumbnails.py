"""Thumbnails for the report, in bounded time, memory and size for any file.

EXIF rotation is applied and 16-bit images are stretched to the full range for display; networks do neither.
"""

from __future__ import annotations

import base64
import io
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from utils import base_back

if TYPE_CHECKING:
    from PIL import Image

SIDE = 160  # pixels of the longer side
MAX_PIXELS = 64_000_000  # a larger image is not decoded
MAX_FILE_BYTES = 256_000_000
QUALITY = 80
SMALL = 64  # pixels; up to this size every pixel is kept, and the page enlarges the image without blur
BACKGROUND = (128, 128, 128)  # of transparent pixels, so that black and white drawings remain visible


@dataclass(frozen=True)
class Thumbnail:
    """A small copy of an image, or the reason why there is none."""

    uri: str | None
    """`data:image/...;base64,...`"""
    width: int = 0
    height: int = 0
    problem: str = ""


def thumbnail(path: Path) -> Thumbnail:
    """Return a small copy of an image file, or the reason why it is too large or cannot be decoded."""
    image_files = base_back.load_bundled("image_files")
    try:
        size = path.stat().st_size
        if size > MAX_FILE_BYTES:
            return Thumbnail(None, problem=f"a file of {size / 1e6:.0f} MB is too large to show")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # large images are refused below; metadata does not matter here
            with image_files.open_image(path) as image:
                width, height = image.size
                if width * height > MAX_PIXELS:
                    return Thumbnail(None, problem=f"{width} x {height} pixels are too large to show")
                return _encoded(_small(image))
    except FileNotFoundError:
        return Thumbnail(None, problem="the file is missing")
    # Decoders of damaged files raise exceptions of many classes, from struct.error to IndexError.
    except Exception as error:
        return Thumbnail(
            None, problem=f"cannot be decoded ({str(error).replace(str(path), 'it') or type(error).__name__})"
        )


def of_pixels(pixels: np.ndarray) -> Thumbnail:
    """Return a small copy of an image, uint8 (H, W, 3)."""
    from PIL import Image

    image = Image.fromarray(pixels)
    image.thumbnail((SIDE, SIDE), Image.Resampling.BILINEAR)
    return _encoded(image)


def _small(image: Image.Image) -> Image.Image:
    """Return the first frame in RGB, rotated by its EXIF data, with at most `SIDE` pixels per side."""
    from PIL import Image, ImageOps

    image.draft("RGB", (2 * SIDE, 2 * SIDE))  # a JPEG is decoded at a fraction of its size
    if image.mode in ("I", "F") or image.mode.startswith("I;16"):
        image = _eight_bits(image)
    image = ImageOps.exif_transpose(image)
    if "A" in image.getbands() or "transparency" in image.info:
        image = image.convert("RGBA")
        below = Image.new("RGBA", image.size, (*BACKGROUND, 255))
        image = Image.alpha_composite(below, image)
    image = image.convert("RGB")
    image.thumbnail((SIDE, SIDE), Image.Resampling.BILINEAR, reducing_gap=2.0)
    return image


def _eight_bits(image: Image.Image) -> Image.Image:
    """Stretch the range of the image to 0..255, so that dark 16-bit images are visible; EXIF data is kept."""
    from PIL import Image

    values = np.nan_to_num(np.asarray(image, dtype=np.float64), posinf=0.0, neginf=0.0)
    low, high = float(values.min()), float(values.max())
    scaled = (values - low) / max(high - low, 1e-12) * 255
    converted = Image.fromarray(scaled.astype(np.uint8))
    converted.info = dict(image.info)
    if exif := image.getexif():
        converted.info["exif"] = exif.tobytes()
    return converted


def _encoded(image: Image.Image) -> Thumbnail:
    width, height = image.size
    is_small, buffer = max(width, height) <= SMALL, io.BytesIO()
    if is_small:
        image.save(buffer, "PNG", optimize=True)
    else:
        image.save(buffer, "JPEG", quality=QUALITY)
    text = base64.b64encode(buffer.getvalue()).decode("ascii")
    return Thumbnail(f"data:image/{'png' if is_small else 'jpeg'};base64,{text}", width, height)
