"""A cache of decoded images: uint8 pixels, keyed by file content, memory-mapped for training and prediction.

Each image is stored whole after a resize rule (`resizing.Resizing`), so that its centre square equals the network's
evaluation transform bit for bit, and random crops can use the whole image. Rules with equal keys share their pixels;
each rule resizes from the original pixels. A pack is two files, `<key>_<digest>.npy` with the bytes and
`<key>_<digest>.npz` with the index; the index is written last, and a pack without index is ignored. Packs are
immutable; new images go into a new pack.
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
from functools import lru_cache
from pathlib import Path

import numpy as np

from .files import atomic_path
from .resizing import Resizing, resized_pixels

PACK_BYTES = 1 << 27  # buffered in memory until the pack is written
DECODE_AHEAD = 64  # images queued between the decoding threads and the writer
LARGE_PIXELS = 1 << 25  # larger images are decoded one at a time, to limit memory

logger = logging.getLogger("disease_pipeline")
_one_large_image = threading.Lock()
NOTES = {
    "clipped": "have more than 8 bits a channel and are clipped to 255, as the evaluation transform does it: first "
    "{first}. Convert them to 8 bits to keep their range",
    "frames": "hold several frames or pages, of which the first is used: first {first}. Save the others as files of "
    "their own to use them",
}
"""Warnings that are logged once, with the number of files that they apply to."""


class UnreadableImages(ValueError):
    """Files that cannot be decoded as images."""

    def __init__(self, problems: Sequence[tuple[Path, str]]) -> None:
        self.problems = list(problems)
        shown = "; ".join(f"{path}: {reason}" for path, reason in self.problems[:5])
        more = f"; and {len(self.problems) - 5} more" if len(self.problems) > 5 else ""
        super().__init__(f"{len(self.problems)} unreadable image(s): {shown}{more}")


@dataclass(frozen=True)
class DecodedImages:
    """Pixels of N images, in the order of the request; memory-mapped, so that they are read on access."""

    resizing: Resizing
    packs: tuple[np.ndarray, ...]
    """Flat uint8 memory maps."""
    pack: np.ndarray
    """(N,), index of the pack of each image."""
    offset: np.ndarray
    """(N,), byte offset of each image in its pack."""
    height: np.ndarray
    """(N,)"""
    width: np.ndarray
    """(N,)"""

    def __len__(self) -> int:
        return len(self.offset)

    def image(self, row: int) -> np.ndarray:
        """Resized pixels of the whole image `row`, uint8 (height, width, 3)."""
        height, width, start = int(self.height[row]), int(self.width[row]), int(self.offset[row])
        flat = self.packs[self.pack[row]][start : start + height * width * 3]
        return flat.reshape(height, width, 3)

    def crops(self, rows: Sequence[int] | np.ndarray) -> np.ndarray:
        """Centre squares of the given rows by the resize rule, uint8 (B, S, S, 3)."""
        size = self.resizing.input_size
        crops = np.empty((len(rows), size, size, 3), dtype=np.uint8)
        for square, row in zip(crops, rows, strict=True):
            self.resizing.crop(self.image(int(row)), out=square)
        return crops


def _read_image(path: Path, rules: Sequence[Resizing]) -> tuple[dict[str, np.ndarray], set[str]]:
    """{key: RGB pixels, uint8 (height, width, 3)} of one file by each rule, and the NOTES that apply to it.

    Raises ValueError with the path and the reason.
    """
    from .image_files import has_more_frames, open_image

    try:
        with open_image(path) as image:
            notes = {"clipped"} if image.mode in ("I", "F") or image.mode.startswith("I;16") else set()
            if has_more_frames(image):
                notes.add("frames")
            if image.width * image.height > LARGE_PIXELS:
                with _one_large_image:
                    return resized_pixels(image, rules), notes
            return resized_pixels(image, rules), notes
    except Exception as error:  # decoders raise many types for damaged files, from struct.error to IndexError
        reason = str(error).replace(f"image file {str(path)!r}", "it as an image").replace(str(path), "it")
        raise ValueError(f"{path}: cannot be decoded ({reason})") from error


def open_images(
    paths: Sequence[Path],
    contents: Sequence[str],
    resizing: Resizing,
    folder: Path,
    *,
    threads: int | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> DecodedImages:
    """Pixels of the given files by one rule, from the packs in `folder`; missing images are decoded into a new pack.

    `contents` are the files' SHA-256 digests; `threads` is the number of decoding threads (default: the number of
    cores, at most eight). Raises `UnreadableImages` after all readable images are stored.
    """
    decode_images(paths, contents, [resizing], folder, threads=threads, progress=progress)
    index = _read_indices(folder, resizing.key)
    entries = [index[content] for content in contents]
    names = sorted({entry[0] for entry in entries})
    packs = tuple(np.load(name, mmap_mode="r") for name in names)
    pack = np.array([names.index(entry[0]) for entry in entries], dtype=np.int32)
    offset, height, width = (np.array([entry[column] for entry in entries], dtype=np.int64) for column in (1, 2, 3))
    return DecodedImages(resizing, packs, pack, offset, height, width)


def decode_images(
    paths: Sequence[Path],
    contents: Sequence[str],
    rules: Sequence[Resizing],
    folder: Path,
    *,
    threads: int | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> None:
    """Store the images that the packs in `folder` lack for any of the `rules`; each file is decoded once for all rules.

    Arguments as for `open_images`. Logs once how many images lose range or frames. Raises `UnreadableImages` after all
    readable images are stored.
    """
    lacking: dict[str, tuple[Path, list[Resizing]]] = {}
    for rule in rules:
        index = _read_indices(folder, rule.key)
        for path, content in zip(paths, contents, strict=True):
            if content not in index:
                entry = lacking.setdefault(content, (path, []))
                if rule not in entry[1]:
                    entry[1].append(rule)
    if not lacking:
        return
    with warnings.catch_warnings():
        # Upstream decodes such images as well; beyond twice the size limit Pillow raises an error instead of a warning.
        warnings.filterwarnings("ignore", "Image size .* exceeds limit")
        warnings.filterwarnings("ignore", "Palette images with Transparency")
        problems, noted = _decode(lacking, folder, threads or min(8, os.cpu_count() or 1), progress)
    for note, files in noted.items():
        if files:
            logger.warning(f"{len(files)} of {len(paths)} images {NOTES[note].format(first=files[0])}")
    if problems:
        raise UnreadableImages(problems)


def _read_indices(folder: Path, key: str) -> dict[str, tuple[Path, int, int, int]]:
    """{content digest: (pack, offset, height, width)} over all packs with this key."""
    entries: dict[str, tuple[Path, int, int, int]] = {}
    for path in sorted(folder.glob(f"{key}_*.npz")):
        if path.with_suffix(".npy").is_file():
            status = path.stat()
            entries |= _read_index(path, status.st_size, status.st_mtime_ns)
    return entries


@lru_cache(maxsize=16)
def _read_index(path: Path, size: int, modified: int) -> dict[str, tuple[Path, int, int, int]]:
    """The entries of one pack; cached, since soups and fold networks read the same images many times."""
    pack = path.with_suffix(".npy")
    with np.load(path) as index:
        rows = zip(index["contents"], index["offset"], index["height"], index["width"], strict=True)
        return {
            content.tobytes().hex(): (pack, int(offset), int(height), int(width))
            for content, offset, height, width in rows
        }


def _decode(
    lacking: dict[str, tuple[Path, list[Resizing]]],
    folder: Path,
    threads: int,
    progress: Callable[[int, int], None] | None,
) -> tuple[list[tuple[Path, str]], dict[str, list[Path]]]:
    """Write packs of the images; returns unreadable files with reasons, and the files that each of NOTES applies to."""
    problems: list[tuple[Path, str]] = []
    noted: dict[str, list[Path]] = {note: [] for note in NOTES}
    packs: dict[str, _Pack] = {}
    waiting = list(lacking.items())

    def attempt(item: tuple[str, tuple[Path, list[Resizing]]]) -> tuple[dict[str, np.ndarray], set[str], str]:
        _, (path, rules) = item
        try:
            return *_read_image(path, rules), ""
        except ValueError as error:
            return {}, set(), str(error).removeprefix(f"{path}: ")

    with ThreadPoolExecutor(threads) as pool:
        for start in range(0, len(waiting), DECODE_AHEAD):
            batch = waiting[start : start + DECODE_AHEAD]
            for (content, (path, _)), (images, notes, reason) in zip(batch, pool.map(attempt, batch), strict=True):
                if reason:
                    problems.append((path, reason))
                for note in notes:
                    noted[note].append(path)
                for key, image in images.items():
                    pack = packs.setdefault(key, _Pack(key, folder))
                    pack.add(content, image)
                    if pack.filled >= PACK_BYTES:
                        packs.pop(key).write()
            if progress:
                progress(min(start + DECODE_AHEAD, len(waiting)), len(waiting))
    for pack in packs.values():
        pack.write()
    return problems, noted


class _Pack:
    """Images buffered for one pack."""

    def __init__(self, key: str, folder: Path) -> None:
        self.key = key
        self.folder = folder
        self.filled = 0
        self._rows: list[tuple[str, int, int, int]] = []
        self._pixels: list[np.ndarray] = []

    def add(self, content: str, image: np.ndarray) -> None:
        """Add an image, uint8 (height, width, 3)."""
        self._rows.append((content, self.filled, *image.shape[:2]))
        self._pixels.append(image.reshape(-1))
        self.filled += image.size

    def write(self) -> None:
        """Write both files, the index last."""
        name = hashlib.sha256("".join(row[0] for row in self._rows).encode()).hexdigest()[:16]
        with atomic_path(self.folder / f"{self.key}_{name}.npy") as temporary, temporary.open("wb") as file:
            # Written one by one, since concatenating them would double their memory.
            head = {"descr": "|u1", "fortran_order": False, "shape": (self.filled,)}
            np.lib.format.write_array_header_1_0(file, head)
            for pixels in self._pixels:
                file.write(pixels.data)
        with atomic_path(self.folder / f"{self.key}_{name}.npz") as temporary:
            np.savez(
                temporary,
                contents=np.stack([np.frombuffer(bytes.fromhex(row[0]), dtype=np.uint8) for row in self._rows]),
                offset=np.array([row[1] for row in self._rows], dtype=np.int64),
                height=np.array([row[2] for row in self._rows], dtype=np.int32),
                width=np.array([row[3] for row in self._rows], dtype=np.int32),
            )
