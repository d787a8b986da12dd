"""Preprocessing inside an exported network, against the pixels that networks are given."""

from __future__ import annotations

import io
import warnings
from dataclasses import replace

import numpy as np
import onnxruntime
import pytest
import torch
from PIL import Image
from preprocessings import BASE_32

from utils.networks import image_preparation
from utils.networks.image_preparation import Preparation, resampling_problem
from utils.networks.preprocessing import Preprocessing
from utils.predictions.image_splits import normalise, standardise

SIZES = [(8, 8), (9, 7), (33, 31), (36, 36), (41, 300), (333, 127), (1, 3)]
HALF = {"mean": (0.5, 0.5, 0.5), "std": (0.5, 0.5, 0.5)}
RULES = {
    "base": BASE_32,
    "bicubic": replace(BASE_32, resized=35, interpolation="bicubic", **HALF),
    "floor": replace(BASE_32, resized=37, interpolation="bicubic", crop_offset="floor"),
    "squash": replace(BASE_32, resized=32, resize="squash", interpolation="lanczos"),
    "squash, cropped": replace(BASE_32, resized=40, resize="squash", interpolation="hamming"),
    "BGR of 0 to 255": replace(BASE_32, channels="BGR", value_range=(0.0, 255.0), mean=(104.0, 117.0, 124.0)),
}


def in_onnx(preprocessing: Preprocessing):
    """A preparation of uint8 images in onnxruntime."""
    file = io.BytesIO()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.onnx.export(
            Preparation(preprocessing, takes_uint8=True),
            (torch.zeros(2, 40, 50, 3, dtype=torch.uint8),),
            file,
            dynamo=False,
            opset_version=17,
            input_names=["images"],
            output_names=["prepared"],
            dynamic_axes={"images": {0: "batch", 1: "height", 2: "width"}, "prepared": {0: "batch"}},
        )
    return onnxruntime.InferenceSession(file.getvalue(), providers=["CPUExecutionProvider"])


@pytest.mark.parametrize("name", RULES)
def test_uint8_images_are_prepared_bit_for_bit_as_the_project_does_it(name):
    preprocessing = RULES[name]
    preparation, session = Preparation(preprocessing, takes_uint8=True), in_onnx(preprocessing)
    for height, width in SIZES:
        pixels = np.random.default_rng(height).integers(0, 256, (height, width, 3), dtype=np.uint8)
        square = preprocessing.resizing().square(Image.fromarray(pixels))
        expected = normalise(torch.from_numpy(square)[None], preprocessing)
        torch.testing.assert_close(preparation(torch.from_numpy(pixels)[None]), expected, rtol=0, atol=0)
        (prepared,) = session.run(None, {"images": pixels[None]})
        torch.testing.assert_close(torch.from_numpy(prepared), expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("name", RULES)
def test_images_in_0_to_1_are_normalised(name):
    images = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    prepared = Preparation(RULES[name], takes_uint8=False)(images)
    torch.testing.assert_close(prepared, standardise(images.clone(), RULES[name]), rtol=0, atol=0)


def test_rules_that_a_graph_cannot_follow_have_a_reason():
    assert [resampling_problem(preprocessing) for preprocessing in RULES.values()] == [None] * len(RULES)
    assert resampling_problem(replace(BASE_32, resize="pad")) == "pads images"
    assert "by box interpolation" in resampling_problem(replace(BASE_32, interpolation="box"))
    assert "larger than the resized image" in resampling_problem(replace(BASE_32, resized=31))


def test_preparation_shows_no_warning(monkeypatch):
    """Also none that pytest's own configuration ignores, where the branch is compiled for the first time."""
    image_preparation._by_the_shorter_way.cache_clear()
    monkeypatch.setattr(image_preparation.PIL, "__version__", "13.0.0")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        Preparation(BASE_32, takes_uint8=True)(torch.zeros(1, 40, 50, 3, dtype=torch.uint8))
    assert image_preparation._by_the_shorter_way.cache_info().misses == 1
