"""What a teacher says of each image, on disk: log-probabilities in half precision, all of them or the largest ones."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from utils.core.artifacts import read_arrays, write_arrays
from utils.numeric.metrics import SMALLEST_PROBABILITY, softmax

logger = logging.getLogger("disease_pipeline")

KEPT = 32  # largest probabilities of a row that are kept where there are more than twice as many classes
AGAIN = "Remove it, then distill again"


def log_probabilities(probabilities: np.ndarray) -> np.ndarray:
    """Log-probabilities float32, from probabilities (..., C) that may be 0."""
    return np.log(np.maximum(probabilities, SMALLEST_PROBABILITY)).astype(np.float32)


def pack(targets: np.ndarray) -> dict[str, np.ndarray]:
    """Log-probabilities (K, N, C) of N images in K views as half-precision arrays; NaN where there is no target."""
    classes = targets.shape[2]
    if classes <= 2 * KEPT:
        return {"values": targets.astype(np.float16), "classes": np.array(classes)}
    order = np.argsort(-targets, axis=2, kind="stable")[:, :, :KEPT]
    values = np.take_along_axis(targets, order, axis=2).astype(np.float16)
    return {"values": values, "places": order.astype(np.int32), "classes": np.array(classes)}


def unpack(arrays: Mapping[str, np.ndarray]) -> np.ndarray:
    """Normalised log-probabilities float32 (K, N, C); what was not kept of a row is spread evenly over its classes."""
    values = arrays["values"].astype(np.float64)
    if "places" not in arrays:
        return _normalised(values)
    views, rows, kept = values.shape
    classes = int(arrays["classes"])
    left = np.maximum(1 - np.exp(values).sum(axis=2, keepdims=True), SMALLEST_PROBABILITY) / (classes - kept)
    found = np.broadcast_to(np.log(left), (views, rows, classes)).copy()
    np.put_along_axis(found, arrays["places"].astype(np.int64), values, axis=2)
    return _normalised(found)


def _normalised(values: np.ndarray) -> np.ndarray:
    """Half precision leaves rows that do not quite sum to 1."""
    known = ~np.isnan(values).any(axis=2)
    found = np.full(values.shape, np.nan, dtype=np.float32)
    found[known] = log_probabilities(softmax(values[known]))
    return found


def content_digest(arrays: Mapping[str, np.ndarray]) -> str:
    """SHA-256 of what `pack` gave."""
    digest = hashlib.sha256()
    for name in sorted(arrays):
        digest.update(f"{name} {arrays[name].dtype} {arrays[name].shape}\n".encode())
        digest.update(np.ascontiguousarray(arrays[name]).tobytes())
    return digest.hexdigest()


def save(path: Path, key: str, arrays: Mapping[str, np.ndarray]) -> None:
    """Keep packed targets under the digest of everything that they depend on."""
    write_arrays(path, {**arrays, "key": np.array(key)})


def load(path: Path, key: str) -> dict[str, np.ndarray] | None:
    """Packed targets that were kept under this key; None where there are none, or, said in words, another's.

    Raises UserError for a damaged file.
    """
    if not path.is_file():
        return None
    arrays = read_arrays(path, remedy=AGAIN)
    if str(arrays.pop("key", None)) != key:
        logger.warning("%s: targets of another teacher, or for other images or views; the teacher is asked again", path)
        return None
    return arrays
