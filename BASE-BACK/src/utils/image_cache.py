"""Every image decoded once: uint8 pixels, keyed by the file's content, memory-mapped by whoever trains or predicts.

An image is stored as `Resize(side)` leaves it (shorter side `side`, longer side in proportion, bilinear), so that a
centre crop of it is, bit for bit, what the evaluation transform sees, and a random crop has the whole image to choose
from. One pack is two files, `<side>_<digest>.npy` with the bytes and `<side>_<digest>.npz` with the index, the latter
written last: a pack without index does not exist. Packs are never changed; new images make a new pack.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from .files import atomic_path

PACK_BYTES = 1 << 30
DECODE_AHEAD = 64  # images in flight between the decoding threads and the writer


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


def read_image(path: Path, side: int) -> np.ndarray:
    """Decode one file to RGB with its shorter side at `side`, uint8 (height, width, 3).

    EXIF orientation is ignored, as in the evaluation transform. Raises ValueError with the path and the reason.
    """
    from PIL import Image

    try:
        with Image.open(path) as image:
            rgb = image.convert("RGB")
    except (OSError, ValueError, SyntaxError, EOFError, Image.DecompressionBombError) as error:
        reason = str(error).replace(repr(str(path)), "it").replace(str(path), "it")
        raise ValueError(f"{path}: cannot be decoded ({reason})") from error
    width, height = rgb.size
    short, long = side, int(side * max(width, height) / min(width, height))
    target = (short, long) if width <= height else (long, short)
    return np.asarray(rgb.resize(target, Image.Resampling.BILINEAR))


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
    index = _read_indices(folder, side)
    missing = {content: path for path, content in zip(paths, contents, strict=True) if content not in index}
    if missing:
        problems = _decode(missing, side, folder, threads or min(8, os.cpu_count() or 1), progress)
        if problems:
            raise UnreadableImages(problems)
        index = _read_indices(folder, side)
    entries = [index[content] for content in contents]
    names = sorted({entry[0] for entry in entries})
    packs = tuple(np.load(name, mmap_mode="r") for name in names)
    pack = np.array([names.index(entry[0]) for entry in entries], dtype=np.int32)
    offset, height, width = (np.array([entry[place] for entry in entries], dtype=np.int64) for place in (1, 2, 3))
    return DecodedImages(packs, pack, offset, height, width)


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
    missing: dict[str, Path],
    side: int,
    folder: Path,
    threads: int,
    progress: Callable[[int, int], None] | None,
) -> list[tuple[Path, str]]:
    """Write packs of the missing images; returns those that cannot be read."""
    problems: list[tuple[Path, str]] = []
    waiting = list(missing.items())
    done = 0

    def attempt(item: tuple[str, Path]) -> tuple[str, Path, np.ndarray | None, str]:
        content, path = item
        try:
            return content, path, read_image(path, side), ""
        except ValueError as error:
            return content, path, None, str(error).removeprefix(f"{path}: ")

    with ThreadPoolExecutor(threads) as pool:
        while waiting:
            rows: list[tuple[str, int, int, int]] = []
            pixels: list[np.ndarray] = []
            filled = 0
            while waiting and filled < PACK_BYTES:
                batch, waiting = waiting[:DECODE_AHEAD], waiting[DECODE_AHEAD:]
                for content, path, image, reason in pool.map(attempt, batch):
                    done += 1
                    if image is None:
                        problems.append((path, reason))
                        continue
                    rows.append((content, filled, *image.shape[:2]))
                    pixels.append(image.reshape(-1))
                    filled += image.size
                if progress:
                    progress(done, len(missing))
            if rows:
                _write_pack(rows, pixels, side, folder)
    return problems


def _write_pack(rows: list[tuple[str, int, int, int]], pixels: list[np.ndarray], side: int, folder: Path) -> None:
    name = hashlib.sha256("".join(row[0] for row in rows).encode()).hexdigest()[:16]
    with atomic_path(folder / f"{side}_{name}.npy") as temporary:
        np.save(temporary, np.concatenate(pixels))
    with atomic_path(folder / f"{side}_{name}.npz") as temporary:
        np.savez(
            temporary,
            contents=np.stack([np.frombuffer(bytes.fromhex(row[0]), dtype=np.uint8) for row in rows]),
            offset=np.array([row[1] for row in rows], dtype=np.int64),
            height=np.array([row[2] for row in rows], dtype=np.int32),
            width=np.array([row[3] for row in rows], dtype=np.int32),
        )
