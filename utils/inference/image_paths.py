"""Lists the image files given by arguments: files, folders, patterns, or a list on standard input.

File names are bytes on Linux; bytes that are not UTF-8 are represented by lone surrogates, as in `os.fsdecode`.
"""

from __future__ import annotations

import glob
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import BinaryIO

from utils import base_back
from utils.core.errors import UserError

STDIN = "-"


@dataclass(frozen=True)
class ImageListing:
    """The requested images, each path once, in the order of the arguments; folders and patterns are sorted."""

    paths: tuple[Path, ...]
    empty: tuple[str, ...]
    """Folders and patterns without images."""


def list_images(names: Sequence[str], stdin: BinaryIO, suffixes: Sequence[str] | None = None) -> ImageListing:
    """List the images of files, folders and patterns; `-` reads names from `stdin`, one per line or NUL-separated.

    `suffixes` are the lower-case file name suffixes of images, by default the base pipeline's. A folder is
    searched recursively for files with the suffix of an image; hidden files and folders are skipped. A named file is
    listed with any suffix; one on `stdin` even if it does not exist, so that its record can contain the error. Raises
    UserError that lists all arguments that are neither a file nor a folder.
    """
    _require_existing(names)
    known_suffixes = tuple(base_back.load_bundled("samples").SUFFIXES if suffixes is None else suffixes)
    paths: dict[str, None] = {}
    empty = []
    for name in _expanded_names(names, stdin):
        images = list(_images_of(name, known_suffixes))
        if not images:
            empty.append(name)
        paths.update(dict.fromkeys(images))
    return ImageListing(tuple(map(Path, paths)), tuple(empty))


def _require_existing(names: Sequence[str]) -> None:
    missing = [name for name in names if name != STDIN and not os.path.lexists(name) and not glob.has_magic(name)]
    if missing:
        raise UserError("; ".join(f"{name}: no such file or folder{_near(name)}" for name in missing))


def _near(name: str) -> str:
    """A hint to an entry of the closest existing parent folder."""
    folder, _, last = os.path.normpath(name).rpartition(os.sep)
    if not os.path.isdir(folder or os.curdir):
        return _near(folder) if folder else ""
    matches = get_close_matches(last, sorted(os.listdir(folder or os.curdir)), n=1)
    return f"; did you mean {os.path.join(folder, matches[0])}?" if matches else ""


def _expanded_names(names: Sequence[str], stdin: BinaryIO) -> Iterator[str]:
    for name in names:
        if name != STDIN:
            yield name
            continue
        text = stdin.read()
        parts = text.split(b"\0") if b"\0" in text else [line.removesuffix(b"\r") for line in text.split(b"\n")]
        yield from (os.fsdecode(part) for part in parts if part)


def _images_of(name: str, suffixes: tuple[str, ...]) -> Iterator[str]:
    if os.path.isdir(name):
        yield from _images_below(name, suffixes)
    elif not os.path.lexists(name) and glob.has_magic(name):
        for path in sorted(glob.glob(name, recursive=True)):
            if os.path.isfile(path) and _is_image(path, suffixes):
                yield path
    else:
        yield name


def _images_below(folder: str, suffixes: tuple[str, ...]) -> Iterator[str]:
    """Image files below a folder; symbolic links are followed, and each folder is visited once."""
    visited = {os.path.realpath(folder)}
    for parent, folders, files in os.walk(folder, followlinks=True):
        to_visit = []
        for name in sorted(folders):
            real_path = os.path.realpath(os.path.join(parent, name))
            if not name.startswith(".") and real_path not in visited:
                visited.add(real_path)
                to_visit.append(name)
        folders[:] = to_visit
        images = (name for name in sorted(files) if not name.startswith(".") and _is_image(name, suffixes))
        yield from (os.path.join(parent, name) for name in images)


def _is_image(name: str, suffixes: tuple[str, ...]) -> bool:
    return os.path.splitext(name)[1].lower() in suffixes
