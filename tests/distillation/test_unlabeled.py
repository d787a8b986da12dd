"""Unlabeled images: sorted by path, without duplicates and without images of the splits."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
from digit_splits import split_of
from given_predictions import empty_workspace, logged
from student_runs import config

from utils.core.artifacts import FileDigests
from utils.core.errors import UserError
from utils.core.workspace import SPLITS, Workspace
from utils.distillation.unlabeled import append_unlabeled, unlabeled_images
from utils.predictions.catalog import Catalog
from utils.predictions.image_splits import list_images
from utils.predictions.rows import UNKNOWN
from utils.predictions.store import Store


@pytest.fixture
def workspace(tmp_path) -> Workspace:
    """A workspace with fifteen images in its splits, and five more in the folder `unlabeled` beside it."""
    workspace = empty_workspace(tmp_path / "workspace")
    images = sorted(split_of(tmp_path / "drawn", count=20).paths)
    classes = [workspace.split_dir / split / name for split in SPLITS for name in ("0", "1", "2")]
    folders = [*classes, *(tmp_path / "unlabeled" / "deep",) * 5]
    for number, path in enumerate(images):
        folder = folders[-1] if number < 5 else classes[number % len(classes)]
        folder.mkdir(parents=True, exist_ok=True)
        shutil.move(path, folder / f"{number}.png")
    return workspace


def store_of(workspace: Workspace, folder: Path | str) -> Store:
    digests = FileDigests(workspace.digests)
    facts = {split: {"digest": list_images(workspace.split_dir, split, digests).digest} for split in SPLITS}
    overrides = f"distillation.unlabeled_dir={folder}"
    return Store(config(overrides), workspace, Catalog({}, ("0", "1", "2"), facts, {}))


def test_the_images_of_any_depth_are_sorted_and_have_no_label(workspace, tmp_path):
    images = unlabeled_images(store_of(workspace, tmp_path / "unlabeled"))
    assert images.sample_ids == tuple(f"unlabeled:deep/{number}.png" for number in range(5))
    assert set(images.labels) == {UNKNOWN}
    assert images.classes == ("0", "1", "2")


def test_duplicates_and_images_of_the_splits_are_left_out_with_a_warning(workspace, tmp_path, caplog):
    folder = tmp_path / "unlabeled"
    expected = unlabeled_images(store_of(workspace, folder))
    shutil.copy(next((workspace.split_dir / "val").rglob("*.png")), folder / "of_val.png")
    shutil.copy(folder / "deep" / "0.png", folder / "second.png")
    with logged(caplog):
        images = unlabeled_images(store_of(workspace, folder))
    assert (images.sample_ids, images.digest) == (expected.sample_ids, expected.digest)
    assert "2 of 7 images" in caplog.text


def test_an_image_of_the_test_split_is_refused_by_its_content(workspace, tmp_path):
    leaked = tmp_path / "unlabeled" / "deep" / "another_name.png"
    shutil.copy(next((workspace.split_dir / "test").rglob("*.png")), leaked)
    with pytest.raises(UserError, match=r"1 of 6 images have the content of a test image.*another_name\.png"):
        unlabeled_images(store_of(workspace, tmp_path / "unlabeled"))


def test_without_a_configured_folder_there_are_none(workspace):
    assert unlabeled_images(store_of(workspace, "null")) is None


@pytest.mark.parametrize("name", ["missing", "empty", "of_the_splits"])
def test_a_folder_without_further_images_is_refused(workspace, tmp_path, name):
    (tmp_path / "empty").mkdir()
    shutil.copytree(workspace.split_dir / "train", tmp_path / "of_the_splits")
    with pytest.raises(UserError, match=r"distillation\.unlabeled_dir"):
        unlabeled_images(store_of(workspace, tmp_path / name))


def test_they_are_appended_to_the_train_images(workspace, tmp_path):
    store = store_of(workspace, tmp_path / "unlabeled")
    train, unlabeled = store.images("train"), unlabeled_images(store)
    images = append_unlabeled(train, unlabeled)
    assert images.sample_ids == train.sample_ids + unlabeled.sample_ids
    np.testing.assert_array_equal(images.labels, [*train.labels, *unlabeled.labels])
    assert images.digest not in (train.digest, unlabeled.digest)
    assert append_unlabeled(train, None) is train
