"""The benchmark of test-time augmentation: what is planted in the set flipped."""

from __future__ import annotations

import numpy as np
from PIL import Image

import tta


def test_train_images_are_upright_and_every_second_other_one_is_flipped(tmp_path):
    tta.write_given_splits(tmp_path, tta.FLIPPED, per_class=40)
    flipped = {"train": [], "val": [], "test": []}
    for digit in tta.WITHOUT_MIRROR:
        scans = dict(tta.scans(digit, 40))
        for split, found in flipped.items():
            for path in sorted((tmp_path / split / str(digit)).iterdir()):
                with Image.open(path) as image:
                    found.append(not np.array_equal(np.asarray(image), np.asarray(scans[int(path.stem)])))
    assert [len(found) for found in flipped.values()] == [100, 80, 20]
    assert [np.mean(found) for found in flipped.values()] == [0, 0.5, 0.5]
