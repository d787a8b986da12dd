"""Which images a student is shown and how: repeatable epochs, the same views for whoever looks, at any size."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from digit_splits import COUNT, split_of

from utils.augmentation import augment
from utils.training.image_views import Album, Lessons


@pytest.fixture
def album(tmp_path) -> Album:
    return Album(split_of(tmp_path / "images"), 32, "full", image_cache=tmp_path / "cache")


def lessons(album: Album, plain: str = "never", **options) -> Lessons:
    return Lessons(album, 5, 7, np.full(len(album), plain), **options)


def images_of(found: Lessons, epoch: int, size: int = 32) -> torch.Tensor:
    """The shown images in the order of the rows."""
    shown = torch.empty(len(found.album), 3, size, size)
    for batch, images in found.pages(epoch, size):
        shown[batch.rows] = images
    return shown


def test_an_epoch_shows_every_image_once_and_never_one_alone(album):
    found = lessons(album)
    assert [len(batch.rows) for batch in found.plan(0)] == [5, 5, 5, 6]  # BatchNorm cannot take one image
    assert len(found) == 4
    assert sorted(torch.cat([batch.rows for batch in found.plan(0)]).tolist()) == list(range(COUNT))
    assert not torch.equal(found.plan(0)[0].rows, found.plan(1)[0].rows)


def test_an_epoch_can_be_repeated_without_those_before_it(album):
    found, again = lessons(album), lessons(album)
    first, second = images_of(found, 0), images_of(found, 1)
    assert not torch.equal(first, second)
    assert torch.equal(images_of(again, 1), second)
    assert not torch.equal(images_of(Lessons(album, 5, 8, found.plain), 1), second)


def test_views_come_back_and_are_spread_over_the_images(album):
    found = lessons(album, views=3)
    assert torch.equal(images_of(found, 0), images_of(found, 3))
    assert not torch.equal(images_of(found, 0), images_of(found, 1))
    assert set(found.view_of(0)) == {0, 1, 2}
    np.testing.assert_array_equal(found.view_of(1), (found.view_of(0) + 1) % 3)


def test_the_same_view_is_shown_at_any_size(album):
    found = lessons(album)
    small = images_of(found, 2)
    large = torch.nn.functional.interpolate(images_of(found, 2, size=96), size=32, mode="area")
    other = torch.nn.functional.interpolate(images_of(found, 3, size=96), size=32, mode="area")
    assert (small - large).abs().mean() < 0.6 * (small - other).abs().mean()


def test_plain_images_are_those_of_evaluation_in_half_of_each_batch(album):
    crops = album.show(torch.arange(COUNT), 32, None)
    assert torch.equal(images_of(lessons(album, "always"), 0), crops)
    half = lessons(album, "half")
    shown = images_of(half, 0)
    assert half.is_apart
    assert not lessons(album).is_apart
    plain = torch.zeros(COUNT, dtype=torch.bool)
    for batch in half.plan(0):
        assert int(batch.plain.sum()) == (len(batch.rows) + 1) // 2
        plain[batch.rows] = batch.plain
    same = (shown == crops).flatten(1).all(dim=1)
    assert torch.equal(same, plain)


@pytest.mark.parametrize("mix", ["mixup", "cutmix"])
def test_mixed_images_are_mixed_alike_for_everybody(album, mix):
    found, plain = lessons(album, mix=mix), lessons(album)
    assert torch.equal(images_of(found, 0), images_of(lessons(album, mix=mix), 0))
    assert not torch.equal(images_of(found, 0), images_of(plain, 0))


def test_images_are_kept_only_while_several_look_at_them(album, monkeypatch):
    opened = []
    show = Album.show
    monkeypatch.setattr(Album, "show", lambda *given: opened.append(1) or show(*given))
    shared, own = lessons(album, is_shared=True), lessons(album)
    for found, times in ((shared, 1), (own, 2)):
        opened.clear()
        images_of(found, 0)
        once = len(opened)
        images_of(found, 0)
        assert len(opened) == times * once


def test_drawn_beforehand_or_at_once_an_augmentation_is_the_same():
    from utils.augmentation import draw_views, show

    images = [torch.randint(0, 255, (3, 36, 36), dtype=torch.uint8) for _ in range(9)]
    views = draw_views(*torch.full((2, 9), 36.0), "full", torch.Generator().manual_seed(5))
    at_once = augment(images, 32, "full", torch.Generator().manual_seed(5))
    assert torch.equal(show(images, 32, views), at_once)
    rows = torch.tensor([7, 2])
    assert torch.equal(show([images[7], images[2]], 32, views.take(rows)), at_once[rows])
    assert torch.equal(type(views).joined([views, views]).take(rows + 9).warps, views.take(rows).warps)


def test_without_augmentation_everything_is_the_centre(tmp_path):
    album = Album(split_of(tmp_path / "images"), 32, "none", image_cache=tmp_path / "cache")
    assert torch.equal(images_of(lessons(album, views=2), 1), album.show(torch.arange(COUNT), 32, None))
