"""The delivered program's checks and preparation, which need no ONNX file."""

from __future__ import annotations

import json
from dataclasses import asdict

import numpy as np
import onnx
import onnx_files
import pytest
from PIL import Image

from utils import base_back
from utils.inference import onnx_prediction
from utils.inference.onnx_prediction import (
    ExportedModel,
    ImageInput,
    ResizeRule,
    check_shape,
    list_image_files,
    read_inputs,
    row_problems,
)


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


RULES = [
    ResizeRule(32, 36),
    ResizeRule(32, 35, interpolation="bicubic", crop_offset="floor"),
    ResizeRule(32, 32, "squash", "lanczos"),
    ResizeRule(32, 41, "squash", "nearest"),
    ResizeRule(32, 32, "pad", "hamming", fill=(1, 2, 3)),
    ResizeRule(33, 30, "pad", "box", "floor", fill=(1, 2, 3)),
    ResizeRule(32, 25, fill=(7, 8, 9)),
    ResizeRule(32, 36, exif="apply"),
]


@pytest.mark.parametrize("rule", RULES, ids=str)
def test_squares_are_those_that_the_networks_are_given(tmp_path, rule):
    """Of the base pipeline's resizing, also of an image that its EXIF orientation turns."""
    resizing = base_back.load_bundled("resizing").Resizing(**asdict(rule))
    for number, (width, height) in enumerate([(100, 60), (61, 100), (32, 32), (20, 9), (1, 3), (300, 41)]):
        path = tmp_path / f"{number}.png"
        exif = Image.Exif()
        exif[onnx_prediction.ORIENTATION] = 1 + number
        pixels = np.random.default_rng(number).integers(0, 256, (height, width, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(path, exif=exif)
        with Image.open(path) as image:
            expected = resizing.square(image)
        (prepared,) = prepared_by([rule], path)
        np.testing.assert_array_equal(prepared, expected.transpose(2, 0, 1).astype(np.float32) / np.float32(255))
        assert prepared.dtype == np.float32


def prepared_by(rules, path):
    """The inputs of one file, by a model without a graph."""
    model = object.__new__(ExportedModel)
    model.inputs = [ImageInput(f"images_{number}", rule, rule.exif) for number, rule in enumerate(rules)]
    return model.prepare(path)


def test_an_image_that_a_rule_would_enlarge_beyond_measure_is_not_decoded(tmp_path):
    Image.new("RGB", (60_000, 1)).save(tmp_path / "line.png")
    with pytest.raises(ValueError, match=r"and still .* with its shorter side at 4096"):
        prepared_by([ResizeRule(32, 4096)], tmp_path / "line.png")


RULE = {**asdict(RULES[0]), "fill": [0, 0, 0]}


def inputs_of(**changes) -> dict:
    return {"kind": "float-nchw", "inputs": [{"name": "images", "resizing": RULE | changes}]}


def test_inputs_of_metadata_are_read():
    assert read_inputs(inputs_of(resize="pad", fill=[1, 2, 3])) == [
        ImageInput("images", ResizeRule(32, 36, "pad", fill=(1, 2, 3)), "ignore")
    ]
    earlier = {"kind": "float-nchw", "name": "images", "img_size": 32, "shorter_side": 36}
    assert read_inputs(earlier) == [ImageInput("images", RULES[0], "ignore")]
    assert read_inputs({"kind": "uint8-nhwc", "name": "images"}) == [ImageInput("images", None, "ignore")]
    decoded = {"kind": "uint8-nhwc", "inputs": [{"name": "images", "exif": "apply"}]}
    assert read_inputs(decoded) == [ImageInput("images", None, "apply")]


@pytest.mark.parametrize(
    ("metadata", "message"),
    [
        ([], "lack the kind"),
        ({"kind": ["float-nchw"]}, "lack the kind"),
        ({"kind": "member-logits", "name": "member_logits"}, "takes member-logits, not images"),
        ({"kind": "float-nchw", "inputs": []}, "expected a list of inputs"),
        ({"kind": "float-nchw", "inputs": ["images"]}, "expected a name"),
        ({"kind": "float-nchw", "inputs": [{"name": 3, "resizing": RULE}]}, "expected a name"),
        ({"kind": "float-nchw", "name": "images"}, "input_size is None"),
        (
            {"kind": "float-nchw", "inputs": [{"name": "images", "resizing": {"resized": 3}}]},
            "expected input_size, resi",
        ),
        ({"kind": "uint8-nhwc", "inputs": [{"name": "images", "exif": "turn"}]}, "exif is 'turn'"),
        (inputs_of(resize="stretch"), "resize is 'stretch'; expected one of shorter-side, squash, pad"),
        (inputs_of(interpolation="__class__"), "interpolation is '__class__'"),
        (inputs_of(interpolation=["bilinear"]), "interpolation is"),
        (inputs_of(resized=10**9), "resized is 1000000000; expected a whole number from 1 to 8192"),
        (inputs_of(resized=True), "resized is True"),
        (inputs_of(input_size=0), "input_size is 0"),
        (inputs_of(input_size=32.0), "input_size is 32.0"),
        (inputs_of(fill=[0, 0, 256]), "fill is"),
        (inputs_of(fill="abc"), "fill is"),
        (inputs_of(more=1), "expected input_size, resized"),
        ({"kind": "float-nchw", "inputs": inputs_of(input_size=8192)["inputs"] * 2}, "more than 67108864 pixels"),
    ],
)
def test_metadata_of_another_form_are_refused(metadata, message):
    with pytest.raises(ValueError, match=message):
        read_inputs(metadata)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"name": "pictures"}, "its graph takes images, its metadata describe pictures"),
        ({"img_size": 16}, r"images is tensor\(float\) \['batch', 3, 8, 8\]; its metadata .* \[None, 3, 16, 16\]"),
        ({"kind": "uint8-nhwc"}, r"its metadata describe tensor\(uint8\)"),
        ({"shorter_side": 10**7}, "resized is 10000000"),
        ({"inputs": [{"name": "images", "resizing": RULE | {"exif": None}}]}, "exif is 'None'"),
        ({"inputs": [[]] * 3}, "expected a name"),
    ],
)
def test_a_graph_that_takes_other_inputs_than_described_is_refused(tmp_path, changes, message):
    path = onnx_files.constant(tmp_path / "model.onnx", (0.5, 0.5))
    assert [described.name for described in ExportedModel(path).inputs] == ["images"]
    model = onnx.load(str(path))
    properties = {"classes": json.dumps(["a", "b"]), "input": json.dumps(onnx_files.INPUT | changes)}
    onnx.helper.set_model_props(model, properties)
    onnx.save(model, str(path))
    with pytest.raises(ValueError, match=message) as caught:
        ExportedModel(path)
    assert str(path) in str(caught.value)


def test_batches_are_small_where_images_are_large():
    model = object.__new__(ExportedModel)
    sizes = {224: 32, 2048: 5, 8192: 1}
    for size, count in sizes.items():
        model.inputs = [ImageInput("images", ResizeRule(size, size), "ignore")]
        assert model.batch_size == count


def test_folders_are_searched_for_images_and_files_are_taken_as_named(tmp_path):
    (tmp_path / "below").mkdir()
    for name in ("b.png", "below/a.JPG", "c.webp", "d.TIFF", "notes.txt"):
        (tmp_path / name).touch()
    assert list_image_files([tmp_path]) == [tmp_path / name for name in ("b.png", "below/a.JPG", "c.webp", "d.TIFF")]
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
