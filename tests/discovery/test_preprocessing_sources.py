"""Preprocessing of declared networks: what the user says, what files of timm and Hugging Face say."""

from __future__ import annotations

from dataclasses import replace

import pytest

from utils.core.errors import UserError
from utils.discovery import preprocessing_sources as sources
from utils.networks.preprocessing import Preprocessing

BASE = Preprocessing.of_base_pipeline(224).with_source("timm")
IMAGENET = {"image_mean": [0.485, 0.456, 0.406], "image_std": [0.229, 0.224, 0.225]}
HALF = {"image_mean": [0.5, 0.5, 0.5], "image_std": [0.5, 0.5, 0.5]}
CLIP = {
    "image_processor_type": "CLIPImageProcessor",
    "do_resize": True,
    "size": {"shortest_edge": 224},
    "resample": 3,
    "do_center_crop": True,
    "crop_size": {"height": 224, "width": 224},
    "do_rescale": True,
    "rescale_factor": 1 / 255,
    "do_normalize": True,
    "image_mean": [0.48145466, 0.4578275, 0.40821073],
    "image_std": [0.26862954, 0.26130258, 0.27577711],
    "do_convert_rgb": True,
}
VIT = {
    "image_processor_type": "ViTImageProcessor",
    "do_normalize": True,
    "do_rescale": True,
    "do_resize": True,
    "resample": 2,
    "rescale_factor": 0.00392156862745098,
    "size": {"height": 224, "width": 224},
    **HALF,
}


def applied(*texts, base=BASE):
    return sources.with_requests(base, sources.parse_requests(texts).of("leaf"), "--preprocess")


def test_each_key_changes_its_entry_and_the_record_is_the_users():
    texts = ("input_size=192", "resize=squash", "crop=0.8", "interpolation=lanczos", "mean=0.5", "std=0.5,0.4,0.3")
    record = applied(*texts, "channels=bgr", "range=-1,1", "exif=apply", "crop_offset=floor")
    assert record == Preprocessing(
        input_size=192,
        resize="squash",
        resized=240,
        interpolation="lanczos",
        crop_offset="floor",
        mean=(0.5, 0.5, 0.5),
        std=(0.5, 0.4, 0.3),
        channels="BGR",
        value_range=(-1.0, 1.0),
        exif="apply",
        source="user",
    )
    assert record.source == "user"
    assert applied() is BASE


def test_the_words_that_are_printed_for_a_record_give_that_record():
    record = applied("input_size=96", "resize=pad", "mean=0.1,0.2,0.3", "std=0.25", "range=0,255", "exif=apply")
    assert applied(*sources.as_requests(record, BASE)) == record
    assert sources.as_requests(BASE, BASE) == []
    squashed = replace(BASE, resize="squash")
    assert applied(*sources.as_requests(squashed, BASE)) == squashed


@pytest.mark.parametrize(
    ("texts", "resized"),
    [
        (["input_size=448"], 510),  # the fraction that is cropped stays
        (["resized=256"], 256),
        (["crop=0.875"], 256),
        (["crop=1"], 224),
        (["resize=squash"], 224),
        (["resize=squash", "resized=256"], 256),
    ],
)
def test_the_resized_side_follows_from_what_is_given(texts, resized):
    assert applied(*texts).resized == resized


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("mean", "expected KEY=VALUE or NAME:KEY=VALUE"),
        ("mean=", "expected KEY=VALUE"),
        ("man=0.5", r"no such key; did you mean 'mean'\?"),
        ("mean=a", "expected 1 or 3 numbers"),
        ("mean=0.5,0.5", "expected 1 or 3 numbers"),
        ("std=nan", "expected 1 or 3 numbers"),
        ("range=1", "expected 2 numbers"),
        ("crop=1.2", "expected a fraction above 0 and at most 1"),
        ("input_size=224px", "expected a whole number of pixels"),
        ("interpolation=bicubik", r"did you mean 'bicubic'\?"),
        ("resize=square", "resize is 'square'; expected one of shorter-side, squash, pad"),
        ("channels=rbg", "channels is 'RBG'"),
        ("input_size=4", "input_size is '4'; expected a whole number from 8"),
        ("resized=100", "resized 100 is less than input_size 224"),
        ("mean=123.7,116.8,103.9", "lies outside the range 0,1 .*such as range=0,255"),
        ("std=0", "three numbers above 0"),
    ],
)
def test_an_invalid_value_is_refused_by_name(text, reason):
    with pytest.raises(UserError, match=rf"^--preprocess.*{reason}"):
        applied(text)


def test_a_key_is_given_once_and_names_address_single_networks():
    for texts in (["mean=0.5", "mean=0.4"], ["crop=0.9", "resized=300"]):
        with pytest.raises(UserError, match="--preprocess"):
            sources.parse_requests(texts)
    requests = sources.parse_requests(["mean=0.5", "leaf:mean=0.4", "exif=apply"])
    assert requests.of("leaf") == {"mean": [0.4] * 3, "exif": "apply"}
    assert requests.of("tree") == {"mean": [0.5] * 3, "exif": "apply"}


def test_timm_says_what_its_own_weights_take():
    record = sources.of_architecture("vit_tiny_patch16_224", 32)
    assert record.describe() == "224 px of shorter side 248, bicubic, mean 0.5, std 0.5 (timm)"
    assert sources.is_guess(record)


def hugging_face(config, **changes):
    merged = {name: value for name, value in (config | changes).items() if value is not None}
    return sources.of_hugging_face(merged, "p.json", source="preprocessor_config.json")


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        (CLIP, "224 px of shorter side 224, bicubic"),
        (CLIP | {"image_processor_type": "CLIPImageProcessorFast"}, "224 px of shorter side 224, bicubic"),
        (VIT, "224 px squashed to 224, bilinear"),
        (
            {"feature_extractor_type": "ViTFeatureExtractor", "size": 384, "resample": 3, **HALF},
            "384 px squashed to 384, bicubic",
        ),
        (
            VIT
            | {"image_processor_type": "DeiTImageProcessor", "size": {"height": 256, "width": 256}}
            | {"do_center_crop": True, "crop_size": {"height": 224, "width": 224}},
            "224 px squashed to 256, bilinear",
        ),
        (
            {"image_processor_type": "ConvNextImageProcessor", "size": {"shortest_edge": 224}, "crop_pct": 0.875}
            | {"resample": 3, **IMAGENET},
            "224 px of shorter side 256, bicubic",
        ),
        (
            {"image_processor_type": "ConvNextImageProcessor", "size": {"shortest_edge": 384}, "crop_pct": 0.875}
            | {"resample": 3, **IMAGENET},
            "384 px squashed to 384, bicubic",
        ),
        (CLIP | {"image_processor_type": "BitImageProcessor", "crop_size": 200}, "200 px of shorter side 224, bicubic"),
        (
            {"image_processor_type": "SiglipImageProcessor", "size": {"height": 256, "width": 256}, "resample": 0}
            | HALF,
            "256 px squashed to 256, nearest",
        ),
    ],
)
def test_image_processors_of_hugging_face_are_understood(config, expected):
    record = hugging_face(config)
    assert record.describe().startswith(f"{expected}, crop rounded down, ")
    assert (record.exif, record.source) == ("apply", "preprocessor_config.json")
    assert list(record.mean) == config["image_mean"]
    assert list(record.std) == config["image_std"]
    assert record.value_range == (0.0, 1.0)


def test_rescaling_and_normalisation_that_are_off_are_followed():
    assert hugging_face(VIT, do_normalize=False).mean == (0.0, 0.0, 0.0)
    assert hugging_face(VIT, do_normalize=False).std == (1.0, 1.0, 1.0)
    assert hugging_face(VIT, do_rescale=False).value_range == (0.0, 255.0)
    assert hugging_face(VIT, rescale_factor=1 / 127.5).value_range == (0.0, 2.0)
    mobile = hugging_face(CLIP, image_processor_type="MobileViTImageProcessor", do_normalize=None)
    assert (mobile.channels, mobile.std) == ("BGR", (1.0, 1.0, 1.0))  # where the file is silent
    mobile = hugging_face(CLIP, image_processor_type="MobileViTImageProcessor", do_flip_channel_order=False)
    assert mobile.channels == "RGB"
    assert hugging_face(CLIP, do_flip_channel_order=True).channels == "BGR"


def test_the_image_processor_that_wraps_timm_is_read_as_timm():
    pretrained = {"input_size": [3, 240, 240], "crop_pct": 0.95, "crop_mode": "squash", "interpolation": "bilinear"}
    config = {"image_processor_type": "TimmWrapperImageProcessor", "pretrained_cfg": pretrained}
    record = sources.of_hugging_face(config, "p.json", source="preprocessor_config.json")
    assert record.describe().startswith("240 px squashed to 252, bilinear, mean 0.485")
    assert record.exif == "ignore"


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"image_processor_type": "EfficientNetImageProcessor"}, "'EfficientNetImageProcessor' is not supported"),
        ({"image_processor_type": None}, "'' is not supported"),
        ({"do_resize": False}, "it does not resize"),
        ({"do_pad": True}, "it pads"),
        ({"resample": 9}, "resample is '9'; expected an integer from 0 to 5"),
        ({"resample": "bicubic"}, "resample is 'bicubic'"),
        ({"size": {"longest_edge": 224}}, "size is .*expected a number of pixels"),
        ({"size": {"height": 224, "width": 336}, "do_center_crop": False}, "expected equal sides"),
        ({"size": {"shortest_edge": "224"}}, "size is"),
        ({"do_center_crop": False}, "do_center_crop is 'False'; expected true"),
        ({"crop_size": 300}, "crop_size is '300'; expected at most size, 224"),
        ({"image_mean": None}, "image_mean is 'None'; expected three numbers"),
        ({"image_mean": [0.5, 0.5]}, "mean is .*expected 3 finite numbers"),
        ({"do_normalize": "yes"}, "do_normalize is 'yes'; expected true or false"),
        ({"rescale_factor": -1}, "rescale_factor is '-1'"),
    ],
)
def test_what_an_image_processor_does_otherwise_is_refused_with_the_remedy(changes, reason):
    with pytest.raises(UserError, match=rf"^p\.json: .*{reason}.*--preprocess"):
        hugging_face(CLIP, **changes)


def test_records_that_differ_by_rounding_and_orientation_alone_do_not_contradict_each_other():
    assert not sources.differ(BASE, replace(BASE, crop_offset="floor", exif="apply"))
    assert sources.differ(BASE, replace(BASE, resized=256))
