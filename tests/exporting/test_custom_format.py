"""The folder `custom/`: texts for every kind of input, an archive with stable bytes, and bounded reference rows."""

from __future__ import annotations

import zipfile

import numpy as np
import pytest

from utils.exporting import custom_format
from utils.exporting.export_formats import format_entry
from utils.exporting.parity_check import TOLERANCE, ReferenceBatches

PARITY = {"rows": 64, "tolerance": TOLERANCE, "max_abs_diff": 3e-7}
STATUS = {
    "onnx": format_entry("ok", path="onnx/it.onnx", parity=PARITY),
    "onnx_int8": format_entry("ok", path="onnx_int8/it.onnx", parity=PARITY | {"tolerance": 0.1, "max_abs_diff": 0.05}),
    "tensorrt": format_entry("skipped", reason="specific to its GPU"),
}
SCORE = {"n_samples": 20, "split": "test", "accuracy": 0.9, "f1_macro": 0.8, "log_loss": 0.3, "ece": 0.05}


def description(kind: str = "float-nchw") -> dict:
    members = [
        {"name": "first", "architecture": "A", "size": "tiny", "img_size": 32},
        {"name": "second", "architecture": "B", "size": "tiny", "img_size": None},
    ]
    rule = {"input_size": 32, "resized": 36, "resize": "shorter-side", "interpolation": "bilinear"}
    rule |= {"crop_offset": "round", "exif": "ignore", "fill": [0, 0, 0]}
    entry = {"name": "images", "shape": [None, 3, 32, 32], "resizing": rule, "resized_inside": [rule]}
    inputs = {"kind": kind, "name": "images", "img_size": 32, "shorter_side": 36, "inputs": [entry]}
    return {
        "members": members,
        "method": "soft_voting",
        "inference": "full",
        "input": inputs,
        "outputs": ["probabilities"],
    }


@pytest.mark.parametrize(
    ("kind", "shape"),
    [
        ("float-nchw", "(batch, 3, 32, 32)"),
        ("uint8-nhwc", "(batch, height, width, 3)"),
        ("member-logits", "(batch, members, classes)"),
    ],
)
def test_the_readme_has_the_shape_of_the_input_and_the_members_in_order(kind, shape):
    text = custom_format.readme("it", description(kind), ("a", "b"), STATUS)
    assert shape in text
    assert "first, second" in text
    assert "`onnx/it.onnx`" in text
    assert "specific to its GPU" in text
    assert ("python predict.py" in text) is (kind != "member-logits")


def test_the_readme_says_how_each_input_is_made():
    given = description()
    (entry,) = given["input"]["inputs"]
    squash = entry["resizing"] | {"resize": "squash", "interpolation": "bicubic", "exif": "apply", "resized": 40}
    pad = entry["resizing"] | {"resize": "pad", "fill": [1, 2, 3]}
    given["input"]["inputs"] = [
        entry | {"name": f"images_{number}", "resizing": rule}
        for number, rule in enumerate((entry["resizing"], squash, pad), 1)
    ]
    text = custom_format.readme("it", given, ("a", "b"), STATUS)
    assert "- `images_1`: float32 (batch, 3, 32, 32). Resize the shorter side to 36 px (bilinear) and crop" in text
    assert "Apply the EXIF orientation. Resize both sides to 40 px (bicubic) and crop the centre square." in text
    assert "Resize the longer side to 36 px (bilinear) and pad to the square with RGB (1, 2, 3)." in text


def test_the_model_card_has_scores_and_the_difference_of_full_precision_alone():
    text = custom_format.model_card("it", description(), ("a", "b"), STATUS, SCORE)
    assert "accuracy 0.9000" in text
    assert "optimistic" not in text
    assert "3e-07" in text
    assert "0.05 " not in text
    assert "| second | B | tiny | unknown |" in text
    optimistic = custom_format.model_card("it", description(), ("a", "b"), STATUS, SCORE | {"contaminated": True})
    assert "optimistic" in optimistic
    unknown = custom_format.model_card(
        "it", description(), ("a", "b"), STATUS, SCORE | {"unknown_training_data": ["m"]}
    )
    assert "The training data of m is not stated" in unknown
    assert "accuracy 0" not in custom_format.model_card("it", description(), ("a", "b"), {}, None)


def test_equal_content_gives_an_archive_with_equal_bytes(tmp_path):
    for name in ("one", "two"):
        custom_format.write_custom_folder(tmp_path / name, "it", description(), ("a", "b"), STATUS, SCORE)
    archives = [tmp_path / name / "it_custom.bin" for name in ("one", "two")]
    assert archives[0].read_bytes() == archives[1].read_bytes()
    with zipfile.ZipFile(archives[0]) as archive:
        assert set(archive.namelist()) == {"README.md", "ensemble.json", "model_card.md", "predict.py"}


def test_reference_rows_stop_at_the_size_limit_but_hold_a_batch(tmp_path, monkeypatch):
    monkeypatch.setattr(custom_format, "MAX_PARITY_BYTES", 100)
    batches = [(np.zeros((1, 30), dtype=np.float32),)] * 3
    reference = ReferenceBatches(batches, [np.array([row]) for row in range(3)], np.eye(3))
    custom_format.write_parity_rows(tmp_path, reference, ())
    with np.load(tmp_path / custom_format.PARITY_FILE) as arrays:
        assert set(arrays.files) == {"probabilities", "batch_0000", "rows_0000"}
    monkeypatch.setattr(custom_format, "MAX_PARITY_BYTES", 240)
    custom_format.write_parity_rows(tmp_path, reference, [np.zeros((2, 2, 3), dtype=np.uint8)] * 3)
    with np.load(tmp_path / custom_format.PARITY_FILE) as arrays:
        assert {"batch_0001", "rows_0001"} <= set(arrays.files)
        assert "batch_0002" not in arrays.files
        assert arrays["squares"].shape == (3, 2, 2, 3)
