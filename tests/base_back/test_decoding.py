"""Images of every awkward kind, really written: as the evaluation transform sees them, or refused by name."""

from __future__ import annotations

import hashlib
import struct
import zlib

import numpy as np
import pytest
import torch
from PIL import Image

from utils import image_cache
from utils.image_cache import UnreadableImages, decode_images, open_images
from utils.resizing import evaluation_resizing

SIZE = 32


def gradient(height=60, width=90):
    rows, columns = np.mgrid[0:height, 0:width]
    return np.stack([rows * 255 // height, columns * 255 // width, (rows + columns) % 256], axis=2).astype(np.uint8)


def flat_png(path, width, height, grey=200, written=None):
    """A PNG of one grey value, written without holding its pixels; all of its rows, or as many as `written`."""

    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    pack = zlib.compressobj(1)
    row = b"\0" + bytes([grey]) * width
    data = b"".join(pack.compress(row) for _ in range(height if written is None else written)) + pack.flush()
    head = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0))
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + head + chunk(b"IDAT", data) + chunk(b"IEND", b""))
    return path


def cmyk(path):
    Image.fromarray(gradient()).convert("CMYK").save(path)


def palette_with_transparency(path):
    Image.fromarray(gradient()).quantize(16).save(path, transparency=bytes(range(16)))


def transparent(path):
    Image.fromarray(np.dstack([gradient(), gradient()[:, :, 0]])).save(path)


def rotated_by_exif(path):
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(gradient()).save(path, exif=exif)


def animated(path):
    frames = [Image.fromarray(gradient()), Image.fromarray(255 - gradient())]
    frames[0].save(path, save_all=True, append_images=frames[1:], duration=100)


def sixteen_bits(path):
    Image.fromarray(np.linspace(0, 600, 5400).reshape(60, 90).astype(np.uint16)).save(path)


def one_bit(path):
    Image.fromarray(gradient()).convert("1").save(path)


KINDS = {
    cmyk: "jpg",
    palette_with_transparency: "png",
    transparent: "png",
    rotated_by_exif: "jpg",
    animated: "png",
    sixteen_bits: "png",
    one_bit: "bmp",
}


def digest(path):
    return hashlib.sha256(path.read_bytes()).hexdigest()


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
@pytest.mark.filterwarnings("ignore:Palette images with Transparency")  # of Pillow, in the reference below
def test_every_kind_is_what_the_evaluation_transform_makes_of_it(kind, tmp_path):
    from utils.augmentation import normalise
    from utils.datasets import create_optimized_transforms

    path = tmp_path / f"image.{KINDS[kind]}"
    kind(path)
    images = open_images([path], [digest(path)], evaluation_resizing(SIZE), tmp_path / "cache")
    found = normalise(torch.from_numpy(images.crops([0])).permute(0, 3, 1, 2))[0]
    with Image.open(path) as image:
        assert torch.equal(found, create_optimized_transforms(SIZE, is_training=False)(image.convert("RGB")))


def test_images_that_lose_their_range_are_counted_once_for_a_split(tmp_path, heard):
    paths = [tmp_path / f"{number}.png" for number in range(3)]
    sixteen_bits(paths[0])
    Image.fromarray(np.linspace(0, 60000, 5400).reshape(60, 90).astype(np.uint16)).save(paths[1])
    transparent(paths[2])
    for _ in range(2):
        images = open_images(paths, [digest(path) for path in paths], evaluation_resizing(32), tmp_path / "cache")
    messages = {record.getMessage() for record in heard.records}
    assert len(messages) == 1
    assert "2 of 3 images have more than 8 bits a channel and are clipped to 255" in messages.pop()
    assert images.image(1).max() == 255


def test_a_wide_scan_is_decoded_and_quietly(tmp_path):
    path = flat_png(tmp_path / "scan.png", 20_000, 4_800)  # above Pillow's first limit, which only warns
    images = open_images([path], [digest(path)], evaluation_resizing(32), tmp_path / "cache")
    assert images.image(0).shape == (36, 150, 3)
    assert (images.image(0) == 200).all()


def test_decompression_bombs_are_refused_before_they_are_decoded(tmp_path):
    bomb = flat_png(tmp_path / "bomb.png", 20_000, 20_000, written=1)  # nothing may read further
    thread = flat_png(tmp_path / "thread.png", 2, 200_000)  # few pixels, but billions at 255 for the shorter side
    good = flat_png(tmp_path / "good.png", 50, 50)
    paths = [bomb, thread, good]
    with pytest.raises(UnreadableImages) as caught:
        open_images(paths, [digest(path) for path in paths], evaluation_resizing(224), tmp_path / "cache")
    reasons = {path.name: reason for path, reason in caught.value.problems}
    assert "exceeds limit of 178956970 pixels" in reasons["bomb.png"]
    assert "2 x 200000 pixels, and still 6502500000 with its shorter side at 255" in reasons["thread.png"]
    assert len(open_images([good], [digest(good)], evaluation_resizing(224), tmp_path / "cache")) == 1


def test_large_images_are_decoded_one_at_a_time(tmp_path, monkeypatch):
    inside, most = [], []
    original = image_cache.resized_pixels

    def watched(image, sides):
        inside.append(image)
        most.append(len(inside))
        try:
            return original(image, sides)
        finally:
            inside.remove(image)

    monkeypatch.setattr(image_cache, "resized_pixels", watched)
    monkeypatch.setattr(image_cache, "LARGE_PIXELS", 1_000_000)
    paths = [flat_png(tmp_path / f"{grey}.png", 1500, 1500, grey) for grey in range(4)]
    decode_images(paths, [digest(path) for path in paths], [evaluation_resizing(32)], tmp_path / "cache", threads=4)
    assert most == [1, 1, 1, 1]


def test_packs_are_written_as_they_fill(tmp_path, monkeypatch):
    monkeypatch.setattr(image_cache, "PACK_BYTES", 10_000)
    paths = [flat_png(tmp_path / f"{grey}.png", 40, 40, grey) for grey in range(7)]  # 36 x 36 x 3 bytes each
    contents = [digest(path) for path in paths]
    images = open_images(paths, contents, evaluation_resizing(32), tmp_path / "cache")
    assert len(list((tmp_path / "cache").glob("36_*.npy"))) == 3
    assert [int(images.image(row)[0, 0, 0]) for row in range(7)] == list(range(7))


def test_a_side_that_is_there_already_is_not_made_again(tmp_path):
    path = flat_png(tmp_path / "image.png", 50, 70)
    cache = tmp_path / "cache"
    decode_images([path], [digest(path)], [evaluation_resizing(32)], cache)
    first = {file.name: file.stat().st_mtime_ns for file in cache.iterdir()}
    decode_images([path], [digest(path)], [evaluation_resizing(32), evaluation_resizing(64)], cache)
    assert first.items() <= {file.name: file.stat().st_mtime_ns for file in cache.iterdir()}.items()
    assert open_images([path], [digest(path)], evaluation_resizing(64), cache).image(0).shape == (100, 72, 3)
