"""The images of a split: ids, labels, digest, and what cannot be decoded."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image
from preprocessings import BASE_32

from utils.core import engines
from utils.core.artifacts import FileDigests
from utils.core.errors import UserError
from utils.predictions import image_splits


@pytest.fixture
def folder(tmp_path):
    for number, name in enumerate(("bee/b.png", "ant/a.png", "ant/c.png")):
        path = tmp_path / "split_dataset" / "val" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (40, 32), (number, 0, 0)).save(path)
    return tmp_path / "split_dataset"


def listed(folder):
    return image_splits.list_images(folder, "val", FileDigests(folder.parent / "digests.json"))


def test_images_are_sorted_by_id_and_labelled_by_their_folders(folder):
    images = listed(folder)
    assert images.classes == ("ant", "bee")
    assert images.sample_ids == ("ant/a.png", "ant/c.png", "bee/b.png")
    assert images.labels.tolist() == [0, 0, 1]
    some = images.take([2, 0])
    assert (some.sample_ids, some.labels.tolist()) == (("bee/b.png", "ant/a.png"), [1, 0])
    assert some.digest == images.digest


def test_the_digest_follows_from_contents(folder):
    before = listed(folder).digest
    Image.new("RGB", (40, 32), (9, 9, 9)).save(folder / "val" / "ant" / "a.png")
    assert listed(folder).digest != before


def test_a_missing_split_is_refused_with_the_command_that_makes_it(folder):
    with pytest.raises(UserError, match="--stages split"):
        image_splits.list_images(folder, "test", FileDigests(folder.parent / "digests.json"))


def test_unreadable_images_are_named_and_the_others_decoded(folder):
    broken = folder / "val" / "ant" / "c.png"
    broken.write_bytes(b"no image")
    images, cache = listed(folder), folder.parent / "cache"
    assert list(image_splits.decode_readable(images, [BASE_32], image_cache=cache)) == [broken]
    with pytest.raises(UserError, match=r"c\.png"):
        image_splits.decode([images], [BASE_32], image_cache=cache)
    pixels = image_splits.open_images(images.take([0, 2]), BASE_32, image_cache=cache, threads=1)
    assert np.unique(pixels.crops(range(2))[..., 0], axis=None).tolist() == [0, 1]


@pytest.mark.parametrize(("requested", "expected"), [(0, 1), (1, 1), (10**6, None)])
def test_decoding_threads_are_at_least_one_and_at_most_the_cores(requested, expected):
    assert image_splits.decoding_threads(requested) == (expected or engines.cores())
