"""Real rows for the proof of parity, and what the ensemble says of them by the way that `evaluate` takes."""

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
from utils.exporting.parity_check import BATCH_SIZES, ReferenceBatches, make_batches
from utils.numeric.metrics import softmax
from utils.predictions import fold_networks, image_splits, streaming
from utils.predictions.rows import UNKNOWN, Rows
from utils.predictions.store import Store

if TYPE_CHECKING:
    from torch import nn

N_ROWS = 64
N_CALIBRATION_IMAGES = 128  # rows of train by which the range of 8-bit values is chosen
ACCURACY_BLOCK_SIZE = 256  # images in memory
SPLITS = ("test", "val", "train")
"""In this order, until there are enough rows."""


@dataclass(frozen=True)
class ParitySample:
    """Real rows: what goes in, and what the ensemble answers."""

    images: list[np.ndarray]
    """Of each row what a file takes: float32 (3, S, S), uint8 (H, W, 3), or member logits float32 (M, C)"""
    squares: list[np.ndarray]
    """Of each row the centre square, uint8 (S, S, 3), for files of a fixed size; empty without images"""
    expected: ReferenceBatches
    """Without batches"""

    def reference_batches(self, *, fixed: bool = False, takes_uint8: bool = False) -> ReferenceBatches:
        """The rows as a file takes them; `fixed`: one at a time, cut to size already."""
        if not fixed:
            batches, rows = make_batches(self.images)
        else:
            given = self.squares if takes_uint8 else self.images
            batches, rows = make_batches(given, (1,))
        return replace(self.expected, batches=batches, rows=rows)


def sample_rows(store: Store, subject: ExportSource, form: ExportSignature, network: nn.Module) -> ParitySample:
    """Up to 64 rows, evenly spread over the test split; over val and train as well where these are too few.

    Raises UserError where the members have no row in common.

    What is expected are the stored predictions, which `evaluate` scores. Those that a GPU made in 16 bits are no
    measure of a file in 32; there the network itself is run on the CPU.
    """
    members = list(subject.members)
    parts: list[Rows] = []
    for split in SPLITS:
        wanted = N_ROWS - sum(len(part.sample_ids) for part in parts)
        if wanted > 0 and all(store.is_available(member, split) for member in members):
            fold_networks.ensure(store, members, (split,), subject.inference)
            whole = fold_networks.aligned(store, members, split, subject.inference, embeddings=subject.reads_embeddings)
            count = len(whole.sample_ids)
            parts.append(whole.take(np.unique(np.linspace(0, count - 1, min(wanted, count)).round().astype(int))))
    if not parts:
        raise UserError(f"{subject.name}: no split that all its members have rows of, so that nothing can be compared")
    rows = _joined(parts)
    if subject.is_imported:
        logits = rows.logits.transpose(1, 0, 2)
        return ParitySample([np.ascontiguousarray(row) for row in logits], [], _expected(subject, rows))
    images, squares = _images(store, subject, form, _places(store, rows))
    expected = _expected(subject, rows)
    if streaming.resolve_device(store.config.device) != "cpu":
        expected = _run(network, images, subject, expected)
    return ParitySample(images, squares, expected)


def _joined(parts: Sequence[Rows]) -> Rows:
    embeddings = None
    if parts[0].embeddings is not None:
        embeddings = tuple(np.concatenate(own) for own in zip(*(part.embeddings or () for part in parts), strict=True))
    return replace(
        parts[0],
        **{name: np.concatenate([getattr(part, name) for part in parts]) for name in ("split", "sample_ids", "labels")},
        out_of_sample=np.concatenate([part.out_of_sample for part in parts]),
        logits=np.concatenate([part.logits for part in parts], axis=1),
        embeddings=embeddings,
    )


def _expected(subject: ExportSource, rows: Rows) -> ReferenceBatches:
    if subject.combiner is None:
        return ReferenceBatches([], [], softmax(rows.logits[0].astype(np.float64)))
    probabilities = subject.combiner.predict_proba(combiner_inputs(subject.combiner, rows.outputs))
    if not subject.is_discontinuous or subject.is_imported:
        return ReferenceBatches([], [], probabilities)
    return ReferenceBatches([], [], probabilities, rows.logits, rows.embeddings, subject.combiner)


def calibration_images(store: Store, subject: ExportSource, form: ExportSignature) -> list[np.ndarray]:
    """Up to 128 images of the train split, evenly spread, as a file takes them."""
    count = len(store.images("train").sample_ids)
    places = np.unique(np.linspace(0, count - 1, min(N_CALIBRATION_IMAGES, count)).round().astype(int))
    return _images(store, subject, form, {"train": places.tolist()})[0]


def measure_test_accuracy(
    store: Store, subject: ExportSource, form: ExportSignature, run: Callable[[np.ndarray], Sequence[np.ndarray]]
) -> dict[str, Any] | None:
    """Accuracy on all labelled test rows: of the ensemble, and of a file whose `run` gives its probabilities first.

    None without such rows.
    """
    members = list(subject.members)
    if not all(store.is_available(member, "test") for member in members):
        return None
    whole = fold_networks.aligned(store, members, "test", subject.inference, embeddings=subject.reads_embeddings)
    rows = whole.take(np.flatnonzero(whole.labels != UNKNOWN))
    if not len(rows.labels):
        return None
    before = float((_expected(subject, rows).probabilities.argmax(axis=1) == rows.labels).mean())
    hits = 0
    for start in range(0, len(rows.labels), ACCURACY_BLOCK_SIZE):
        part = rows.take(np.arange(start, min(start + ACCURACY_BLOCK_SIZE, len(rows.labels))))
        images, _ = _images(store, subject, form, _places(store, part))
        found = np.array([run(image[None])[0][0].argmax() for image in images])
        hits += int((found == part.labels).sum())
    after = hits / len(rows.labels)
    return {"rows": len(rows.labels), "ensemble": before, "file": after, "change": after - before}


def _places(store: Store, rows: Rows) -> dict[str, list[int]]:
    """{split: places of its rows}, splits in the order in which they come, each in one piece."""
    found = {}
    for name in dict.fromkeys(rows.split.tolist()):
        place_of = {sample_id: place for place, sample_id in enumerate(store.images(name).sample_ids)}
        found[name] = [place_of[sample_id] for sample_id in rows.sample_ids[rows.split == name].tolist()]
    return found


def _images(
    store: Store, subject: ExportSource, form: ExportSignature, wanted: Mapping[str, Sequence[int]]
) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """What a file takes of each row, and the centre squares; `wanted` is {split: places}."""
    size = max(member.img_size or 0 for member in subject.members)
    threads = image_splits.decoding_threads(store.config.dataset.num_workers)
    squares: list[np.ndarray] = []
    paths: list[Path] = []
    for name, places in wanted.items():
        split = store.images(name)
        pixels = image_splits.open_images(split, size, image_cache=store.workspace.image_cache, threads=threads)
        squares += list(pixels.centre_crops(places, size))
        paths += [split.paths[place] for place in places]
    if form.input == UINT8_NHWC:
        return [_decoded(path) for path in paths], squares
    return [square.transpose(2, 0, 1).astype(np.float32) / np.float32(255) for square in squares], squares


def _decoded(path: Path) -> np.ndarray:
    with base_back.load_bundled("image_files").open_image(path) as image:
        return np.array(image.convert("RGB"))


def _run(
    network: nn.Module,
    images: list[np.ndarray],
    subject: ExportSource,
    expected: ReferenceBatches,
) -> ReferenceBatches:
    import torch

    batches, rows = make_batches(images, (BATCH_SIZES[-1], 1))
    names = network.output_names
    found: dict[str, list[Any]] = {}
    with torch.inference_mode():
        for batch, places in zip(batches, rows, strict=True):
            answers = network(torch.from_numpy(batch))
            parts = answers if isinstance(answers, tuple) else (answers,)
            for name, part in zip(names, parts, strict=True):
                found.setdefault(name, [None] * len(images))
                for place, row in zip(places, part.numpy(), strict=True):
                    found[name][place] = row
    stacked = {name: np.stack(part) for name, part in found.items()}
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
