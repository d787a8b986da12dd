"""Results that the copies of a cross-fitting share.

Nested selection leaves out one fold for each copy and a second one to select by. The rows without folds j and k serve
the copy without j and the copy without k alike, and the rows without j alone serve its copy and the final fit.
"""

from __future__ import annotations

from collections.abc import Callable
from hashlib import sha256
from typing import Any, TypeVar

import numpy as np

Result = TypeVar("Result")


class SharedFits:
    """Results by the digest of everything that they depend on; a deep copy shares them."""

    def __init__(self) -> None:
        self._results: dict[bytes, Any] = {}

    def __deepcopy__(self, memo: dict[int, Any]) -> SharedFits:
        return self

    def result(self, settings: object, arrays: tuple[np.ndarray, ...], compute: Callable[[], Result]) -> Result:
        """Return `compute()`, or its result of the last time with equal settings, by their `repr`, and arrays."""
        digest = sha256(repr(settings).encode())
        for values in arrays:
            digest.update(repr((values.shape, values.dtype.str)).encode())
            digest.update(np.ascontiguousarray(values).data)
        key = digest.digest()
        if key not in self._results:
            self._results[key] = compute()
        return self._results[key]
