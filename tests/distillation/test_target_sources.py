"""Targets of a student: which images are loaded unaugmented, and the digest of recurring views."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from digit_splits import split_of
from preprocessings import BASE_32
from student_runs import config

from utils.distillation.target_sources import (
    CONSISTENT,
    OOF,
    VIEWS,
    mixing_of,
    recurrence_note,
    unaugmented_frequency,
    views_digest,
)
from utils.predictions.rows import UNKNOWN
from utils.training.batch_schedule import NEVER, BatchSchedule
from utils.training.image_source import ImageSource

HAS_TARGET = np.array([True, False, True])  # of the train images; a fourth image is unlabeled


def source_of(folder, augmentation: str = "full") -> ImageSource:
    images = split_of(folder / "images", count=4)
    images = replace(images, labels=np.array([0, 1, 2, UNKNOWN]))
    return ImageSource(images, BASE_32, augmentation, image_cache=folder / "cache")


@pytest.mark.parametrize(
    ("kind", "augmentation", "alpha", "expected"),
    [
        (OOF, "full", 0.5, ["half", "never", "half", "always"]),
        (OOF, "full", 1.0, ["always", "never", "always", "always"]),
        (OOF, "full", 0.0, ["never"] * 4),
        (OOF, "none", 0.5, ["never"] * 4),
        (CONSISTENT, "full", 0.5, ["never"] * 4),
        (VIEWS, "full", 0.5, ["never"] * 4),
    ],
)
def test_images_with_cross_fitted_targets_are_loaded_unaugmented(tmp_path, kind, augmentation, alpha, expected):
    assert unaugmented_frequency(source_of(tmp_path, augmentation), kind, HAS_TARGET, alpha).tolist() == expected


@pytest.mark.parametrize(
    ("mix", "kind", "expected"),
    [
        ("auto", CONSISTENT, "both"),
        ("auto", VIEWS, "both"),
        ("auto", OOF, "none"),
        ("none", CONSISTENT, "none"),
        ("cutmix", VIEWS, "cutmix"),
    ],
)
def test_images_are_mixed_where_targets_belong_to_augmented_ones(mix, kind, expected):
    assert mixing_of(config(f"distillation.mix={mix}"), kind) == expected


def test_the_digest_is_of_the_recurring_views(tmp_path):
    source = source_of(tmp_path)

    def digest_of(seed: int, n_views: int) -> str | None:
        return views_digest(BatchSchedule(source, 2, seed, np.full(4, NEVER), n_views=n_views))

    assert digest_of(1, 0) is None
    assert digest_of(1, 2) == digest_of(1, 2)
    assert len({digest_of(1, 2), digest_of(2, 2), digest_of(1, 3)}) == 3


def test_views_that_recur_often_are_warned_of_with_the_number_that_is_enough():
    assert recurrence_note(16, 4) is None
    note = recurrence_note(160, 4)
    assert "each of the 4 views of an image recurs in 40 epochs" in note
    assert "Set distillation.views to 40 or more" in note
    assert recurrence_note(160, 40) is None
