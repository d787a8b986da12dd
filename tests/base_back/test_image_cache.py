"""Images are decoded once, by content, and read back as the evaluation transform sees them."""

from __future__ import annotations

import hashlib

import numpy as np
import pytest
import torch
from PIL import Image

from utils.image_cache import UnreadableImages, open_images
from utils.resizing import evaluation_resizing


@pytest.fixture
def photographs(tmp_path):
    rng = np.random.default_rng(0)
    files = []
    for number, (height, width, mode, ending) in enumerate(
        [(50, 80, "RGB", "png"), (90, 40, "RGB", "jpg"), (33, 33, "L", "png"), (8, 8, "L", "bmp"), (61, 47, "P", "png")]
    ):
        image = Image.fromarray(rng.integers(0, 255, (height, width, 3), dtype=np.uint8)).convert(mode)
        files.append(tmp_path / f"{number}.{ending}")
        image.save(files[-1])
    return files


def contents(files):
    return [hashlib.sha256(file.read_bytes()).hexdigest() for file in files]


@pytest.mark.parametrize("size", [32, 45])
def test_centre_crops_are_what_torchvision_makes_of_the_file(photographs, tmp_path, size):
    from utils.augmentation import normalise
    from utils.datasets import create_optimized_transforms

    images = open_images(photographs, contents(photographs), evaluation_resizing(size), tmp_path / "cache")
    crops = torch.from_numpy(images.crops(range(len(photographs)))).permute(0, 3, 1, 2)
    transform = create_optimized_transforms(size, is_training=False)
    for file, found in zip(photographs, normalise(crops), strict=True):
        with Image.open(file) as image:
            assert torch.equal(found, transform(image.convert("RGB")))


def test_a_content_is_decoded_once_whatever_its_name_and_in_any_order(photographs, tmp_path, monkeypatch):
    cache = tmp_path / "cache"
    first = open_images(photographs, contents(photographs), evaluation_resizing(32), cache)
    calls = []
    monkeypatch.setattr(Image, "open", lambda *a, **options: calls.append(a))
    again = open_images(photographs[::-1], contents(photographs)[::-1], evaluation_resizing(32), cache)
    assert calls == []
    assert all(np.array_equal(first.image(row), again.image(4 - row)) for row in range(5))


def test_unreadable_files_are_all_named_and_the_rest_is_kept(photographs, tmp_path):
    broken = tmp_path / "broken.png"
    broken.write_bytes(photographs[0].read_bytes()[:60])
    empty = tmp_path / "empty.jpg"
    empty.write_bytes(b"")
    files = [*photographs, broken, empty]
    with pytest.raises(UnreadableImages) as caught:
        open_images(files, contents(files), evaluation_resizing(32), tmp_path / "cache")
    assert {path.name for path, _ in caught.value.problems} == {"broken.png", "empty.jpg"}
    assert len(open_images(photographs, contents(photographs), evaluation_resizing(32), tmp_path / "cache")) == 5


def test_a_pack_without_index_does_not_exist(photographs, tmp_path):
    cache = tmp_path / "cache"
    open_images(photographs, contents(photographs), evaluation_resizing(32), cache)
    next(cache.glob("36_*.npz")).unlink()  # as if killed between the two files
    assert len(open_images(photographs, contents(photographs), evaluation_resizing(32), cache)) == 5


def test_the_first_frame_or_page_is_used_and_said_once(tmp_path, heard):
    pages = [Image.new("RGB", (20, 20), colour) for colour in ("red", "green", "blue")]
    more = {"save_all": True, "append_images": pages[1:]}
    files = [tmp_path / name for name in ("a.webp", "b.tiff", "c.png", "d.jpg", "e.tiff")]
    for file in files[:3]:
        pages[0].save(file, **more, **({"lossless": True} if file.suffix == ".webp" else {}))
    pages[0].save(files[3], "mpo", **more)  # as cameras save several views of one photograph
    pages[0].save(files[4])
    images = open_images(files, contents(files), evaluation_resizing(32), tmp_path / "cache")
    for row in range(5):
        assert (np.abs(images.image(row).astype(int) - (255, 0, 0)) <= 2).all()
    open_images(files, contents(files), evaluation_resizing(32), tmp_path / "cache")
    messages = [record.getMessage() for record in heard.records]
    assert len(messages) == 1
    assert messages[0].startswith(
        f"3 of 5 images hold several frames or pages, of which the first is used: first {files[0]}"
    )
