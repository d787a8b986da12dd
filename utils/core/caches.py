"""Disk usage of a workspace: count and remove files without following symbolic links."""

from __future__ import annotations

import logging
import os
import re
import shutil
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

logger = logging.getLogger("disease_pipeline")

TEMPORARY = re.compile(r"\..+\.[a-z0-9_]{8}\.partial(\.[^.]+)?")
"""Names of temporary files of `artifacts.replacing` and of the base pipeline's writer."""
PACK = re.compile(r"(\d+(?:-[a-z]+)*_[0-9a-f]+)\.np[yz]")
EMBEDDINGS = "embeddings"  # folder in the image cache
EMBEDDING_PACK = re.compile(r"[0-9a-f]{16}/[0-9a-f]{16}\.npz")
"""Files of the image cache; the two files of a pack share the first part."""
HOUR = 3600.0


@dataclass(frozen=True)
class Item:
    """Files that are counted and removed together."""

    name: str
    paths: tuple[Path, ...]
    """Paths in the order of removal: the file that makes the others valid is first."""
    size: int
    """Bytes."""
    modified: float
    """Modification time of the newest file, in seconds since the epoch."""


def walk_files(folder: Path) -> Iterator[os.DirEntry[str]]:
    """Regular files at any depth; none if `folder` is a link or does not exist."""
    if folder.is_symlink() or not folder.is_dir():
        return
    with os.scandir(folder) as entries:
        for entry in sorted(entries, key=lambda entry: entry.name):
            if entry.is_dir(follow_symlinks=False):
                yield from walk_files(Path(entry.path))
            elif entry.is_file(follow_symlinks=False):
                yield entry


def total_size(folder: Path) -> int:
    """Bytes of all regular files below a folder."""
    return sum(status.st_size for entry in walk_files(folder) if (status := _status(entry)))


def list_children(folder: Path) -> list[Item]:
    """One item per file or folder directly in `folder`, except links."""
    if folder.is_symlink() or not folder.is_dir():
        return []
    items = []
    for path in sorted(folder.iterdir()):
        if path.is_symlink():
            continue
        status = path.stat()
        items.append(Item(path.name, (path,), total_size(path) if path.is_dir() else status.st_size, status.st_mtime))
    return items


def temporary_files(folder: Path, *, shared: bool) -> list[Item]:
    """Temporary files left by killed processes.

    In a `shared` folder another program may be writing, so only files that are at least an hour old are included.
    """
    items = []
    for entry in walk_files(folder):
        if not TEMPORARY.fullmatch(entry.name) or (status := _status(entry)) is None:
            continue
        may_be_alive = shared or entry.name.startswith(".lock.")
        if not may_be_alive or time.time() - status.st_mtime > HOUR:
            items.append(Item(entry.name, (Path(entry.path),), status.st_size, status.st_mtime))
    return items


def remove_temporary_files(folder: Path) -> None:
    """Remove all temporary files from a folder that only the caller writes. Raises OSError."""
    for item in temporary_files(folder, shared=False):
        remove(item)


def image_packs(image_cache: Path) -> list[Item]:
    """The packs of decoded images, oldest first; the index of a pack is removed before its pixels."""
    files: dict[str, list[tuple[Path, os.stat_result]]] = {}
    for entry in walk_files(image_cache):
        match = PACK.fullmatch(entry.name)
        if match and Path(entry.path).parent == image_cache and (status := _status(entry)):
            files.setdefault(match[1], []).append((Path(entry.path), status))
    items = [
        Item(
            name,
            tuple(path for path, _ in sorted(parts, key=lambda part: part[0].suffix, reverse=True)),
            sum(status.st_size for _, status in parts),
            max(status.st_mtime for _, status in parts),
        )
        for name, parts in files.items()
    ]
    return sorted(items, key=lambda item: (item.modified, item.name))


def image_embeddings(image_cache: Path) -> list[Item]:
    """The packs of image embeddings by the base pipeline's frozen networks, oldest first."""
    items = []
    for entry in walk_files(image_cache / EMBEDDINGS):
        path = Path(entry.path)
        is_pack = EMBEDDING_PACK.fullmatch(path.relative_to(image_cache / EMBEDDINGS).as_posix())
        if is_pack and (status := _status(entry)):
            name = path.relative_to(image_cache).as_posix()
            items.append(Item(name, (path,), status.st_size, status.st_mtime))
    return sorted(items, key=lambda item: (item.modified, item.name))


def all_packs(image_cache: Path) -> list[Item]:
    """The packs of decoded images and of embeddings, which share the quota; oldest first."""
    packs = [*image_packs(image_cache), *image_embeddings(image_cache)]
    return sorted(packs, key=lambda item: (item.modified, item.name))


def enforce_quota(image_cache: Path, quota_gb: float | None) -> list[Item]:
    """Remove the oldest packs until the cache fits the quota in units of 10^9 bytes; returns the removed items."""
    packs = all_packs(image_cache)
    total = sum(item.size for item in packs)
    removed: list[Item] = []
    while quota_gb is not None and total > quota_gb * 1e9:
        removed.append(packs[len(removed)])
        remove(removed[-1])
        total -= removed[-1].size
    if removed:
        logger.warning(
            "decoded images and their embeddings take more than the %g GB of cache.quota_gb: the %d oldest of %d packs "
            "are removed (%s) and made again when they are needed",
            quota_gb,
            len(removed),
            len(packs),
            format_bytes(sum(item.size for item in removed)),
        )
    return removed


def remove(item: Item) -> None:
    """Remove an item, in the order of its paths; links are removed, their targets are kept. Raises OSError."""
    for path in item.paths:
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)


def format_bytes(size: float) -> str:
    """Bytes as readable text: `3.4 MB`."""
    for unit in ("B", "kB", "MB"):
        if size < 999.5:
            return f"{size:.0f} {unit}" if size >= 99.5 or unit == "B" else f"{size:.1f} {unit}"
        size /= 1000
    return f"{size:.1f} GB"


def _status(entry: os.DirEntry[str]) -> os.stat_result | None:
    """Status of an entry without following links; None if it no longer exists."""
    try:
        return entry.stat(follow_symlinks=False)
    except FileNotFoundError:
        return None
