"""The exchange format of predictions: one `.npz` for each member and split.

logits float32 (N, C) or probabilities (N, C)    one column per class
sample_ids unicode (N,)                          path below the split's folder, with `/`
labels int64 (N,)                                indices of the file's columns, -1 where unknown; may be absent
classes unicode (C,)                             names of the columns; may be absent
fold int64 (N,), embeddings float16/32 (N, D)    may be absent
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from utils.core.array_archives import ArrayHeader, physical_memory
from utils.core.artifacts import read_arrays
from utils.core.errors import UserError
from utils.numeric.metrics import SIGN_TOLERANCE, SUM_TOLERANCE, clipped_log
from utils.predictions.rows import UNKNOWN

NUMBERS, WHOLE_NUMBERS = "fiu", "iu"
KINDS = {
    **dict.fromkeys(("logits", "probabilities", "embeddings"), NUMBERS),
    **dict.fromkeys(("labels", "fold"), WHOLE_NUMBERS),
    "sample_ids": "U",
    "classes": "U" + WHOLE_NUMBERS,
}
"""The allowed values of NumPy's `dtype.kind` for each array."""
MAX_COLUMNS = 32_768  # ImageNet-21k has 21,841 classes
MAX_TEXT = 4096  # characters of a sample id or a class, the maximum length of a path
MAX_EMBEDDING = 65_536  # width of an embedding
MEMORY_FRACTION = 4  # one file may use a quarter of the machine's memory, including working copies


class _InvalidArraysError(Exception):
    """An array that does not follow the format; the message does not name the file."""


@dataclass(frozen=True)
class Predictions:
    """The contents of one file, in the file's order of rows and columns."""

    logits: np.ndarray
    """float32 (N, C); log-probabilities if the file has probabilities"""
    labels: np.ndarray
    """int64 (N,), indices of columns; UNKNOWN if the file has none"""
    sample_ids: np.ndarray
    """unicode (N,), unique"""
    classes: tuple[str, ...] | None
    """Names of the columns; None if the file has none."""
    fold: np.ndarray | None
    """int64 (N,), fold in which each row was held out"""
    embeddings: np.ndarray | None
    """float32 (N, D)"""
    kind: str
    """Contents of the file: `logits`, `probabilities` or `half-precision probabilities`."""


def read(
    path: Path, *, what: str, remedy: str, needs: Sequence[str] = (), sum_tolerance: float = SUM_TOLERANCE
) -> Predictions:
    """Read and validate one file; error messages describe the file as `what` and end with `remedy`.

    `needs` names optional arrays that the caller requires. Raises UserError for missing arrays, wrong dtypes or shapes,
    a repeated sample id, labels without a column, values that are not finite, and probabilities that do not sum to 1
    within `sum_tolerance`.
    """
    arrays = read_arrays(path, remedy=remedy, check=_require_moderate)
    try:
        return _checked({key: arrays[key] for key in KINDS if key in arrays}, needs, sum_tolerance)
    except _InvalidArraysError as error:
        raise UserError(f"{path}: {what} refused: {error}. {remedy}") from error


def memory_needed(headers: Mapping[str, ArrayHeader]) -> int:
    """Bytes of memory for reading and matching a file's arrays, including working copies."""
    copies = {"logits": 16, "probabilities": 40, "embeddings": 8}  # bytes of working copies per value
    n_bytes = 0
    for key, header in headers.items():
        if key in ("sample_ids", "classes"):  # as read, sorted, aligned, and as Python strings
            n_bytes += header.size * (4 * header.dtype.itemsize + 128)
        elif key in KINDS:
            n_bytes += header.size * (header.dtype.itemsize + copies.get(key, 16))
    return n_bytes


def memory_limit() -> int:
    """Bytes of memory that reading one file may use, including working copies."""
    return physical_memory() // MEMORY_FRACTION


def _require_moderate(headers: Mapping[str, ArrayHeader]) -> list[str]:
    """Names of the arrays to read. Raises ValueError for too many columns, too wide text or too much memory."""
    for key, header in headers.items():
        if key not in KINDS:
            continue
        width = header.shape[1] if len(header.shape) > 1 else 0
        max_width = MAX_EMBEDDING if key == "embeddings" else MAX_COLUMNS
        if width > max_width:
            raise ValueError(f"{key} of {width:,} columns; expected at most {max_width:,}")
        if header.dtype.kind == "U" and header.dtype.itemsize > 4 * MAX_TEXT:
            raise ValueError(f"{key} of {header.dtype.itemsize // 4:,} characters each; expected at most {MAX_TEXT:,}")
    n_bytes, limit = memory_needed(headers), memory_limit()
    if n_bytes > limit:
        raise ValueError(
            f"its arrays take {n_bytes / 1e9:.1f} GB with the copies that are made of them, more than "
            f"{limit / 1e9:.1f} GB, a quarter of this machine's memory"
        )
    return [key for key in headers if key in KINDS]


def _checked(arrays: Mapping[str, np.ndarray], needs: Sequence[str], sum_tolerance: float) -> Predictions:
    missing = [key for key in ("sample_ids", *needs) if key not in arrays]
    name = "logits" if "logits" in arrays else "probabilities"
    if missing or name not in arrays:
        raise _InvalidArraysError(f"no array {', '.join(missing if name in arrays else ['logits', *missing])}")
    values, ids = arrays[name], arrays["sample_ids"]
    labels, embeddings = arrays.get("labels"), arrays.get("embeddings")
    if values.ndim != 2 or values.shape[1] < 2 or not len(values):
        raise _InvalidArraysError(f"{name} of shape {values.shape}; expected a row per sample and a column per class")
    count, columns = values.shape
    shapes = {"sample_ids": (count,), "labels": (count,), "fold": (count,), "classes": (columns,)}
    for key, array in arrays.items():
        if array.dtype.kind not in KINDS[key]:
            expected = {NUMBERS: "numbers", WHOLE_NUMBERS: "whole numbers"}.get(KINDS[key], "text")
            raise _InvalidArraysError(f"{key} hold {array.dtype}; expected {expected}")
        if array.shape != shapes.get(key, (count, array.size // count)):
            raise _InvalidArraysError(f"{key} of shape {array.shape} beside {name} of shape {values.shape}")
    _require_unique("sample id", ids)
    if labels is not None and (labels.min() < UNKNOWN or labels.max() >= columns):
        raise _InvalidArraysError(f"its labels reach from {labels.min()} to {labels.max()} for {columns} classes")
    kind, values = name, _finite(name, values, ids)
    if name == "probabilities":
        kind = "half-precision probabilities" if arrays[name].dtype == np.float16 else name
        values = _log_probabilities(values, ids, sum_tolerance)
    return Predictions(
        logits=_single(name, values, ids),
        labels=np.full(count, UNKNOWN) if labels is None else labels.astype(np.int64),
        sample_ids=ids,
        classes=_classes(arrays["classes"]) if "classes" in arrays else None,
        fold=arrays["fold"].astype(np.int64) if "fold" in arrays else None,
        embeddings=None if embeddings is None else _single("embeddings", embeddings, ids),
        kind=kind,
    )


def _require_unique(what: str, names: np.ndarray) -> None:
    try:
        "".join(names.tolist()).encode()
    except ValueError as error:  # an unpaired surrogate, or an invalid code point
        raise _InvalidArraysError(f"a {what} is no text ({error})") from error
    unique, counts = np.unique(names, return_counts=True)
    if len(unique) < len(names):
        raise _InvalidArraysError(f"the {what} {unique[counts > 1][0]} occurs twice")


def _classes(names: np.ndarray) -> tuple[str, ...]:
    texts = names.astype(str)
    _require_unique("class", texts)
    return tuple(texts.tolist())


def _finite(name: str, values: np.ndarray, ids: np.ndarray) -> np.ndarray:
    rows = np.flatnonzero(~np.isfinite(values).all(axis=1))
    if rows.size:
        hint = " (log of 0? Give probabilities instead)" if name == "logits" and np.isneginf(values[rows]).any() else ""
        raise _InvalidArraysError(f"{rows.size} rows have NaN or infinite {name}, first {ids[rows[0]]}{hint}")
    return values


def _single(name: str, values: np.ndarray, ids: np.ndarray) -> np.ndarray:
    with np.errstate(over="ignore"):  # values beyond float32 become infinite and are refused
        return _finite(name, values.astype(np.float32), ids)


def _log_probabilities(values: np.ndarray, ids: np.ndarray, sum_tolerance: float) -> np.ndarray:
    """log(p) in float64 (N, C), p clipped at 1e-12."""
    values = values.astype(np.float64)
    rows = np.flatnonzero(values.min(axis=1) < -SIGN_TOLERANCE)
    if rows.size:
        raise _InvalidArraysError(f"{rows.size} rows have probabilities below 0, first {ids[rows[0]]}")
    sums = values.sum(axis=1)
    rows = np.flatnonzero(np.abs(sums - 1) > sum_tolerance)
    if rows.size:
        first = f"first {ids[rows[0]]} with {sums[rows[0]]:.4g}"
        raise _InvalidArraysError(
            f"the probabilities of {rows.size} rows do not sum to 1 within {sum_tolerance:g}, {first}"
        )
    return clipped_log(values)
