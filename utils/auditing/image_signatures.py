"""Signatures of images for the audit: a grey thumbnail, colours of border and background, and file properties.

Each file is opened once. A signature takes about five kilobytes, independent of the size of the image.
"""

from __future__ import annotations

import hashlib
import math
import warnings
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from utils import base_back
from utils.auditing.thumbnail_views import FLIPS, SIDE

if TYPE_CHECKING:
    from PIL import Image

FRAME = 6  # width in pixels of a thumbnail's frame that counts as background
BINS = 4  # of each colour channel in the histogram of the background
POINTS = (0, SIDE // 2, SIDE - 1)
TOLERANT_SIDE = 40  # pixels; images with a shorter side are compared by equal pixels only
STANDARD_LUMINANCE = 3688  # sum of the quantisation table of quality 50 (ITU-T T.81, table K.1)
CAMERA_TAGS = {"make": 0x010F, "model": 0x0110, "software": 0x0131}


@dataclass(frozen=True)
class FileFacts:
    """Properties of an image file other than pixels."""

    bytes: int
    width: int
    """In pixels, as stored; 0 if the file cannot be read"""
    height: int
    format: str
    mode: str
    quantisation: float
    """Mean step of the luminance table of a JPEG file relative to quality 50; 0 for other formats"""
    exif_tags: int
    camera: str
    """Make, model and software in the EXIF data"""


@dataclass(frozen=True)
class Signatures:
    """Signatures of N images, in the order of the paths."""

    thumbnails: np.ndarray
    """uint8 (N, SIDE, SIDE), grey; upright by EXIF"""
    border: np.ndarray
    """uint8 (N, 16, 3): mean and deviation of each side's outermost pixels, then the colours of eight border points"""
    background: np.ndarray
    """float32 (N, BINS**3): share of each colour among the pixels of the frame"""
    brightness: np.ndarray
    """float32 (N,): mean grey level"""
    deviation: np.ndarray
    """float32 (N,): standard deviation of the grey levels; near 0 for an empty image"""
    pixel_digests: tuple[str, ...]
    """Digests of small images, invariant to flips and quarter turns; empty for large images and unreadable files"""
    files: tuple[FileFacts, ...]
    problems: dict[int, str]
    """{index: reason why the file cannot be decoded}"""

    @property
    def readable(self) -> np.ndarray:
        """bool (N,): whether the file could be decoded."""
        mask = np.ones(len(self.files), dtype=bool)
        mask[list(self.problems)] = False
        return mask

    @property
    def is_tolerant(self) -> np.ndarray:
        """bool (N,): large enough, and with enough contrast, for a comparison that tolerates editing."""
        sides = np.array([min(file.width, file.height) for file in self.files])
        return self.readable & (sides >= TOLERANT_SIDE) & (self.deviation >= 3)


def read(paths: Sequence[Path], *, threads: int) -> Signatures:
    """Signatures of image files, with `threads` decoding threads."""
    count = len(paths)
    thumbnails = np.zeros((count, SIDE, SIDE), dtype=np.uint8)
    border = np.zeros((count, 16, 3), dtype=np.uint8)
    background = np.zeros((count, BINS**3), dtype=np.float32)
    digests = [""] * count
    files: list[FileFacts] = [FileFacts(0, 0, 0, "", "", 0, 0, "")] * count
    problems: dict[int, str] = {}

    def read_into(index: int) -> None:
        try:
            with modules[0].open_image(paths[index]) as image:
                files[index] = _file_facts(paths[index], image)
                colours, digests[index] = _small(image, modules[1])
            thumbnails[index], border[index], background[index] = _described(colours)
        except Exception as error:  # decoders of damaged files may raise anything
            problems[index] = str(error).replace(str(paths[index]), "it") or type(error).__name__

    modules = [base_back.load_bundled(name) for name in ("image_files", "resizing")]
    with warnings.catch_warnings():
        warnings.simplefilter(
            "ignore"
        )  # about metadata, transparent palettes and large sizes, which are irrelevant here
        with ThreadPoolExecutor(threads) as pool:
            for _ in pool.map(read_into, range(count), chunksize=16):
                pass
    brightness = thumbnails.mean(axis=(1, 2), dtype=np.float32)
    deviation = np.array([thumbnail.std() for thumbnail in thumbnails], dtype=np.float32)
    return Signatures(
        thumbnails,
        border,
        background,
        brightness,
        deviation,
        tuple(digests),
        tuple(files),
        dict(sorted(problems.items())),
    )


def _small(image: Image.Image, resizing: Any) -> tuple[np.ndarray, str]:
    """Upright RGB thumbnail, uint8 (SIDE, SIDE, 3), and for a small image the digest of its pixels."""
    from PIL import Image

    is_small = min(image.size) < TOLERANT_SIDE
    if not is_small:
        image.draft("RGB", (2 * SIDE, 2 * SIDE))  # a JPEG is decoded at a fraction of its size
    upright = resizing.decoded(image, "apply")
    digest = _pixel_digest(np.asarray(upright)) if is_small else ""
    return np.asarray(upright.resize((SIDE, SIDE), Image.Resampling.BILINEAR, reducing_gap=2.0)), digest


def _pixel_digest(pixels: np.ndarray) -> str:
    """Digest of pixels (H, W, 3), invariant to all eight combinations of flips and quarter turns."""
    turned = []
    for transpose, vertical, horizontal in FLIPS:
        view = pixels.transpose(1, 0, 2) if transpose else pixels
        view = view[:: -1 if vertical else 1, :: -1 if horizontal else 1]
        turned.append(hashlib.sha256(repr(view.shape).encode() + view.tobytes()).hexdigest())
    return min(turned)


def _described(colours: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Grey thumbnail, border colours and histogram of the background of an RGB thumbnail."""
    grey = (colours @ np.array([0.299, 0.587, 0.114])).round().astype(np.uint8)
    sides = [colours[0], colours[-1], colours[:, 0], colours[:, -1]]
    points = [colours[y, x] for y in POINTS for x in POINTS if (y, x) != (POINTS[1], POINTS[1])]
    border = np.stack([*(s.mean(axis=0) for s in sides), *(s.std(axis=0) for s in sides), *points]).astype(np.uint8)
    is_frame = np.ones((SIDE, SIDE), dtype=bool)
    is_frame[FRAME:-FRAME, FRAME:-FRAME] = False
    bins = (colours[is_frame] // (256 // BINS)) @ np.array([BINS**2, BINS, 1])
    background = np.bincount(bins, minlength=BINS**3) / is_frame.sum()
    return grey, border, background


def _file_facts(path: Path, image: Image.Image) -> FileFacts:
    tables = getattr(image, "quantization", None) or {}
    quantisation = sum(tables[0]) / STANDARD_LUMINANCE if 0 in tables else 0.0
    tags, camera = 0, ""
    if image.format != "PNG" or "exif" in image.info:  # otherwise, reading EXIF data would decode the image
        try:
            exif = image.getexif()
            tags = len(exif)
            camera = " ".join(str(exif.get(tag, "")).strip("\0 ") for tag in CAMERA_TAGS.values()).strip()
        except Exception:  # damaged metadata do not affect the pixels
            tags = -1
    return FileFacts(
        path.stat().st_size, *image.size, str(image.format), image.mode, float(quantisation), tags, camera[:80]
    )


def jpeg_quality(quantisation: float) -> int | None:
    """The quality setting of the Independent JPEG Group's library with this luminance table; None for other formats."""
    if not quantisation or math.isnan(quantisation):
        return None
    return round(max(1.0, min(100.0, 100 - 50 * quantisation if quantisation <= 1 else 50 / quantisation)))
