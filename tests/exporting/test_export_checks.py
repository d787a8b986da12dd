"""The list of tools, and the reference rows that an export holds."""

from __future__ import annotations

import numpy as np
import pytest

from utils.core.errors import UserError
from utils.core.workspace import Workspace
from utils.exporting import export_checks
from utils.exporting.parity_check import named_arrays

ARRAYS = {
    "probabilities": np.eye(3),
    "batch_0000": np.arange(2 * 3 * 4 * 4, dtype=np.float32).reshape(2, 3, 4, 4),
    "rows_0000": np.array([2, 0]),
    "batch_0001": np.zeros((1, 3, 4, 4), dtype=np.float32),
    "rows_0001": np.array([1]),
}


def test_tools_are_listed_with_the_packages_of_each_format():
    formats = export_checks.list_tools().document["formats"]
    assert formats["onnx"]["ready"]
    assert "onnxruntime" in formats["onnx"]["words"]
    assert not formats["tensorrt"]["ready"]
    assert formats["custom"]["ready"]


def test_stored_batches_are_those_that_were_written():
    reference = export_checks.stored_batches(ARRAYS, fixed=False)
    assert [len(batch) for (batch,) in reference.batches] == [2, 1]
    assert [rows.tolist() for rows in reference.rows] == [[2, 0], [1]]


def test_fixed_formats_get_one_row_at_a_time():
    reference = export_checks.stored_batches(ARRAYS, fixed=True)
    assert [rows.tolist() for rows in reference.rows] == [[2], [0], [1]]
    np.testing.assert_array_equal(reference.batches[1][0][0], ARRAYS["batch_0000"][1])


def test_several_inputs_are_stored_and_read_in_their_order():
    batches = [(np.full((size, 3), size), np.full((size, 5), -size)) for size in (2, 1)]
    arrays = {"probabilities": np.eye(3), "rows_0000": np.array([2, 0]), "rows_0001": np.array([1])}
    for number, batch in enumerate(batches):
        arrays |= named_arrays(number, batch)
    assert {"batch_0000/000", "batch_0001/001"} <= arrays.keys()
    reference = export_checks.stored_batches(arrays, fixed=False)
    assert [[array.tolist() for array in batch] for batch in reference.batches] == [
        [array.tolist() for array in batch] for batch in batches
    ]
    single = export_checks.stored_batches(arrays, fixed=True)
    assert [[array.shape for array in batch] for batch in single.batches] == [[(1, 3), (1, 5)]] * 3
    assert [rows.tolist() for rows in single.rows] == [[2], [0], [1]]


def test_fixed_formats_get_the_centre_squares_where_they_are_stored():
    squares = np.arange(3 * 2 * 2 * 3, dtype=np.uint8).reshape(3, 2, 2, 3)
    reference = export_checks.stored_batches(ARRAYS | {"squares": squares}, fixed=True)
    assert [batch.shape for (batch,) in reference.batches] == [(1, 2, 2, 3)] * 3
    np.testing.assert_array_equal(np.concatenate([batch for (batch,) in reference.batches]), squares)


def test_a_missing_folder_is_named_with_where_it_was_searched(tmp_path):
    workspace = Workspace(tmp_path, *(tmp_path / str(number) for number in range(7)))
    with pytest.raises(UserError, match=str(tmp_path / "absent")):
        export_checks.verify(workspace, tmp_path / "absent")
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=r"no checksums\.json"):
        export_checks.verify(workspace, tmp_path / "empty")
