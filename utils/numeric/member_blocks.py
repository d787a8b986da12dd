"""Probabilities of members, read as float32 in blocks, so that a memory map larger than memory can be searched."""

from __future__ import annotations

import mmap
from collections.abc import Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray

from utils.core.errors import UserError
from utils.numeric.metrics import SIGN_TOLERANCE, SUM_TOLERANCE

BLOCK = 2**15  # numbers that are processed at a time, so that they stay in a core's cache
MAX_MAPPED_BYTES = 2**28  # of a memory map that may stay in memory


class MemberBlocks:
    """Probabilities (M, N, C) that are read as float32 (M, N * C), one block of members at a time."""

    def __init__(self, probabilities: NDArray[Any]) -> None:
        self.shape = probabilities.shape
        self._flat = probabilities.reshape(len(probabilities), -1)
        self._map = _map_of(probabilities)
        self._n_read = 0

    def blocks(self, columns: int) -> Iterator[tuple[slice, NDArray[np.float32]]]:
        """Yield (slice of members, their probabilities (b, N * C)) so that b * `columns` numbers fit the cache."""
        step = max(1, BLOCK // max(1, columns))
        for first in range(0, self.shape[0], step):
            block = slice(first, min(first + step, self.shape[0]))
            yield block, self._read(block)

    def member(self, index: int) -> NDArray[np.float32]:
        """Return the probabilities (N, C) of a member."""
        return self._read(slice(index, index + 1)).reshape(self.shape[1:])

    def _read(self, block: slice) -> NDArray[np.float32]:
        probabilities = self._flat[block]
        self._n_read += probabilities.nbytes
        if self._map is not None and self._n_read > MAX_MAPPED_BYTES:
            self._map.madvise(mmap.MADV_DONTNEED)
            self._n_read = probabilities.nbytes
        return np.asarray(probabilities, dtype=np.float32)


def _map_of(array: NDArray[Any]) -> mmap.mmap | None:
    """Return the read-only memory map that backs an array, if its pages can be released."""
    is_read_only = False
    base: Any = array
    while isinstance(base, np.ndarray):
        is_read_only = is_read_only or (isinstance(base, np.memmap) and base.mode == "r")
        base = base.base
    return base if is_read_only and isinstance(base, mmap.mmap) and hasattr(mmap, "MADV_DONTNEED") else None


def check_probabilities(values: NDArray[Any], first: int = 0) -> None:
    """Raise UserError unless the values (b, ...) of members `first`, `first + 1`, ... are probabilities."""
    if are_probabilities(values.min(), values.max()):
        return
    for member, member_values in enumerate(values, start=first):
        lowest, highest = member_values.min(), member_values.max()
        if not are_probabilities(lowest, highest):
            raise UserError(
                f"probabilities: those of member {member} range from {lowest} to {highest}; expected numbers from "
                "0 to 1, such as the softmax of logits"
            )


def are_probabilities(lowest: Any, highest: Any) -> bool:
    return bool(lowest >= -SIGN_TOLERANCE and highest <= 1 + SUM_TOLERANCE)  # false for NaN
