"""Image files are opened here and nowhere else in the pipeline: in the formats that networks are trained on, no others.

Pillow chooses a decoder by a file's content, not by its name, and some decoders start another program: an EPS file
named `.png` would be run by Ghostscript.
"""

from __future__ import annotations

import errno
import os
from pathlib import Path

from PIL import Image, UnidentifiedImageError

FORMATS = ("JPEG", "PNG", "BMP", "TIFF", "WEBP")  # Pillow's JPEG decoder opens MPO as well


def open_image(path: str | Path) -> Image.Image:
    """Open an image file; pixels are decoded when they are asked for.

    Raises UnidentifiedImageError, an OSError, for a file in none of the formats; it names the format of the file
    where Pillow knows it. Raises OSError for what is no regular file, which could block for ever.
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
    """Whether an opened file holds an animation or several pages, of which the first is the image.

    The further pictures of an MPO file are other views of the same photograph and do not count.
    """
    try:
        return image.format != "MPO" and getattr(image, "n_frames", 1) > 1
    except Exception:  # of damaged pages behind the first
        return True


def format_of(path: str | Path) -> str | None:
    """Pillow's name for the format that the first bytes of a file claim, if it is none of FORMATS; opens no decoder."""
    with open(path, "rb") as file:
        prefix = file.read(16)
    Image.init()
    for name in [name for name in Image.ID if name not in FORMATS]:
        accept = Image.OPEN[name][1]
        try:
            if accept is not None and accept(prefix):
                return name
        except Exception:  # of a prefix that is too short for this format
            continue
    return None
