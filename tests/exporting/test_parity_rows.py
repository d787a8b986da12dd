"""Reference rows in the batches that a format takes."""

from __future__ import annotations

import numpy as np

from utils.exporting.parity_check import BATCH_SIZES, ReferenceBatches
from utils.exporting.parity_rows import ParitySample

IMAGES = [np.full((40 + row % 2, 40, 3), row, dtype=np.uint8) for row in range(30)]
SQUARES = [np.full((32, 32, 3), row, dtype=np.uint8) for row in range(30)]
SAMPLE = ParitySample([(image,) for image in IMAGES], SQUARES, ReferenceBatches([], [], np.tile([[0.4, 0.6]], (30, 1))))


def test_every_row_is_in_a_batch_and_every_batch_size_occurs():
    reference = SAMPLE.reference_batches()
    assert {len(rows) for rows in reference.rows} == set(BATCH_SIZES)
    assert set(np.concatenate(reference.rows).tolist()) == set(range(30))
    for (batch,), rows in zip(reference.batches, reference.rows, strict=True):
        assert batch[:, 0, 0, 0].tolist() == rows.tolist()
    assert reference.probabilities is SAMPLE.expected.probabilities


def test_a_fixed_format_gets_single_squares_or_single_inputs():
    squares = SAMPLE.reference_batches(fixed=True, takes_uint8=True)
    assert {batch.shape for (batch,) in squares.batches} == {(1, 32, 32, 3)}
    assert sorted(np.concatenate(squares.rows).tolist()) == list(range(30))
    inputs = SAMPLE.reference_batches(fixed=True)
    assert {batch.shape for (batch,) in inputs.batches} == {(1, 40, 40, 3), (1, 41, 40, 3)}
