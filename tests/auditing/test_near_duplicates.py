"""Copies of real photographs are found whatever was done to them; different photographs are not taken for copies."""

from __future__ import annotations

import hashlib

import numpy as np
import pytest
from photo_crops import crops
from PIL import Image, ImageDraw, ImageEnhance, ImageFont, ImageOps

from utils.auditing import image_signatures, near_duplicates, thumbnail_views
from utils.auditing.near_duplicates import CUT, EDITED, EQUAL_PIXELS, IDENTICAL, MIRRORED, Pair


def watermarked(image: Image.Image) -> Image.Image:
    marked = image.copy()
    font = ImageFont.load_default(size=14)
    ImageDraw.Draw(marked, "RGBA").text((8, 60), "(c) a reader", font=font, fill=(255, 255, 255, 160))
    return marked


EDITS = {
    "resized": (lambda image: image.resize((70, 70)), EDITED),
    "enlarged": (lambda image: image.resize((300, 240), Image.Resampling.BICUBIC), EDITED),
    "cut": (lambda image: image.crop((0, 10, 92, 104)), CUT),
    "mirrored": (ImageOps.mirror, MIRRORED),
    "turned": (lambda image: image.rotate(90), MIRRORED),
    "brightened": (lambda image: ImageEnhance.Brightness(image).enhance(1.25), EDITED),
    "watermarked": (watermarked, EDITED),
    "grey": (lambda image: image.convert("L"), EDITED),
}


def found_pairs(folder, images: list[Image.Image], quality: int = 90, embeddings=()) -> list[Pair]:
    paths = []
    for number, image in enumerate(images):
        paths.append(folder / f"{number}.jpg")
        image.save(paths[-1], quality=quality)
    signatures = image_signatures.read(paths, threads=1)
    contents = [hashlib.sha256(path.read_bytes()).hexdigest() for path in paths]
    return near_duplicates.find_pairs(signatures, contents, embeddings)


@pytest.mark.parametrize("edit", EDITS)
def test_edited_copies_are_found_and_different_photographs_are_not(tmp_path, edit):
    photographs = crops()
    change, relation = EDITS[edit]
    pairs = found_pairs(tmp_path, [*photographs, *map(change, photographs)])
    count = len(photographs)
    assert {pair.second - pair.first for pair in pairs} == {count}  # no photograph with another one
    assert len(pairs) >= (0.8 if edit == "watermarked" else 1) * count  # letters hide a blurred background
    assert sum(pair.relation == relation for pair in pairs) >= len(pairs) - 1


def test_a_strongly_compressed_copy_is_found(tmp_path):
    (tmp_path / "low").mkdir()
    photographs = crops()
    for number, image in enumerate(photographs):
        image.save(tmp_path / "low" / f"{number}.jpg", quality=40)
    compressed = [Image.open(tmp_path / "low" / f"{number}.jpg") for number in range(len(photographs))]
    assert len(found_pairs(tmp_path, [*photographs, *compressed], quality=95)) == len(photographs)


def test_equal_files_are_linked_in_a_chain_and_compared_once(tmp_path):
    first, second, *_ = crops()
    pairs = found_pairs(tmp_path, [first, second, first, first, ImageOps.mirror(first)])
    assert [(p.first, p.second, p.relation) for p in pairs] == [(0, 2, IDENTICAL), (0, 4, MIRRORED), (2, 3, IDENTICAL)]
    assert near_duplicates.group_indices(5, pairs).tolist() == [0, 1, 0, 0, 0]


def test_small_images_are_copies_only_where_their_pixels_are_equal(tmp_path):
    digits = np.random.default_rng(0).integers(0, 255, (4, 8, 8), dtype=np.uint8)
    nearly = digits[3].copy()
    nearly[0, 0] ^= 1
    paths = []
    for number, pixels in enumerate([*digits, digits[2][:, ::-1], nearly]):
        paths.append(tmp_path / f"{number}.png")
        Image.fromarray(pixels).save(paths[-1])
    signatures = image_signatures.read(paths, threads=1)
    pairs = near_duplicates.find_pairs(signatures, [str(path) for path in paths])
    assert [(pair.first, pair.second, pair.relation) for pair in pairs] == [(2, 4, EQUAL_PIXELS)]


@pytest.mark.parametrize("count", [0, 1])
def test_too_few_images_have_no_pairs(tmp_path, count):
    assert found_pairs(tmp_path, crops()[:count]) == []


def test_blank_images_are_no_copies_of_one_another(tmp_path):
    grey = [Image.new("RGB", (100, 100 + number), (90, 90, 90)) for number in range(4)]
    assert found_pairs(tmp_path, [*grey, *crops()[:3]]) == []


def test_neighbours_by_embeddings_are_candidates_whose_pixels_decide(tmp_path, monkeypatch):
    photographs = crops()[:8]
    images = [*photographs, *(image.resize((90, 90)) for image in photographs)]
    blind = np.random.default_rng(0).normal(size=(16, 20)).astype(np.float32)
    monkeypatch.setattr(thumbnail_views, "descriptors", lambda found, weights: blind[: len(found)])
    monkeypatch.setattr(near_duplicates, "NEIGHBOURS", 2)
    embeddings = np.tile(np.eye(8), (2, 1))  # of an image and its copy they are equal
    found = found_pairs(tmp_path, images, embeddings=[(embeddings, np.arange(16))])
    assert {(pair.first, pair.second) for pair in found} == {(number, number + 8) for number in range(8)}
    assert len(found_pairs(tmp_path, images)) < 8
    assert found_pairs(tmp_path, photographs, embeddings=[(np.ones((8, 3)), np.arange(8))]) == []


def test_groups_join_pairs_and_recorded_groups():
    pairs = [Pair(0, 1, EDITED, 0.9), Pair(3, 4, EDITED, 0.9)]
    groups = near_duplicates.group_indices(6, pairs, np.array([0, 1, 1, 2, 3, 4]))
    assert groups.tolist() == [0, 0, 0, 1, 1, 2]
