"""Preprocessing records: their form, what is refused, and the values that they make of pixels."""

from __future__ import annotations

import json
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from preprocessings import BASE_32

from utils.core.errors import UserError
from utils.networks.preprocessing import Preprocessing
from utils.predictions import catalog, image_splits, inspection
from utils.predictions.catalog import Member
from utils.predictions.store import Store

CLASSES = ("ant", "bee")


def changed(**entries):
    return {**BASE_32.as_record(), **entries}


def test_a_record_is_json_and_comes_back_equal():
    record = json.loads(json.dumps(BASE_32.as_record()))
    assert Preprocessing.from_record(record, "x") == BASE_32
    assert record["resized"] == 36
    assert record["source"] == "base pipeline"
    assert BASE_32.is_base_pipeline
    other = replace(BASE_32, interpolation="bicubic")
    assert not other.is_base_pipeline
    assert other.with_source("user") == other  # the source decides no pixel
    assert "source" not in other.inputs_record()


@pytest.mark.parametrize(
    ("record", "message"),
    [
        (None, "'None'; expected a dictionary of input_size"),
        ({}, "no input_size, resize"),
        (changed(intrepolation="bicubic"), r"unknown 'intrepolation'; did you mean 'interpolation'\?"),
        (changed(input_size=True), "input_size is 'True'; expected a whole number from 8 to 4096"),
        (changed(input_size=4.0), "input_size is '4.0'"),
        (changed(resized=0), "resized is '0'; expected a whole number from 1"),
        (changed(resize="shorter"), r"one of shorter-side, squash, pad; did you mean 'shorter-side'\?"),
        (changed(interpolation=["bicubic"]), "expected one of nearest, bilinear"),
        (changed(crop_offset="ceil"), "expected one of round, floor"),
        (changed(mean=[0.5, 0.5]), "expected 3 finite numbers"),
        (changed(mean=[0.5, 0.5, float("nan")]), "expected 3 finite numbers"),
        (changed(mean=[0.5, 0.5, "0.5"]), "expected 3 finite numbers"),
        (changed(std=[0.5, 0, 0.5]), "expected three numbers above 0"),
        (changed(channels="GRB"), "expected one of RGB, BGR"),
        (changed(value_range=[1, 0]), "expected a lower and a higher number"),
        (changed(exif="rotate"), "expected one of ignore, apply"),
        (changed(source=3), "expected a name of the source"),
    ],
)
def test_other_forms_are_refused_with_place_and_remedy(record, message):
    with pytest.raises(UserError, match=message) as refusal:
        Preprocessing.from_record(record, "leaf.pth: extra.preprocessing", remedy="Train it again")
    assert str(refusal.value).startswith("leaf.pth: extra.preprocessing: ")
    assert str(refusal.value).endswith(". Train it again")


def test_a_description_names_what_differs_from_the_usual():
    assert BASE_32.describe() == (
        "32 px of shorter side 36, bilinear, mean 0.485 0.456 0.406, std 0.229 0.224 0.225 (base pipeline)"
    )
    other = replace(
        BASE_32, resize="squash", crop_offset="floor", mean=(0.5,) * 3, channels="BGR", value_range=(-1.0, 1.0)
    )
    assert replace(other, exif="apply", source="user").describe() == (
        "32 px squashed to 36, bilinear, crop rounded down, mean 0.5, std 0.229 0.224 0.225, BGR, values -1 1, EXIF "
        "orientation applied (user)"
    )


@pytest.mark.parametrize("channels", ["RGB", "BGR"])
@pytest.mark.parametrize("value_range", [(0.0, 1.0), (-1.0, 1.0), (0.0, 255.0)])
def test_values_have_the_records_order_range_mean_and_deviation(channels, value_range):
    pixels = torch.from_numpy(np.random.default_rng(0).integers(0, 256, (2, 8, 8, 3), dtype=np.uint8))
    preprocessing = replace(
        BASE_32, channels=channels, value_range=value_range, mean=(0.1, 0.2, 0.3), std=(0.5, 0.6, 0.7)
    )
    low, high = value_range
    values = pixels.numpy().astype(np.float64) / 255 * (high - low) + low
    expected = (values[..., :: -1 if channels == "BGR" else 1] - (0.1, 0.2, 0.3)) / (0.5, 0.6, 0.7)
    normalised = image_splits.normalise(pixels, preprocessing)
    np.testing.assert_allclose(normalised.permute(0, 2, 3, 1).numpy(), expected, rtol=1e-6, atol=1e-5)
    unit = pixels.permute(0, 3, 1, 2) / 255
    torch.testing.assert_close(image_splits.standardise(unit, preprocessing), normalised, rtol=0, atol=0)


def test_padding_is_filled_with_the_mean():
    preprocessing = replace(BASE_32, resize="pad", mean=(0.0, 0.5, 1.0), channels="BGR")
    assert preprocessing.resizing().fill == (255, 128, 0)
    assert replace(preprocessing, resize="squash").resizing().fill == (0, 0, 0)


# digests --------------------------------------------------------------------------------------------------------------
def member_with(preprocessing: Preprocessing) -> Member:
    digest = catalog.network_digest("ab" * 32, "CustomConvNeXt", "tiny", CLASSES, preprocessing)
    entries = ({"path": "a", "stage": "final", "sha256": "ab" * 32},)
    architecture = "CustomConvNeXt"
    return Member(architecture, architecture, "tiny", 32, CLASSES, entries, (), None, None, None, digest)


def key_of(member: Member) -> str:
    store = Store.__new__(Store)
    store.catalog = SimpleNamespace(splits={"test": {"digest": "cd" * 32}}, has_images=True, classes=CLASSES)
    return store.key(member, "test")


def test_digests_and_keys_of_the_base_pipeline_are_those_of_earlier_versions():
    member = member_with(BASE_32)
    assert member.digest == "108a667e3d5a466bd627481326ab2492aba69da35f2f2453bd666d6332512f4c"
    assert key_of(member) == "34634af65090edb442c41560407d85ee39f74b145a6f735fad37c1faab70e49f"
    measured = inspection.measured_key(member, "cd" * 32, CLASSES)
    assert measured == "ec3069cc15f78a5e737933080576cb069043590de62ec67476046318a9b3c990"


def test_any_other_pixel_or_value_gives_another_key():
    others = {
        "resized": 40,
        "resize": "squash",
        "interpolation": "bicubic",
        "crop_offset": "floor",
        "mean": (0.5, 0.5, 0.5),
        "std": (0.5, 0.5, 0.5),
        "channels": "BGR",
        "value_range": (0.0, 255.0),
        "exif": "apply",
    }
    variants = [BASE_32, *(replace(BASE_32, **{name: value}) for name, value in others.items())]
    keys = {key_of(member_with(preprocessing)) for preprocessing in variants}
    assert len(keys) == len(variants)
    assert key_of(member_with(replace(variants[1], source="user"))) == key_of(member_with(variants[1]))
