"""The benchmark of class-activation maps: pictures off the centre, deletion that can win and lose, its quick form."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

import maps

SIDE = 20


def answer(pictures):
    """The first class is as probable as the upper left corner is bright."""
    bright = pictures[:, :6, :6].mean(axis=(1, 2, 3)) / 255
    return np.stack([bright, 1 - bright], axis=1)


def judged(row, column):
    """The row of maps that are largest at one place of a 4 x 4 grid."""
    pictures = np.zeros((12, SIDE, SIDE, 3), np.uint8)
    pictures[:, :6, :6] = 200 + np.arange(12, dtype=np.uint8)[:, None, None, None]
    down, across = np.abs(np.arange(4) - row), np.abs(np.arange(4) - column)
    found = np.broadcast_to(6 - down[:, None] - across, (12, 4, 4)).astype(np.float32)
    return maps.deletion_row("net", pictures, found, answer(pictures), answer, np.zeros(3), "")


def test_a_map_of_what_decides_wins_against_the_middle_and_another_does_not():
    assert judged(0, 0)["holds"]
    assert judged(0, 0)["figure"] > 0.2
    assert not judged(3, 3)["holds"]


def test_a_picture_lies_in_its_corner_on_the_colour_of_its_border():
    pixels = np.full((10, 10, 3), 60, np.uint8)
    pixels[3:7, 3:7] = 250
    for corner, (down, right) in enumerate(((0, 0), (0, 1), (1, 0), (1, 1))):
        placed = maps.off_centre(Image.fromarray(pixels), corner, SIDE, 0)
        centre = np.argwhere(placed[..., 0] > 200).mean(axis=0)
        assert (centre > SIDE / 2).tolist() == [bool(down), bool(right)]
        assert placed[SIDE // 2 + (-9, 9)[1 - down], 0].tolist() == [60, 60, 60]


def test_equal_maps_are_alike_and_constant_ones_are_not():
    random = np.random.default_rng(0).random((6, 4, 4))
    assert not maps.randomisation_row("net", random, random)["holds"]
    assert maps.randomisation_row("net", random, np.ones_like(random))["figure"] == 0


def test_a_network_is_trained_once_and_has_both_rows(monkeypatch, tmp_path):
    monkeypatch.setattr(maps, "ZOO", tmp_path)
    pictures, labels = maps.digits()
    pictures, labels = pictures[::8], labels[::8]
    rows = maps.network_rows(("CustomResNetMish",), pictures, labels, epochs=1)
    assert [row["holds"] in (True, False) for row in rows] == [True, True]
    monkeypatch.setattr(maps, "fit", lambda *_: pytest.fail("trained again"))
    assert maps.network_rows(("CustomResNetMish",), pictures, labels, epochs=1) == rows
