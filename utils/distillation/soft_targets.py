"""Stored targets: a teacher's log-probabilities in half precision, of all classes or only the most probable ones."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from utils.core.artifacts import read_arrays, write_arrays
from utils.numeric.metrics import SMALLEST_PROBABILITY, clipped_log, softmax

logger = logging.getLogger("disease_pipeline")

TOP_CLASSES = 32  # number of probabilities stored per row if there are more than twice as many classes
REMEDY = "Remove it, then distill again"


@dataclass(frozen=True)
class Targets:
    """A teacher's predictions of N images."""

    log_probabilities: np.ndarray
    """float32 (N, C); NaN for images without a target."""
    embeddings: np.ndarray | None = None
    """float32 (N, D), concatenated over its networks; None if embeddings are not matched."""


def log_probabilities(probabilities: np.ndarray) -> np.ndarray:
    """Log-probabilities, float32, of probabilities (..., C), clipped from below."""
    return clipped_log(probabilities).astype(np.float32)


def pack(targets: np.ndarray) -> dict[str, np.ndarray]:
    """Convert log-probabilities (K, N, C) of N images in K views to half precision; NaN means no target."""
    classes = targets.shape[2]
    if classes <= 2 * TOP_CLASSES:
        return {"values": targets.astype(np.float16), "classes": np.array(classes)}
    order = np.argsort(-targets, axis=2, kind="stable")[:, :, :TOP_CLASSES]
    values = np.take_along_axis(targets, order, axis=2).astype(np.float16)
    return {"values": values, "places": order.astype(np.int32), "classes": np.array(classes)}


def unpack(arrays: Mapping[str, np.ndarray]) -> np.ndarray:
    """Normalised log-probabilities float32 (K, N, C); the remaining probability is uniform over classes not stored."""
    values = arrays["values"].astype(np.float64)
    if "places" not in arrays:
        return _normalised(values)
    views, rows, stored = values.shape
    classes = int(arrays["classes"])
    remaining = np.maximum(1 - np.exp(values).sum(axis=2, keepdims=True), SMALLEST_PROBABILITY) / (classes - stored)
    log_probs = np.broadcast_to(np.log(remaining), (views, rows, classes)).copy()
    np.put_along_axis(log_probs, arrays["places"].astype(np.int64), values, axis=2)
    return _normalised(log_probs)


def _normalised(values: np.ndarray) -> np.ndarray:
    """Renormalise rows, since probabilities in half precision do not sum exactly to 1."""
    has_target = ~np.isnan(values).any(axis=2)
    log_probs = np.full(values.shape, np.nan, dtype=np.float32)
    log_probs[has_target] = log_probabilities(softmax(values[has_target]))
    return log_probs


def content_digest(arrays: Mapping[str, np.ndarray]) -> str:
    """SHA-256 of names, dtypes, shapes and values of arrays."""
    digest = hashlib.sha256()
    for name in sorted(arrays):
        digest.update(f"{name} {arrays[name].dtype} {arrays[name].shape}\n".encode())
        digest.update(np.ascontiguousarray(arrays[name]).tobytes())
    return digest.hexdigest()


def save(path: Path, key: str, arrays: Mapping[str, np.ndarray]) -> None:
    """Write packed targets under `key`, the digest of everything that they depend on."""
    write_arrays(path, {**arrays, "key": np.array(key)})


def load(path: Path, key: str) -> dict[str, np.ndarray] | None:
    """Read the packed targets of `key`; None if there are none, or, with a warning, if they have another key.

    Raises UserError for a damaged file.
    """
    if not path.is_file():
        return None
    arrays = read_arrays(path, remedy=REMEDY)
    if str(arrays.pop("key", None)) != key:
        logger.warning("%s: targets of another teacher, other images or other views; they are computed again", path)
        return None
    return arrays
