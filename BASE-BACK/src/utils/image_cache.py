"""Every image decoded once: uint8 pixels, keyed by the file's content, memory-mapped by whoever trains or predicts.

An image is stored whole, as a resize rule (`resizing.Resizing`) leaves it, so that the centre square of it is, bit for
bit, what the network's evaluation transform sees, and a random crop has the whole image to choose from. Rules with
equal keys share their pixels; each rule resizes from the original pixels. One pack is two files, `<key>_<digest>.npy`
with the bytes and `<key>_<digest>.npz` with the index, the latter written last: a pack without index does not exist.
Packs are never changed; new images make a new pack.
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

PACK_BYTES = 1 << 27  # held in memory until the pack is written
DECODE_AHEAD = 64  # images in flight between the decoding threads and the writer
LARGE_PIXELS = 1 << 25  # images above this are decoded one at a time, so that threads do not multiply their memory

logger = logging.getLogger("disease_pipeline")
_one_large_image = threading.Lock()
NOTES = {
    "clipped": "have more than 8 bits a channel and are clipped to 255, as the evaluation transform does it: first "
    "{first}. Convert them to 8 bits to keep their range",
    "frames": "hold several frames or pages, of which the first is used: first {first}. Save the others as files of "
    "their own to use them",
}
"""Warnings that are logged once, with the number of decoded files that they apply to."""


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

    resizing: Resizing
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
        """Resized pixels of one whole image, uint8 (height, width, 3)."""
        height, width, start = int(self.height[row]), int(self.width[row]), int(self.offset[row])
        flat = self.packs[self.pack[row]][start : start + height * width * 3]
        return flat.reshape(height, width, 3)

    def crops(self, rows: Sequence[int] | np.ndarray) -> np.ndarray:
        """Centre squares of the given rows, uint8 (B, S, S, 3), as the rule cuts them."""
        size = self.resizing.input_size
        crops = np.empty((len(rows), size, size, 3), dtype=np.uint8)
        for square, row in zip(crops, rows, strict=True):
            self.resizing.crop(self.image(int(row)), out=square)
        return crops


def _read_image(path: Path, rules: Sequence[Resizing]) -> tuple[dict[str, np.ndarray], set[str]]:
    """{key: RGB pixels, uint8 (height, width, 3)} of one file by each of the rules, and which NOTES apply to it.

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
    except Exception as error:  # decoders of damaged files raise whatever they meet, from struct.error to IndexError
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
    """Pixels of the given files by one rule, from the packs in `folder`; what none holds is decoded into a new one.

    `contents` are the files' SHA-256 digests; `threads` decode side by side (default: the cores,
    eight at most). Raises `UnreadableImages` after everything readable was stored.
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
    """Store what no pack in `folder` holds yet for one of the `rules`; each file is decoded once for all.

    Arguments as for `open_images`. Logs once how many images lose range or frames. Raises `UnreadableImages` after
    everything readable was stored.
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
        # Both are upstream's behaviour as well; an image that is too large to be meant is an error, not a warning.
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
    """The entries of one pack; kept, since soups and fold networks run over the same images many times."""
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
    """Write packs of the images; returns those that cannot be read, and those that each of the NOTES applies to."""
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
    """Images on their way to one pack."""

    def __init__(self, key: str, folder: Path) -> None:
        self.key = key
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
        with atomic_path(self.folder / f"{self.key}_{name}.npy") as temporary, temporary.open("wb") as file:
            # One after another, since joining them first would take their memory twice.
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
