"""Opens image files for the whole pipeline, only in the formats that networks are trained on.

Pillow selects a decoder by a file's content, not by its name, and some decoders start another program: an EPS file
named `.png` would be run by Ghostscript.
"""

from __future__ import annotations

import errno
import os
from pathlib import Path

from PIL import Image, UnidentifiedImageError

FORMATS = ("JPEG", "PNG", "BMP", "TIFF", "WEBP")  # Pillow's JPEG decoder opens MPO as well


def open_image(path: str | Path) -> Image.Image:
    """Open an image file; pixels are decoded on access.

    Raises UnidentifiedImageError, an OSError, for a file in none of FORMATS, naming its format if Pillow knows it.
    Raises OSError for anything but a regular file, which could block forever.
    """
    if os.path.exists(path) and not os.path.isfile(path):
        raise OSError(errno.EINVAL, "a folder, a FIFO or a device; expected a regular file", str(path))
    try:
        return Image.open(path, formats=FORMATS)
    except UnidentifiedImageError as error:
        if (name := format_of(path)) is None:
            raise
        expected = ", ".join(("MPO", *FORMATS))
        raise UnidentifiedImageError(f"its content is of the format {name}; expected one of {expected}") from error


def has_more_frames(image: Image.Image) -> bool:
    """Whether an opened file has several frames or pages, of which only the first is used.

    Further pictures in an MPO file are other views of the same photograph and do not count.
    """
    try:
        return image.format != "MPO" and getattr(image, "n_frames", 1) > 1
    except Exception:  # damaged pages after the first
        return True


def format_of(path: str | Path) -> str | None:
    """Pillow's name of the format by the first bytes of a file, if it is not in FORMATS; opens no decoder."""
    with open(path, "rb") as file:
        prefix = file.read(16)
    Image.init()
    for name in [name for name in Image.ID if name not in FORMATS]:
        accept = Image.OPEN[name][1]
        try:
            if accept is not None and accept(prefix):
                return name
        except Exception:  # the prefix is too short for this format
            continue
    return None
