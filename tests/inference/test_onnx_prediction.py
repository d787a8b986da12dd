"""The delivered program's checks and preparation, which need no ONNX file."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from utils.inference import onnx_prediction
from utils.inference.onnx_prediction import check_shape, list_image_files, resize_and_crop, row_problems


@pytest.mark.parametrize(
    ("row", "is_valid"),
    [
        ([0.25, 0.75], True),
        ([0.996, 0.01], True),  # half precision
        ([0.0, 1.0], True),
        ([0.5, 0.6], False),
        ([1.5, -0.5], False),
        ([np.nan, 1.0], False),
        ([np.inf, 0.0], False),
    ],
)
def test_a_row_of_probabilities_is_finite_within_bounds_and_sums_to_1(row, is_valid):
    probabilities = np.array([[0.5, 0.5], row])
    assert list(row_problems(probabilities)) == ([] if is_valid else [1])


def test_no_rows_have_no_problems():
    assert row_problems(np.empty((0, 3))) == {}


@pytest.mark.parametrize(
    "probabilities",
    [np.zeros((2, 4)), np.zeros((3, 3)), np.zeros(6), np.zeros((2, 3), dtype=np.int64), [[0.0] * 3] * 2, None],
)
def test_other_shapes_and_types_are_refused(probabilities):
    check_shape(np.zeros((2, 3), dtype=np.float16), 2, 3)
    with pytest.raises(ValueError, match=r"expected floats \(2, 3\)"):
        check_shape(probabilities, 2, 3)


@pytest.mark.parametrize("size", [(100, 60), (60, 100), (60, 60)])
def test_the_centre_square_is_cut_from_the_resized_image(size):
    image = Image.new("RGB", size)
    image.putpixel((size[0] // 2, size[1] // 2), (255, 255, 255))
    square = resize_and_crop(image, 60, 32)
    assert (square.shape, square.dtype) == ((3, 32, 32), np.float32)
    assert square[:, 16, 16].tolist() == [1, 1, 1]
    assert square.sum() == 3


def test_folders_are_searched_for_images_and_files_are_taken_as_named(tmp_path):
    (tmp_path / "below").mkdir()
    for name in ("b.png", "below/a.JPG", "notes.txt"):
        (tmp_path / name).touch()
    assert list_image_files([tmp_path]) == [tmp_path / "b.png", tmp_path / "below/a.JPG"]
    assert list_image_files([tmp_path / "notes.txt"]) == [tmp_path / "notes.txt"]
    with pytest.raises(ValueError, match="no such file"):
        list_image_files([tmp_path / "absent.png"])
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="no image"):
        list_image_files([tmp_path / "empty"])


def test_without_an_onnx_file_the_program_says_how_to_name_one(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(onnx_prediction, "__file__", str(tmp_path / "custom" / "predict.py"))
    assert onnx_prediction.main([str(tmp_path)]) == 1
    assert "--model" in capsys.readouterr().err
