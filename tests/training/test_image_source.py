"""Images with their augmentation: views drawn in advance, evaluation crops, and the kind of a checkpoint."""

from __future__ import annotations

import hashlib
from dataclasses import replace

import numpy as np
import pytest
import torch
from digit_splits import COUNT, split_of
from PIL import Image
from preprocessings import BASE_32

from utils import base_back
from utils.augmentation import augment
from utils.networks.preprocessing import Preprocessing
from utils.predictions.image_splits import ImageSplit
from utils.training import image_source
from utils.training.batch_schedule import NEVER, BatchSchedule
from utils.training.image_source import ImageSource, augmentation_kind


def source_of(folder, augmentation: str) -> ImageSource:
    return ImageSource(split_of(folder / "images"), BASE_32, augmentation, image_cache=folder / "cache")


def test_views_drawn_in_advance_give_the_same_augmentation():
    from utils.augmentation import draw_views, show

    images = [torch.randint(0, 255, (3, 36, 36), dtype=torch.uint8) for _ in range(9)]
    views = draw_views(*torch.full((2, 9), 36.0), "full", torch.Generator().manual_seed(5))
    expected = augment(images, 32, "full", torch.Generator().manual_seed(5))
    assert torch.equal(show(images, 32, views), expected)
    rows = torch.tensor([7, 2])
    assert torch.equal(show([images[7], images[2]], 32, views.take(rows)), expected[rows])
    assert torch.equal(type(views).joined([views, views]).take(rows + 9).warps, views.take(rows).warps)


def test_without_augmentation_every_view_is_the_evaluation_crop(tmp_path):
    source = source_of(tmp_path, "none")
    assert source.draw_views(3) is None
    schedule = BatchSchedule(source, 5, 7, np.full(COUNT, NEVER), n_views=2)
    crops = source.load(torch.arange(COUNT), BASE_32, None)
    for batch, images in schedule.loader(1, BASE_32):
        assert torch.equal(images, crops[batch.rows])


def test_evaluation_batches_cover_the_images_from_a_start_on(tmp_path, monkeypatch):
    monkeypatch.setattr(image_source, "EVALUATION_BATCH_SIZE", 8)
    source = source_of(tmp_path, "full")
    batches = list(source.evaluation_batches(BASE_32, start=3))
    assert [len(rows) for rows, _ in batches] == [8, 8, COUNT - 3 - 16]
    rows = torch.cat([rows for rows, _ in batches])
    assert rows.tolist() == list(range(3, COUNT))
    assert torch.equal(torch.cat([images for _, images in batches]), source.load(rows, BASE_32, None))


def gradient_source(folder, view_preprocessing) -> ImageSource:
    """Two large smooth images, in which every place has a colour of its own."""
    paths = []
    for number, (height, width) in enumerate(((300, 420), (420, 300))):
        down, right = np.mgrid[0:height, 0:width]
        planes = [255 * down / height, 255 * right / width, 255 * (down + right) / (height + width)]
        paths.append(folder / f"{number}.png")
        Image.fromarray(np.stack(planes, axis=2).astype(np.uint8)).save(paths[-1])
    contents = tuple(hashlib.sha256(path.read_bytes()).hexdigest() for path in paths)
    images = ImageSplit("train", ("a",), ("0", "1"), np.zeros(2, dtype=np.int64), tuple(paths), contents, "digest")
    return ImageSource(images, view_preprocessing, "full", image_cache=folder / "cache")


def test_a_view_shows_networks_of_other_preprocessing_the_same_part_with_their_own_normalisation(tmp_path):
    base = Preprocessing.of_base_pipeline(96)
    source = gradient_source(tmp_path, base)
    views, rows = source.draw_views(1), torch.arange(2)
    reference = source.load(rows, base, views)
    mean, std = (torch.tensor(values).view(1, 3, 1, 1) for values in (base.mean, base.std))
    unit = reference * std + mean
    own_values = replace(base, mean=(0.5, 0.4, 0.3), std=(0.5, 0.6, 0.7), channels="BGR", value_range=(-1.0, 1.0))
    own_mean, own_std = (torch.tensor(values).view(1, 3, 1, 1) for values in (own_values.mean, own_values.std))
    expected = ((unit * 2 - 1).flip(1) - own_mean) / own_std
    torch.testing.assert_close(source.load(rows, own_values, views), expected, rtol=0, atol=1e-5)
    for resize, interpolation in (("squash", "bicubic"), ("pad", "bilinear"), ("shorter-side", "lanczos")):
        other = replace(base, input_size=48, resized=60, resize=resize, interpolation=interpolation)
        shown = source.load(rows, other, views) * std + mean
        smaller = torch.nn.functional.interpolate(unit, 48, mode="area")
        assert shown.shape == (2, 3, 48, 48)
        assert (shown - smaller).abs().median() < 0.01, resize
        assert (shown - smaller).abs().mean() < 0.03, resize
        crops = source.load(rows, other, None)
        assert (crops * std + mean - shown).abs().mean() > 0.05  # which is not the evaluation crop


@pytest.mark.parametrize(
    ("facts", "setting", "expected"),
    [
        ({"augment": "no_flip"}, "none", "no_flip"),
        ({}, "none", "none"),
        ({"augment": "of another program"}, "none", "full"),
    ],
)
def test_the_augmentation_is_that_of_the_checkpoint_else_of_the_settings(monkeypatch, facts, setting, expected):
    monkeypatch.setattr(base_back.settings(), "AUGMENT", setting, raising=False)
    assert augmentation_kind(facts) == expected
