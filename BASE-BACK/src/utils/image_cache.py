"""Every image decoded once: uint8 pixels, keyed by the file's content, memory-mapped by whoever trains or predicts.

An image is stored as `Resize(side)` leaves it (shorter side `side`, longer side in proportion, bilinear), so that a
centre crop of it is, bit for bit, what the evaluation transform sees, and a random crop has the whole image to choose
from. One pack is two files, `<side>_<digest>.npy` with the bytes and `<side>_<digest>.npz` with the index, the latter
written last: a pack without index does not exist. Packs are never changed; new images make a new pack.
"""

from __future__ import annotations

import hashlib
import logging
import os
import threading
import warnings
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from .files import atomic_path

PACK_BYTES = 1 << 27  # held in memory until the pack is written
DECODE_AHEAD = 64  # images in flight between the decoding threads and the writer
LARGE_PIXELS = 1 << 25  # images above this are decoded one at a time, so that threads do not multiply their memory
LARGEST_RESIZED = 1 << 26

logger = logging.getLogger("disease_pipeline")
_one_large_image = threading.Lock()


class UnreadableImages(ValueError):
    """Files that no image can be decoded from."""

    def __init__(self, problems: Sequence[tuple[Path, str]]) -> None:
        self.problems = list(problems)
        shown = "; ".join(f"{path}: {reason}" for path, reason in self.problems[:5])
        more = f"; and {len(self.problems) - 5} more" if len(self.problems) > 5 else ""
        super().__init__(f"{len(self.problems)} unreadable image(s): {shown}{more}")


@dataclass(frozen=True)
class DecodedImages:
    """Pixels of N images in the order in which they were asked for; nothing is in memory until it is read."""

    packs: tuple[np.ndarray, ...]
    """Flat uint8 memory maps."""
    pack: np.ndarray
    """Which pack holds image n, (N,)."""
    offset: np.ndarray
    """Where in it the image starts, (N,)."""
    height: np.ndarray
    """(N,)"""
    width: np.ndarray
    """(N,)"""

    def __len__(self) -> int:
        return len(self.offset)

    def image(self, row: int) -> np.ndarray:
        """Pixels of one image, uint8 (height, width, 3)."""
        height, width, start = int(self.height[row]), int(self.width[row]), int(self.offset[row])
        flat = self.packs[self.pack[row]][start : start + height * width * 3]
        return flat.reshape(height, width, 3)

    def centre_crops(self, rows: Sequence[int] | np.ndarray, size: int) -> np.ndarray:
        """Centre squares of the given rows, uint8 (B, size, size, 3)."""
        crops = np.empty((len(rows), size, size, 3), dtype=np.uint8)
        for place, row in enumerate(rows):
            image = self.image(int(row))
            top, left = (round((length - size) / 2) for length in image.shape[:2])
            crops[place] = image[top : top + size, left : left + size]
        return crops


def resized_side(size: int) -> int:
    """Shorter side to which an image is resized before a square of `size` is cut from it."""
    return int(size * 1.14)


def _read_image(path: Path, sides: Sequence[int]) -> tuple[dict[int, np.ndarray], str]:
    """{side: RGB pixels, uint8 (height, width, 3), whose shorter side is `side`} of one file, and Pillow's mode.

    Ignores EXIF orientation, as the evaluation transform does, and clips 16 bits per channel to 8 in the same way.
    Raises ValueError with the path and the reason.
    """
    from .image_files import open_image

    try:
        with open_image(path) as image:
            mode = image.mode
            if image.width * image.height > LARGE_PIXELS:
                with _one_large_image:
                    return _resized(image, sides), mode
            return _resized(image, sides), mode
    except Exception as error:  # decoders of damaged files raise whatever they meet, from struct.error to IndexError
        reason = str(error).replace(repr(str(path)), "it").replace(str(path), "it")
        raise ValueError(f"{path}: cannot be decoded ({reason})") from error


def _resized(image: Any, sides: Sequence[int]) -> dict[int, np.ndarray]:
    from PIL import Image

    width, height = image.size
    long, short = max(width, height), min(width, height)
    targets = {}
    for side in sides:
        length = int(side * long / short)
        if side * length > LARGEST_RESIZED:
            raise ValueError(f"{width} x {height} pixels, and still {side * length} with its shorter side at {side}")
        targets[side] = (side, length) if width <= height else (length, side)
    rgb = image.convert("RGB")
    return {side: np.asarray(rgb.resize(size, Image.Resampling.BILINEAR)) for side, size in targets.items()}


def open_images(
    paths: Sequence[Path],
    contents: Sequence[str],
    side: int,
    folder: Path,
    *,
    threads: int | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> DecodedImages:
    """Pixels of the given files from the packs in `folder`; what no pack holds is decoded first, into a new one.

    `contents` are the files' SHA-256 digests; `threads` decode side by side (default: the cores,
    eight at most). Raises `UnreadableImages` after everything readable was stored.
    """
    decode_images(paths, contents, [side], folder, threads=threads, progress=progress)
    index = _read_indices(folder, side)
    entries = [index[content] for content in contents]
    names = sorted({entry[0] for entry in entries})
    packs = tuple(np.load(name, mmap_mode="r") for name in names)
    pack = np.array([names.index(entry[0]) for entry in entries], dtype=np.int32)
    offset, height, width = (np.array([entry[place] for entry in entries], dtype=np.int64) for place in (1, 2, 3))
    return DecodedImages(packs, pack, offset, height, width)


def decode_images(
    paths: Sequence[Path],
    contents: Sequence[str],
    sides: Sequence[int],
    folder: Path,
    *,
    threads: int | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> None:
    """Store what no pack in `folder` holds yet at one of the `sides`; each file is decoded once for all of them.

    Arguments as for `open_images`. Says once how many images lose range. Raises `UnreadableImages` after everything
    readable was stored.
    """
    lacking: dict[str, tuple[Path, list[int]]] = {}
    for side in sides:
        index = _read_indices(folder, side)
        for path, content in zip(paths, contents, strict=True):
            if content not in index:
                entry = lacking.setdefault(content, (path, []))
                if side not in entry[1]:
                    entry[1].append(side)
    if not lacking:
        return
    with warnings.catch_warnings():
        # Both are upstream's behaviour as well; an image that is too large to be meant is an error, not a warning.
        warnings.filterwarnings("ignore", "Image size .* exceeds limit")
        warnings.filterwarnings("ignore", "Palette images with Transparency")
        problems, clipped = _decode(lacking, folder, threads or min(8, os.cpu_count() or 1), progress)
    if clipped:
        logger.warning(
            f"{len(clipped)} of {len(paths)} images have more than 8 bits a channel and are clipped to 255, as the "
            f"evaluation transform does it: first {clipped[0]}. Convert them to 8 bits to keep their range"
        )
    if problems:
        raise UnreadableImages(problems)


def _read_indices(folder: Path, side: int) -> dict[str, tuple[Path, int, int, int]]:
    """{content digest: (pack, offset, height, width)} over all packs of this side."""
    found: dict[str, tuple[Path, int, int, int]] = {}
    for path in sorted(folder.glob(f"{side}_*.npz")):
        pack = path.with_suffix(".npy")
        if not pack.is_file():
            continue
        with np.load(path) as index:
            rows = zip(index["contents"], index["offset"], index["height"], index["width"], strict=True)
            for content, offset, height, width in rows:
                found[content.tobytes().hex()] = (pack, int(offset), int(height), int(width))
    return found


def _decode(
    lacking: dict[str, tuple[Path, list[int]]],
    folder: Path,
    threads: int,
    progress: Callable[[int, int], None] | None,
) -> tuple[list[tuple[Path, str]], list[Path]]:
    """Write packs of the images; returns those that cannot be read, and those whose channels were clipped."""
    problems: list[tuple[Path, str]] = []
    clipped: list[Path] = []
    packs: dict[int, _Pack] = {}
    waiting = list(lacking.items())

    def attempt(item: tuple[str, tuple[Path, list[int]]]) -> tuple[dict[int, np.ndarray], str, str]:
        _, (path, sides) = item
        try:
            return *_read_image(path, sides), ""
        except ValueError as error:
            return {}, "", str(error).removeprefix(f"{path}: ")

    with ThreadPoolExecutor(threads) as pool:
        for start in range(0, len(waiting), DECODE_AHEAD):
            batch = waiting[start : start + DECODE_AHEAD]
            for (content, (path, _)), (images, mode, reason) in zip(batch, pool.map(attempt, batch), strict=True):
                if reason:
                    problems.append((path, reason))
                if mode in ("I", "F") or mode.startswith("I;16"):
                    clipped.append(path)
                for side, image in images.items():
                    pack = packs.setdefault(side, _Pack(side, folder))
                    pack.add(content, image)
                    if pack.filled >= PACK_BYTES:
                        packs.pop(side).write()
            if progress:
                progress(min(start + DECODE_AHEAD, len(waiting)), len(waiting))
    for pack in packs.values():
        pack.write()
    return problems, clipped


class _Pack:
    """Images on their way to one pack."""

    def __init__(self, side: int, folder: Path) -> None:
        self.side = side
        self.folder = folder
        self.filled = 0
        self._rows: list[tuple[str, int, int, int]] = []
        self._pixels: list[np.ndarray] = []

    def add(self, content: str, image: np.ndarray) -> None:
        """One more image."""
        self._rows.append((content, self.filled, *image.shape[:2]))
        self._pixels.append(image.reshape(-1))
        self.filled += image.size

    def write(self) -> None:
        """Write both files, the index last."""
        name = hashlib.sha256("".join(row[0] for row in self._rows).encode()).hexdigest()[:16]
        with atomic_path(self.folder / f"{self.side}_{name}.npy") as temporary, temporary.open("wb") as file:
            # One after another, since joining them first would take their memory twice.
            head = {"descr": "|u1", "fortran_order": False, "shape": (self.filled,)}
            np.lib.format.write_array_header_1_0(file, head)
            for pixels in self._pixels:
                file.write(pixels.data)
        with atomic_path(self.folder / f"{self.side}_{name}.npz") as temporary:
            np.savez(
                temporary,
                contents=np.stack([np.frombuffer(bytes.fromhex(row[0]), dtype=np.uint8) for row in self._rows]),
                offset=np.array([row[1] for row in self._rows], dtype=np.int64),
                height=np.array([row[2] for row in self._rows], dtype=np.int32),
                width=np.array([row[3] for row in self._rows], dtype=np.int32),
            )
