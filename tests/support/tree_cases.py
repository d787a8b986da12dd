"""Tables with ties, missing values and rows on thresholds, and the runtimes that a tree module must answer in."""

from __future__ import annotations

import io
import warnings
from collections.abc import Callable, Iterable

import numpy as np
import pytest
import torch
from torch import nn

FEATURES = 24
ALL_DEPTHS = range(1, 13)
ALL_CLASSES = (2, 3, 7, 13, 20)
SOME = [(1, 2), (2, 20), (3, 3), (6, 13), (8, 5), (9, 7), (12, 10)]
"""(depth, classes): both layouts, the fewest and the most classes"""


def training_table(classes: int, *, rows: int = 400, missing: float = 0.1) -> tuple[np.ndarray, np.ndarray]:
    """Features float32 (N, F) with one decimal and NaN, labels (N,) that depend on them."""
    rng = np.random.default_rng(classes)
    features = np.round(rng.normal(size=(rows, FEATURES)), 1).astype(np.float32)
    labels = (features[:, :classes] + 0.8 * rng.normal(size=(rows, classes))).argmax(axis=1)
    features[rng.random(features.shape) < missing] = np.nan
    return features, labels


def unseen_rows(thresholds: Iterable[tuple[int, float]], *, rows: int = 10_000, missing: float = 0.1) -> np.ndarray:
    """Random rows (N, F), a fifth of whose values are thresholds (feature, value) of the trees, some NaN."""
    rng = np.random.default_rng(0)
    found = rng.normal(size=(rows, FEATURES)).astype(np.float32)
    by_feature: dict[int, list[float]] = {}
    for feature, value in thresholds:
        by_feature.setdefault(int(feature), []).append(value)
    for feature, values in by_feature.items():
        hit = rng.random(rows) < 0.2
        found[hit, feature] = rng.choice(np.array(values, dtype=np.float32), hit.sum())
    found[rng.random(found.shape) < missing] = np.nan
    return found


def in_torch(module: nn.Module) -> Callable[[np.ndarray], np.ndarray]:
    def run(rows: np.ndarray) -> np.ndarray:
        with torch.no_grad():
            return module(torch.from_numpy(rows)).numpy()

    return run


def traced(module: nn.Module) -> Callable[[np.ndarray], np.ndarray]:
    return in_torch(torch.jit.trace(module, torch.zeros(2, FEATURES)))


def scripted(module: nn.Module) -> Callable[[np.ndarray], np.ndarray]:
    return in_torch(torch.jit.script(module))


def in_onnx_runtime(module: nn.Module) -> Callable[[np.ndarray], np.ndarray]:
    """Through the exporter that needs no onnxscript."""
    file = io.BytesIO()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # the exporter's own age
        torch.onnx.export(
            module,
            (torch.zeros(2, FEATURES),),
            file,
            dynamo=False,
            input_names=["features"],
            dynamic_axes={"features": {0: "rows"}},
        )
    return _session(file.getvalue())


def in_onnx_runtime_by_dynamo(module: nn.Module) -> Callable[[np.ndarray], np.ndarray]:
    """Through the exporter that needs onnxscript."""
    pytest.importorskip("onnxscript")
    file = io.BytesIO()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        program = torch.onnx.export(
            module,
            (torch.zeros(2, FEATURES),),
            dynamo=True,
            input_names=["features"],
            dynamic_shapes=({0: torch.export.Dim("rows")},),
            verbose=False,
        )
    program.save(file)
    return _session(file.getvalue())


def _session(model: bytes) -> Callable[[np.ndarray], np.ndarray]:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
    return lambda rows: session.run(None, {"features": rows})[0]


RUNTIMES = [traced, scripted, in_onnx_runtime, pytest.param(in_onnx_runtime_by_dynamo, marks=pytest.mark.slow)]
