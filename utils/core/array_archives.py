"""Reading of `.npz` archives of any origin: sizes are checked against file and machine before memory is allocated."""

from __future__ import annotations

import math
import os
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

DEFLATED_AT_MOST = 1032  # largest compression ratio of deflate


@dataclass(frozen=True)
class ArrayHeader:
    """The header of an array in an archive, checked against the size of its data."""

    shape: tuple[int, ...]
    dtype: np.dtype

    @property
    def size(self) -> int:
        """Number of values."""
        return math.prod(self.shape)


def checked_entries(archive: zipfile.ZipFile, size: int) -> dict[str, zipfile.ZipInfo]:
    """{array: its entry} of an archive of `size` bytes. Raises ValueError for impossible sizes."""
    _check_sizes(archive.infolist(), size)
    return {entry.filename.removesuffix(".npy"): entry for entry in archive.infolist()}


def _check_sizes(entries: Sequence[zipfile.ZipInfo], size: int) -> None:
    """Raise ValueError for an archive that declares more bytes than fit its `size` or half of the machine's memory."""
    names = [entry.filename for entry in entries]
    strangers = [name for name in names if not name.endswith(".npy")]
    if strangers or len(set(names)) < len(names):
        raise ValueError(f"it holds {strangers[0]}" if strangers else "two of its arrays have one name")
    methods = {entry.compress_type for entry in entries} - {zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED}
    if methods:
        raise ValueError(f"it is compressed by method {min(methods)}, neither stored nor deflated")
    if sum(entry.compress_size for entry in entries) > size:
        raise ValueError("its parts are longer than the file")
    swollen = [entry.filename for entry in entries if entry.file_size > DEFLATED_AT_MOST * entry.compress_size]
    if swollen:
        raise ValueError(f"{swollen[0]} promises more bytes than its part of the file can hold")
    total, memory = sum(entry.file_size for entry in entries), physical_memory()
    if total > memory // 2:
        raise ValueError(
            f"its arrays take {total / 1e9:.1f} GB, more than half of this machine's {memory / 1e9:.1f} GB"
        )


def physical_memory() -> int:
    """Bytes of memory of this machine."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def read_header(archive: zipfile.ZipFile, entry: zipfile.ZipInfo) -> ArrayHeader:
    """Read an entry's header. Raises ValueError for pickled objects, and if the data has another size than declared."""
    with archive.open(entry) as header:
        version = np.lib.format.read_magic(header)
        readers = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}
        if version not in readers:
            raise ValueError(f"{entry.filename} has the format version {version}")
        shape, _, dtype = readers[version](header)
        n_bytes = entry.file_size - header.tell()
    if dtype.hasobject:
        raise ValueError(f"{entry.filename} holds pickled objects (text goes into an array of type str)")
    if any(extent < 0 for extent in shape) or math.prod(shape) * max(dtype.itemsize, 1) != n_bytes:
        raise ValueError(f"{entry.filename} declares {dtype} of shape {shape}; {n_bytes} bytes are there")
    return ArrayHeader(tuple(shape), dtype)


def read_entry(archive: zipfile.ZipFile, entry: zipfile.ZipInfo) -> np.ndarray:
    """The array of an entry whose header has been read."""
    with archive.open(entry) as file:
        return np.lib.format.read_array(file, allow_pickle=False)
