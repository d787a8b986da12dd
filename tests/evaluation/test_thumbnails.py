"""Thumbnails of whatever lies in a folder of images."""

from __future__ import annotations

import base64
import io
import struct
import zlib

import numpy as np
import pytest
from PIL import Image

from utils.evaluation.report import thumbnails
from utils.evaluation.report.thumbnails import SIDE, thumbnail

WIDE = np.zeros((100, 200, 3), dtype=np.uint8)
WIDE[:, :100, 0] = 255  # the left half is red


def opened(found) -> Image.Image:
    kind, text = found.uri.split(",")
    assert kind in ("data:image/png;base64", "data:image/jpeg;base64")
    image = Image.open(io.BytesIO(base64.b64decode(text)))
    assert image.size == (found.width, found.height)
    return image.convert("RGB")


def test_a_photograph_becomes_small(tmp_path):
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (900, 1200, 3), dtype=np.uint8)).save(tmp_path / "a.jpg")
    found = thumbnail(tmp_path / "a.jpg")
    assert (found.width, found.height) == (SIDE, 120)
    assert len(found.uri) < 40_000
    assert found.problem == ""


def test_a_tiny_image_keeps_every_pixel(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 255, (8, 8), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "a.png")
    assert np.array_equal(np.asarray(opened(thumbnail(tmp_path / "a.png")))[..., 0], pixels)


@pytest.mark.parametrize("kind", ["jpg", "png", "tif"])
def test_exif_rotation_is_applied(tmp_path, kind):
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was held upright: turn clockwise
    Image.fromarray(WIDE).save(tmp_path / f"a.{kind}", exif=exif)
    image = opened(thumbnail(tmp_path / f"a.{kind}"))
    assert image.size == (80, SIDE)
    top, bottom = image.getpixel((40, 20)), image.getpixel((40, 140))
    assert top[0] > 200
    assert bottom[0] < 50


def test_sixteen_bits_keep_their_range_and_rotation(tmp_path):
    values = np.linspace(1000, 3000, 100 * 200).reshape(100, 200).astype(np.uint16)
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(values).save(tmp_path / "a.png", exif=exif)
    image = opened(thumbnail(tmp_path / "a.png"))
    pixels = np.asarray(image)[..., 0]
    assert pixels.min() < 10
    assert pixels.max() > 245
    assert image.size == (80, SIDE)


@pytest.mark.parametrize("mode", ["CMYK", "RGBA", "LA", "P", "1", "I", "F", "L"])
def test_every_mode_is_shown(tmp_path, mode):
    image = Image.fromarray(WIDE)
    image = image.convert("L").convert(mode) if mode in ("I", "F") else image.convert(mode)
    name = "a.tif" if mode in ("CMYK", "F", "I") else "a.png"
    image.save(tmp_path / name)
    assert opened(thumbnail(tmp_path / name)).size == (SIDE, 80)


def test_what_is_transparent_shows_the_ground(tmp_path):
    Image.new("RGBA", (100, 100), (255, 0, 0, 0)).save(tmp_path / "a.png")
    assert all(abs(value - 128) < 6 for value in opened(thumbnail(tmp_path / "a.png")).getpixel((50, 50)))


def test_bombs_are_described_and_not_decoded(tmp_path, monkeypatch):
    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    for side in (9000, 20_000):
        head = struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0)
        (tmp_path / f"{side}.png").write_bytes(b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", b""))
        monkeypatch.setattr(thumbnails, "_small", lambda image: pytest.fail("decoded"))
        found = thumbnail(tmp_path / f"{side}.png")
        assert found.uri is None
        assert "pixels" in found.problem


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "cannot identify"),
        (b"no image", "cannot identify"),
        (b"\xff\xd8\xff\xe0\x00\x10JFIF\x00", "cannot be decoded"),
    ],
)
def test_what_is_no_image_is_said(tmp_path, content, words):
    (tmp_path / "a.jpg").write_bytes(content)
    found = thumbnail(tmp_path / "a.jpg")
    assert found.uri is None
    assert words in found.problem
    assert str(tmp_path) not in found.problem


def test_a_missing_file_and_a_huge_one_are_said(tmp_path, monkeypatch):
    assert thumbnail(tmp_path / "a.jpg").problem == "the file is missing"
    monkeypatch.setattr(thumbnails, "MAX_FILE_BYTES", 3)
    (tmp_path / "a.jpg").write_bytes(b"1234")
    assert "too large" in thumbnail(tmp_path / "a.jpg").problem
