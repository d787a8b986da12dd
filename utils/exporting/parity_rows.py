"""Real rows for the parity check; the expected outputs are the stored predictions that `evaluate` scores."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from utils import base_back
from utils.combiners.protocol import combiner_inputs
from utils.core.errors import UserError
from utils.exporting.exported_network import UINT8_NHWC, ExportSignature, ExportSource
from utils.exporting.parity_check import BATCH_SIZES, InputArrays, ReferenceBatches, make_batches
from utils.numeric.metrics import softmax
from utils.predictions import fold_networks, image_splits, streaming
from utils.predictions.rows import UNKNOWN, Rows
from utils.predictions.store import Store

if TYPE_CHECKING:
    from utils.exporting.exported_network import ExportNetwork

N_ROWS = 64
N_CALIBRATION_IMAGES = 128
"""Number of training images for estimating the ranges of 8-bit values."""
ACCURACY_BLOCK_SIZE = 256  # images in memory at a time
SPLITS = ("test", "val", "train")
"""Splits from which rows are taken, in this order, until there are enough."""


@dataclass(frozen=True)
class ParitySample:
    """Real rows in the input format of an exported file, and the ensemble's outputs for them."""

    inputs: list[InputArrays]
    """The inputs of each row: float32 (3, S, S), uint8 (H, W, 3), or member logits float32 (M, C)"""
    squares: list[np.ndarray]
    """The centre square of each row, uint8 (S, S, 3), for files of a fixed size; empty with several resize rules"""
    expected: ReferenceBatches
    """The expected outputs; its `batches` are empty"""

    def reference_batches(self, *, fixed: bool = False, takes_uint8: bool = False) -> ReferenceBatches:
        """The rows in batches; with `fixed`, in batches of one row of the network's image size."""
        if not fixed:
            batches, rows = make_batches(self.inputs)
        else:
            batches, rows = make_batches([(square,) for square in self.squares] if takes_uint8 else self.inputs, (1,))
        return replace(self.expected, batches=batches, rows=rows)


def sample_rows(store: Store, source: ExportSource, signature: ExportSignature, network: ExportNetwork) -> ParitySample:
    """Take up to 64 rows, evenly spaced over the test split, and over val and train if test has too few.

    The expected outputs are the stored predictions, which `evaluate` scores. Predictions computed on a GPU in 16 bits
    are too coarse for comparison with a 32-bit file; the network is then run on the CPU instead. Raises UserError if
    the members have no common split.
    """
    members = list(source.members)
    parts: list[Rows] = []
    for split in SPLITS:
        n_missing = N_ROWS - sum(len(part.sample_ids) for part in parts)
        if n_missing > 0 and all(store.is_available(member, split) for member in members):
            fold_networks.ensure(store, members, (split,), source.inference)
            rows = fold_networks.aligned(store, members, split, source.inference, embeddings=source.reads_embeddings)
            parts.append(rows.take(_evenly_spread(len(rows.sample_ids), n_missing)))
    if not parts:
        raise UserError(f"{source.name}: its members have predictions of no common split, so parity cannot be checked")
    rows = _concatenate(parts)
    if source.is_imported:
        logits = rows.logits.transpose(1, 0, 2)
        return ParitySample([(np.ascontiguousarray(row),) for row in logits], [], _expected_outputs(source, rows))
    inputs, squares = _load_inputs(store, source, signature, _image_indices(store, rows))
    expected = _expected_outputs(source, rows)
    if streaming.resolve_device(store.config.device) != "cpu":
        expected = _run_network(network, inputs, expected)
    return ParitySample(inputs, squares, expected)


def _evenly_spread(n_rows: int, n_chosen: int) -> np.ndarray:
    """Up to `n_chosen` evenly spaced indices of `n_rows` rows, int64."""
    return np.unique(np.linspace(0, n_rows - 1, min(n_chosen, n_rows)).round().astype(int))


def _concatenate(parts: Sequence[Rows]) -> Rows:
    embeddings = None
    if parts[0].embeddings is not None:
        member_parts = zip(*(part.embeddings or () for part in parts), strict=True)
        embeddings = tuple(np.concatenate(arrays) for arrays in member_parts)
    return replace(
        parts[0],
        split=np.concatenate([part.split for part in parts]),
        sample_ids=np.concatenate([part.sample_ids for part in parts]),
        labels=np.concatenate([part.labels for part in parts]),
        out_of_sample=np.concatenate([part.out_of_sample for part in parts]),
        logits=np.concatenate([part.logits for part in parts], axis=1),
        embeddings=embeddings,
    )


def _expected_outputs(source: ExportSource, rows: Rows) -> ReferenceBatches:
    if source.combiner is None:
        return ReferenceBatches([], [], softmax(rows.logits[0].astype(np.float64)))
    probabilities = source.combiner.predict_proba(combiner_inputs(source.combiner, rows.outputs))
    if not source.is_discontinuous or source.is_imported:
        return ReferenceBatches([], [], probabilities)
    return ReferenceBatches([], [], probabilities, rows.logits, rows.embeddings, source.combiner)


def calibration_inputs(store: Store, source: ExportSource, signature: ExportSignature) -> list[InputArrays]:
    """Up to 128 images of the train split, evenly spaced, in the input format of a file."""
    indices = _evenly_spread(len(store.images("train").sample_ids), N_CALIBRATION_IMAGES)
    return _load_inputs(store, source, signature, {"train": indices.tolist()})[0]


def measure_test_accuracy(
    store: Store, source: ExportSource, signature: ExportSignature, run: Callable[..., Sequence[np.ndarray]]
) -> dict[str, Any] | None:
    """Measure the accuracy of the ensemble and of a file on all labelled test rows.

    `run` takes a batch, one array per input, and returns the file's outputs, probabilities first. Returns None without
    labelled test rows.
    """
    members = list(source.members)
    if not all(store.is_available(member, "test") for member in members):
        return None
    test_rows = fold_networks.aligned(store, members, "test", source.inference, embeddings=source.reads_embeddings)
    rows = test_rows.take(np.flatnonzero(test_rows.labels != UNKNOWN))
    if not len(rows.labels):
        return None
    ensemble_accuracy = float((_expected_outputs(source, rows).probabilities.argmax(axis=1) == rows.labels).mean())
    n_correct = 0
    for start in range(0, len(rows.labels), ACCURACY_BLOCK_SIZE):
        block_rows = rows.take(np.arange(start, min(start + ACCURACY_BLOCK_SIZE, len(rows.labels))))
        inputs, _ = _load_inputs(store, source, signature, _image_indices(store, block_rows))
        predicted = np.array([run(*(array[None] for array in row))[0][0].argmax() for row in inputs])
        n_correct += int((predicted == block_rows.labels).sum())
    file_accuracy = n_correct / len(rows.labels)
    return {
        "rows": len(rows.labels),
        "ensemble": ensemble_accuracy,
        "file": file_accuracy,
        "change": file_accuracy - ensemble_accuracy,
    }


def _image_indices(store: Store, rows: Rows) -> dict[str, list[int]]:
    """{split: indices of its rows in the split's images}, splits in the order of the rows."""
    indices = {}
    for split in dict.fromkeys(rows.split.tolist()):
        index_of = {sample_id: index for index, sample_id in enumerate(store.images(split).sample_ids)}
        indices[split] = [index_of[sample_id] for sample_id in rows.sample_ids[rows.split == split].tolist()]
    return indices


def _load_inputs(
    store: Store, source: ExportSource, signature: ExportSignature, indices: Mapping[str, Sequence[int]]
) -> tuple[list[InputArrays], list[np.ndarray]]:
    """The inputs of a file for the images {split: indices}, and, with a single resize rule, their centre squares."""
    from utils.networks.ensemble_network import by_resize_rule

    rules = [group[0] for group in by_resize_rule(member.image_preprocessing for member in source.members)]
    threads = image_splits.decoding_threads(store.config.dataset.num_workers)
    squares_by_rule: list[list[np.ndarray]] = [[] for _ in rules]
    paths: list[Path] = []
    for name, image_indices in indices.items():
        split = store.images(name)
        paths += [split.paths[index] for index in image_indices]
        for squares, rule in zip(squares_by_rule, rules, strict=True):
            pixels = image_splits.open_images(split, rule, image_cache=store.workspace.image_cache, threads=threads)
            squares += list(pixels.crops(image_indices))
    squares = squares_by_rule[0] if len(rules) == 1 else []
    if signature.input == UINT8_NHWC:
        return [(decode_image(path, exif=rules[0].exif),) for path in paths], squares
    return [tuple(map(_as_planes, row)) for row in zip(*squares_by_rule, strict=True)], squares


def _as_planes(square: np.ndarray) -> np.ndarray:
    """uint8 (S, S, 3) -> float32 (3, S, S) in [0, 1]."""
    return square.transpose(2, 0, 1).astype(np.float32) / np.float32(255)


def decode_image(path: Path, *, exif: str = "ignore") -> np.ndarray:
    """Decode an image file like the base pipeline, uint8 (H, W, 3); upright if `exif` is `apply`."""
    with base_back.load_bundled("image_files").open_image(path) as image:
        return np.array(base_back.load_bundled("resizing").decoded(image, exif))


def _run_network(network: ExportNetwork, inputs: list[InputArrays], expected: ReferenceBatches) -> ReferenceBatches:
    """The expected outputs replaced by those of the network, run on the CPU."""
    import torch

    batches, rows = make_batches(inputs, (BATCH_SIZES[-1], 1))
    outputs: dict[str, list[Any]] = {name: [None] * len(inputs) for name in network.output_names}
    with torch.inference_mode():
        for batch, indices in zip(batches, rows, strict=True):
            result = network(*map(torch.from_numpy, batch))
            arrays = result if isinstance(result, tuple) else (result,)
            for name, array in zip(network.output_names, arrays, strict=True):
                for index, row in zip(indices, array.numpy(), strict=True):
                    outputs[name][index] = row
    stacked = {name: np.stack(values) for name, values in outputs.items()}
    if expected.member_logits is None:
        return replace(expected, probabilities=stacked["probabilities"].astype(np.float64))
    embeddings = expected.member_embeddings
    if embeddings is not None:
        ends = np.cumsum([part.shape[1] for part in embeddings])[:-1]
        embeddings = tuple(np.split(stacked["member_embeddings"], ends, axis=1))
    return replace(
        expected,
        probabilities=stacked["probabilities"].astype(np.float64),
        member_logits=stacked["member_logits"].transpose(1, 0, 2),
        member_embeddings=embeddings,
    )
