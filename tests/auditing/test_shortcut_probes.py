"""Planted shortcuts are found; labels that nothing tells are not."""

from __future__ import annotations

import numpy as np
import pytest

from utils.auditing import shortcut_probes

N = 160


@pytest.fixture
def labels() -> np.ndarray:
    return np.random.default_rng(1).integers(0, 4, N)


def test_a_feature_that_tells_the_classes_stands_out_and_noise_does_not(labels):
    rng = np.random.default_rng(0)
    features = {
        "planted": rng.normal(size=(N, 5)) + 2 * np.eye(4, 5)[labels],
        "noise": rng.normal(size=(N, 5)),
        "constant": np.ones((N, 3)),
    }
    found = {probe.name: probe for probe in shortcut_probes.run(features, labels, np.arange(N), seed=0)}
    assert found["planted"].stands_out
    assert found["planted"].accuracy > 0.7 > found["planted"].chance_95
    assert not found["noise"].stands_out
    assert not found["constant"].stands_out
    assert abs(found["noise"].chance - 0.25) < 0.1


def test_copies_of_one_image_are_no_evidence():
    # Each group has one label and nearly equal features, which tell nothing of other groups.
    rng = np.random.default_rng(0)
    groups = np.repeat(np.arange(16), 10)
    labels = rng.integers(0, 2, 16)[groups]
    features = {"copies": rng.normal(size=(16, 6))[groups] + 0.01 * rng.normal(size=(N, 6))}
    grouped = shortcut_probes.run(features, labels, groups, seed=0)[0]
    alone = shortcut_probes.run(features, labels, np.arange(N), seed=0)[0]
    assert not grouped.stands_out
    assert alone.stands_out


def test_exchanged_labels_stay_with_groups_of_one_size():
    labels = np.array([0, 0, 1, 1, 2, 3, 3, 3])
    groups = np.array([0, 0, 1, 1, 2, 3, 3, 3])
    exchanged = shortcut_probes._exchanged(labels, groups, 50, np.random.default_rng(0))
    assert {tuple(row[:4]) for row in exchanged} == {(0, 0, 1, 1), (1, 1, 0, 0)}
    assert (exchanged[:, 4:] == labels[4:]).all()


@pytest.mark.parametrize(
    ("labels", "groups", "part"),
    [
        ([0] * 40, range(40), "two classes"),
        ([0] * 37 + [1] * 3, range(40), "3 readable images"),
        ([0, 1] * 20, [0] * 20 + [1] * 20, "2 groups"),
    ],
)
def test_a_set_that_is_too_small_is_not_probed(labels, groups, part):
    assert part in shortcut_probes.reason_for_none(np.array(labels), np.array(groups))


@pytest.mark.parametrize(
    ("name", "pattern"),
    [
        ("canker_12.jpg", "<class>_#_jpg"),
        ("Black Spot-7.PNG", "<class>_#_png"),
        ("IMG_20240101.jpg", "img_#_jpg"),
        ("cankerous_1.jpg", "cankerous_#_jpg"),
    ],
)
def test_numbers_and_classes_in_file_names_are_no_pattern(name, pattern):
    assert shortcut_probes.name_pattern(name, ["canker", "black_spot"]) == pattern
