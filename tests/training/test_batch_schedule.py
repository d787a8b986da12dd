"""Batches and views of every epoch: repeatable, each image once, the same views for networks of any input size."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from digit_splits import COUNT, split_of
from fake_cuda import fake_cuda
from preprocessings import BASE_32

from utils.networks.preprocessing import Preprocessing
from utils.training.batch_schedule import ALWAYS, HALF, NEVER, BatchSchedule, derived_seed
from utils.training.image_source import ImageSource


@pytest.fixture
def source(tmp_path) -> ImageSource:
    return ImageSource(split_of(tmp_path / "images"), BASE_32, "full", image_cache=tmp_path / "cache")


def schedule_of(source: ImageSource, unaugmented: str = NEVER, *, seed: int = 7, **options) -> BatchSchedule:
    return BatchSchedule(source, 5, seed, np.full(len(source), unaugmented), **options)


def images_of(schedule: BatchSchedule, epoch: int, size: int = 32) -> torch.Tensor:
    """The loaded images in the order of the rows."""
    loaded = torch.empty(len(schedule.image_source), 3, size, size)
    for batch, images in schedule.loader(epoch, Preprocessing.of_base_pipeline(size)):
        loaded[batch.rows] = images
    return loaded


def test_an_epoch_has_every_image_once_and_no_batch_of_one(source):
    schedule = schedule_of(source)
    assert [len(batch.rows) for batch in schedule.batches(0)] == [5, 5, 5, 6]  # BatchNorm fails on one image
    assert len(schedule) == 4
    assert sorted(torch.cat([batch.rows for batch in schedule.batches(0)]).tolist()) == list(range(COUNT))
    assert not torch.equal(schedule.batches(0)[0].rows, schedule.batches(1)[0].rows)


def test_an_epoch_is_repeatable_without_the_epochs_before_it(source):
    schedule = schedule_of(source)
    first, second = images_of(schedule, 0), images_of(schedule, 1)
    assert not torch.equal(first, second)
    assert torch.equal(images_of(schedule_of(source), 1), second)
    assert not torch.equal(images_of(schedule_of(source, seed=8), 1), second)


def test_seeds_follow_from_every_part():
    assert derived_seed(1, "epoch", 2) == derived_seed(1, "epoch", 2)
    assert len({derived_seed(1, "epoch", 2), derived_seed(2, "epoch", 2), derived_seed(1, "view", 2)}) == 3
    assert 0 <= derived_seed("any") < 2**31


def test_views_recur_and_are_spread_over_the_images(source):
    schedule = schedule_of(source, n_views=3)
    assert torch.equal(images_of(schedule, 0), images_of(schedule, 3))
    assert not torch.equal(images_of(schedule, 0), images_of(schedule, 1))
    assert set(schedule.view_numbers(0)) == {0, 1, 2}
    np.testing.assert_array_equal(schedule.view_numbers(1), (schedule.view_numbers(0) + 1) % 3)


def test_a_view_is_the_same_at_any_size(source):
    schedule = schedule_of(source)
    small = images_of(schedule, 2)
    large = torch.nn.functional.interpolate(images_of(schedule, 2, size=96), size=32, mode="area")
    other_view = torch.nn.functional.interpolate(images_of(schedule, 3, size=96), size=32, mode="area")
    assert (small - large).abs().mean() < 0.6 * (small - other_view).abs().mean()


def test_unaugmented_images_are_evaluation_crops_in_half_of_each_batch(source):
    crops = source.load(torch.arange(COUNT), BASE_32, None)
    assert torch.equal(images_of(schedule_of(source, ALWAYS), 0), crops)
    schedule = schedule_of(source, HALF)
    images = images_of(schedule, 0)
    assert schedule.separates_losses
    assert not schedule_of(source).separates_losses
    unaugmented = torch.zeros(COUNT, dtype=torch.bool)
    for batch in schedule.batches(0):
        assert int(batch.unaugmented.sum()) == (len(batch.rows) + 1) // 2
        unaugmented[batch.rows] = batch.unaugmented
    assert torch.equal((images == crops).flatten(1).all(dim=1), unaugmented)


@pytest.mark.parametrize("mix", ["mixup", "cutmix"])
def test_mixed_images_are_the_same_in_every_schedule_of_one_seed(source, mix):
    mixed = images_of(schedule_of(source, mix=mix), 0)
    assert torch.equal(mixed, images_of(schedule_of(source, mix=mix), 0))
    assert not torch.equal(mixed, images_of(schedule_of(source), 0))


@pytest.mark.parametrize(("is_shared", "loads"), [(True, 1), (False, 2)])
def test_images_are_cached_only_in_a_shared_schedule(source, monkeypatch, is_shared, loads):
    calls = []
    load = ImageSource.load
    monkeypatch.setattr(ImageSource, "load", lambda *arguments: calls.append(1) or load(*arguments))
    schedule = schedule_of(source, is_shared=is_shared)
    images_of(schedule, 0)
    first_pass = len(calls)
    images_of(schedule, 0)
    assert len(calls) == loads * first_pass


def test_trainings_of_several_seeds_share_their_recurring_views(source):
    first = schedule_of(source, n_views=3)
    shared, other = schedule_of(source, seed=8, n_views=3, views_seed=7), schedule_of(source, seed=8, n_views=3)
    expected, views = first.recurring_views(), shared.recurring_views()
    assert all(torch.equal(value, vars(views)[name]) for name, value in vars(expected).items())
    assert any(not torch.equal(value, vars(other.recurring_views())[name]) for name, value in vars(expected).items())
    assert not torch.equal(shared.batches(0)[0].rows, first.batches(0)[0].rows)


@pytest.mark.parametrize("mix", ["none", "both"])
def test_batches_of_a_gpu_are_those_of_the_cpu(source, monkeypatch, mix):
    unaugmented = np.full(COUNT, HALF)
    schedule = BatchSchedule(source, 5, 7, unaugmented, mix=mix)
    expected = [images for _, images in schedule.loader(1, BASE_32)]
    with fake_cuda(monkeypatch) as device:
        of_gpu = replace(schedule, device="cuda")
        batches = [images for _, images in of_gpu.loader(1, BASE_32)]
        assert all(images.is_cuda for images in batches)
        assert device.counts["to host"] == device.counts["synchronisations"] == 0
        assert device.counts["bytes to device"] < 2 * COUNT * 3 * 36 * 36  # a byte for each number of a pixel
        for images, others in zip(batches, expected, strict=True):
            assert torch.equal(images.cpu(), others)
