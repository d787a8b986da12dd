"""Resize rules against the arithmetic of torchvision, timm and Hugging Face, bit for bit."""

from __future__ import annotations

import hashlib
import math
import random

import numpy as np
import pytest
import timm
import torch
from PIL import Image, ImageOps
from timm.data import create_transform, resolve_data_config
from timm.data.transforms_factory import transforms_imagenet_eval

from utils.image_cache import decode_images, open_images
from utils.resizing import (
    CROP_MODES,
    INTERPOLATIONS,
    Resizing,
    evaluation_record,
    evaluation_resizing,
    exif_orientation,
    pad_fill,
    record_of_timm_config,
    resized_pixels,
    scaled_record,
    timm_record,
)

MEAN = (0.1, 0.5, 0.9)
GOLDEN_NAME = "36_271a413bd339c570.npy"
GOLDEN_BYTES = "bb81b0c71804cab9bd1324993dbf4da4caac0b72f281b3d091426013f76171d2"


def random_image(rng: random.Random, least: int = 12, most: int = 150) -> Image.Image:
    shape = (rng.randint(least, most), rng.randint(least, most), 3)
    return Image.fromarray(np.random.default_rng(rng.randrange(2**31)).integers(0, 256, shape, dtype=np.uint8))


def test_squares_are_those_of_timm():
    rng = random.Random(0)
    for _ in range(120):
        image = random_image(rng)
        size, fraction = rng.randint(9, 70), rng.choice((0.6, 0.8, 0.875, 0.9, 0.95, 1.0, 1.3))
        mode, interpolation = rng.choice(list(CROP_MODES)), rng.choice(INTERPOLATIONS)
        config = {"input_size": (3, size, size), "crop_pct": fraction, "crop_mode": mode, "mean": MEAN}
        record = record_of_timm_config({**config, "interpolation": interpolation, "std": MEAN}, source="timm")
        fill = pad_fill(record["mean"], record["value_range"], "RGB") if mode == "border" else (0, 0, 0)
        rule = Resizing(size, record["resized"], record["resize"], interpolation, record["crop_offset"], fill=fill)
        own = transforms_imagenet_eval(size, fraction, mode, None, interpolation, MEAN, MEAN, normalize=False)
        message = f"{image.size} {size} {fraction} {mode} {interpolation}"
        np.testing.assert_array_equal(rule.square(image), own(image).permute(1, 2, 0).numpy(), err_msg=message)


def test_squares_are_those_of_torchvision():
    from torchvision import transforms

    rng = random.Random(1)
    for _ in range(60):
        image, size = random_image(rng), rng.randint(9, 70)
        resized = rng.randint(8, 90)
        own = transforms.Compose([transforms.Resize(resized), transforms.CenterCrop(size)])
        np.testing.assert_array_equal(Resizing(size, resized).square(image), np.asarray(own(image)))


def hugging_face(image: Image.Image, resized: int, size: int, interpolation: str, squash: bool) -> np.ndarray:
    """`resize` (shortest_edge, or height and width) and `center_crop` of Hugging Face's image processors."""
    if squash:
        target = (resized, resized)
    else:
        short, long = sorted(image.size)
        length = int(resized * long / short)
        target = (resized, length) if image.width <= image.height else (length, resized)
    pixels = np.asarray(image.resize(target, getattr(Image.Resampling, interpolation.upper())))
    height, width = pixels.shape[:2]
    top, left = (height - size) // 2, (width - size) // 2
    if top >= 0 and left >= 0:
        return pixels[top : top + size, left : left + size]
    new_height, new_width = max(size, height), max(size, width)
    padded = np.zeros((new_height, new_width, 3), dtype=np.uint8)
    top_pad, left_pad = math.ceil((new_height - height) / 2), math.ceil((new_width - width) / 2)
    padded[top_pad : top_pad + height, left_pad : left_pad + width] = pixels
    top, left = top + top_pad, left + left_pad
    return padded[max(0, top) : min(new_height, top + size), max(0, left) : min(new_width, left + size)]


def test_squares_are_those_of_hugging_face():
    rng = random.Random(2)
    differing = 0
    for _ in range(80):
        image, size = random_image(rng), rng.randint(9, 70)
        resized, squash = rng.randint(8, 90), rng.random() < 0.3
        interpolation = rng.choice(("bilinear", "bicubic", "lanczos"))
        resize = "squash" if squash else "shorter-side"
        expected = hugging_face(image, resized, size, interpolation, squash)
        rule = Resizing(size, resized, resize, interpolation, "floor")
        np.testing.assert_array_equal(rule.square(image), expected)
        rounded = Resizing(size, resized, resize, interpolation, "round").square(image)
        differing += not np.array_equal(rounded, expected)
    assert differing > 10  # half pixels occur, so the offset decides


def test_records_of_architectures_give_the_whole_input_of_timm():
    rng = random.Random(3)
    image = random_image(rng, 100, 300)
    for name in ("vit_tiny_patch16_224", "tf_efficientnet_lite0", "resnet18", "vit_base_patch16_siglip_224"):
        record = timm_record(name)
        fields = ("input_size", "resized", "resize", "interpolation", "crop_offset")
        pixels = torch.from_numpy(Resizing(*(record[field] for field in fields)).square(image)).permute(2, 0, 1)
        mean, std = (torch.tensor(record[field]).view(3, 1, 1) for field in ("mean", "std"))
        own = create_transform(**resolve_data_config({}, pretrained_cfg=timm.get_pretrained_cfg(name).to_dict()))
        assert torch.equal((pixels / 255).sub(mean).div(std), own(image)), name
    assert timm_record("resnet18", 32)["resized"] == math.floor(32 / 0.95)
    assert timm_record("resnet18.tv_in1k")["interpolation"] == "bilinear"


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"input_size": (3, 32, 40)}, "a square"),
        ({"input_size": (1, 32, 32)}, "three channels"),
        ({"crop_pct": -0.5}, "a fraction above 0"),
        ({"crop_mode": "fancy"}, "one of center, squash, border"),
        ({"interpolation": "random"}, "one of nearest, bilinear"),
        ({"mean": ["a", "b", "c"]}, "not the form of a timm configuration"),
        ({"input_size": 7}, "not the form of a timm configuration"),
    ],
)
def test_timm_configurations_that_no_record_can_hold_are_refused(config, message):
    with pytest.raises(ValueError, match=message):
        record_of_timm_config(config, source="config.json")


def test_unknown_architectures_are_refused():
    with pytest.raises(ValueError, match="has no model 'resnet18x'"):
        timm_record("resnet18x")
    with pytest.raises(ValueError, match="Invalid pretrained tag"):
        timm_record("resnet18.unknown_tag")


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_applied_before_the_resize_where_the_rule_says_so(tmp_path, orientation):
    image = random_image(random.Random(orientation), 40, 80)
    exif = Image.Exif()
    exif[0x0112] = orientation
    image.save(tmp_path / "turned.jpg", exif=exif, quality=95)
    rules = [Resizing(24, 30), Resizing(24, 30, exif="apply")]
    with Image.open(tmp_path / "turned.jpg") as opened:
        pixels = resized_pixels(opened, rules)
        assert exif_orientation(opened) == orientation
    with Image.open(tmp_path / "turned.jpg") as opened:
        upright = ImageOps.exif_transpose(opened).convert("RGB")
    with Image.open(tmp_path / "turned.jpg") as opened:
        plain = opened.convert("RGB")
    np.testing.assert_array_equal(pixels["30"], np.asarray(Resizing(24, 30).resized_image(plain)))
    np.testing.assert_array_equal(pixels["30-exif"], np.asarray(Resizing(24, 30).resized_image(upright)))
    assert np.array_equal(pixels["30"], pixels["30-exif"]) == (orientation == 1)


def test_padding_is_that_of_the_mean_in_the_order_of_the_image():
    assert pad_fill((0.0, 0.5, 1.0), (0, 1), "RGB") == (0, 128, 255)
    assert pad_fill((0.0, 0.5, 1.0), (0, 1), "BGR") == (255, 128, 0)
    assert pad_fill((0.0, 0.0, 0.0), (-1, 1), "RGB") == (128, 128, 128)
    assert pad_fill((300.0, -4.0, 51.0), (0, 255), "RGB") == (255, 0, 51)
    square = Resizing(20, 20, "pad", fill=(1, 2, 3)).square(Image.new("RGB", (40, 10), (9, 9, 9)))
    assert square[:7].reshape(-1, 3).tolist() == [[1, 2, 3]] * 140
    assert square[8:12].reshape(-1, 3).tolist() == [[9, 9, 9]] * 80


# the cache ------------------------------------------------------------------------------------------------------------
def saved(folder, count: int = 4):
    paths = []
    for number in range(count):
        paths.append(folder / f"{number}.png")
        random_image(random.Random(number), 40, 90).save(paths[-1])
    return paths, [hashlib.sha256(path.read_bytes()).hexdigest() for path in paths]


def test_equal_rules_share_their_pixels_and_each_rule_resizes_from_the_original(tmp_path, monkeypatch):
    paths, contents = saved(tmp_path)
    decoded = []
    convert = Image.Image.convert
    monkeypatch.setattr(Image.Image, "convert", lambda image, mode: decoded.append(mode) or convert(image, mode))
    rules = [
        evaluation_resizing(32),
        Resizing(24, 36, crop_offset="floor"),
        Resizing(32, 36, interpolation="bicubic"),
        Resizing(28, 28, "squash"),
        Resizing(32, 32, "pad", "lanczos", fill=(5, 6, 7)),
    ]
    decode_images(paths, contents, rules, tmp_path / "cache", threads=1)
    assert len(decoded) == len(paths)
    files = {path.name.partition("_")[0] for path in (tmp_path / "cache").glob("*.npy")}
    assert files == {"36", "36-bicubic", "28-squash", "32-pad-lanczos"}
    for rule in rules:
        crops = open_images(paths, contents, rule, tmp_path / "cache").crops(range(len(paths)))
        assert len(decoded) == len(paths)
        for path, crop in zip(paths, crops, strict=True):
            with Image.open(path) as image:
                image.load()
                np.testing.assert_array_equal(crop, rule.crop(np.asarray(rule.resized_image(image))))
    monkeypatch.undo()


def test_packs_of_the_evaluation_transform_have_the_names_and_bytes_of_earlier_versions(tmp_path):
    path = tmp_path / "ramp.png"
    values = (np.arange(50 * 70 * 3) * 7 % 251).astype(np.uint8).reshape(50, 70, 3)
    Image.fromarray(values).save(path)
    open_images([path], ["ab" * 32], evaluation_resizing(32), tmp_path / "cache")
    (pack,) = (tmp_path / "cache").glob("*.npy")
    assert pack.name == GOLDEN_NAME
    assert hashlib.sha256(pack.read_bytes()).hexdigest() == GOLDEN_BYTES


@pytest.mark.parametrize(("size", "resized"), [(352, 370), (480, 505), (960, 1010), (224, 255)])
def test_a_record_at_its_own_size_keeps_its_resized_side(size, resized):
    record = {**evaluation_record(size), "resized": resized}
    assert scaled_record(record, size, source="base pipeline") == record
    assert scaled_record(record, 2 * size, source="checkpoint")["resized"] == 2 * resized


@pytest.mark.parametrize(
    ("entries", "reason"),
    [
        ({"interpolation": "sharp"}, "interpolation is 'sharp'; expected nearest or bilinear"),
        ({"resized": "255"}, "resized is '255'"),
        ({"mean": [0.5, 0.5]}, "mean is .* expected 3 finite numbers"),
        ({"mean": [0.5, 0.5, math.inf]}, "mean is .* expected 3 finite numbers"),
        ({"std": [0.5, 0.5, 0]}, "each std above 0"),
        ({"value_range": [1, 0]}, "ascending"),
        ({"crop": 0.9}, "expected a dictionary of input_size"),
    ],
)
def test_anything_but_a_record_is_refused(entries, reason):
    with pytest.raises(ValueError, match=reason):
        scaled_record({**evaluation_record(64), **entries}, 64, source="checkpoint")


@pytest.mark.parametrize("value", [[0.5, 0.5, 0], [0.5, 0.5, math.inf]])
def test_deviations_that_no_image_can_be_divided_by_are_refused(value):
    with pytest.raises(ValueError, match="std above 0"):
        record_of_timm_config({"input_size": (3, 64, 64), "std": value}, source="config.json")
