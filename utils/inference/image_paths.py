"""Which image files somebody means: files, folders, patterns, or a list on standard input.

Names are bytes on Linux; those that are no UTF-8 travel as Python's lone surrogates and come out as they went in.
"""

from __future__ import annotations

import glob
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from utils import base_back

STDIN = "-"
EXTRA_SUFFIXES = (".tif", ".tiff", ".webp")  # beside the suffixes that the base pipeline trains on


@dataclass(frozen=True)
class ImageListing:
    """The images that were asked for, each path once, in the order given; folders and patterns are sorted."""

    paths: tuple[Path, ...]
    empty: tuple[str, ...]
    """Folders and patterns in which no image was found."""


def list_images(wanted: Sequence[str], stdin: BinaryIO, suffixes: Sequence[str] | None = None) -> ImageListing:
    """The images below the given names; `-` stands for the list on `stdin`, one name a line or separated by NUL.

    `suffixes` in small letters are those that the network was trained on, by default the base pipeline's.

    A folder is searched to any depth for files with an image's ending, hidden ones left out; a file that is named is
    taken as it is, and kept where it does not exist, so that its row can say so.
    """
    known = (*(base_back.load_bundled("samples").SUFFIXES if suffixes is None else suffixes), *EXTRA_SUFFIXES)
    paths: dict[str, None] = {}
    empty = []
    for name in _names(wanted, stdin):
        found = list(_of_name(name, known))
        if not found:
            empty.append(name)
        paths.update(dict.fromkeys(found))
    return ImageListing(tuple(map(Path, paths)), tuple(empty))


def _names(wanted: Sequence[str], stdin: BinaryIO) -> Iterator[str]:
    for name in wanted:
        if name != STDIN:
            yield name
            continue
        text = stdin.read()
        parts = text.split(b"\0") if b"\0" in text else [line.removesuffix(b"\r") for line in text.split(b"\n")]
        yield from (os.fsdecode(part) for part in parts if part)


def _of_name(name: str, suffixes: tuple[str, ...]) -> Iterator[str]:
    if os.path.isdir(name):
        yield from _below(name, suffixes)
    elif not os.path.lexists(name) and glob.has_magic(name):
        for found in sorted(glob.glob(name, recursive=True)):
            if os.path.isfile(found) and _is_image(found, suffixes):
                yield found
    else:
        yield name


def _below(folder: str, suffixes: tuple[str, ...]) -> Iterator[str]:
    """Image files of a folder to any depth; links are followed, and a folder that is met again is passed over."""
    seen = {os.path.realpath(folder)}
    for place, folders, files in os.walk(folder, followlinks=True):
        kept = []
        for name in sorted(folders):
            real = os.path.realpath(os.path.join(place, name))
            if not name.startswith(".") and real not in seen:
                seen.add(real)
                kept.append(name)
        folders[:] = kept
        images = (name for name in sorted(files) if not name.startswith(".") and _is_image(name, suffixes))
        yield from (os.path.join(place, name) for name in images)


def _is_image(name: str, suffixes: tuple[str, ...]) -> bool:
    return os.path.splitext(name)[1].lower() in suffixes
