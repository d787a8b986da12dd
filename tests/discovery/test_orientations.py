"""Photographs that their EXIF orientation would turn are counted, with the members that apply or ignore it."""

from __future__ import annotations

from dataclasses import replace

import pytest
from image_folders import write_class_folders, write_photo
from one_member import NAME, change, config, workspace
from PIL import Image

from utils.core.artifacts import FileDigests
from utils.discovery import discover, orientations
from utils.networks.preprocessing import Preprocessing
from utils.predictions import catalog, image_splits

__all__ = ["config", "workspace"]


def exif(orientation: int) -> bytes:
    record = Image.Exif()
    record[0x0112] = orientation
    return record.tobytes()


@pytest.fixture
def splits(tmp_path):
    """Two splits with seven photographs that carry an orientation, five of which are turned by it."""
    for split in ("train", "val"):
        write_class_folders(tmp_path / split, ("a", "b"), 2, first_seed=len(split))
    names = ["train/a/6.jpg", "train/a/8.png", "train/b/3.webp", "val/a/2.jpg", "val/b/5.jpg", "val/b/1.jpg"]
    for seed, name in enumerate(names):
        write_photo(tmp_path / name, 50 + seed, exif=exif(int(name.split("/")[2][0])))
    write_photo(tmp_path / "val" / "a" / "7.tif", 60, exif=exif(6))  # which Pillow turns for everybody
    (tmp_path / "val" / "a" / "9.jpg").write_bytes(b"damaged")
    return tmp_path


def listed(folder):
    digests = FileDigests(folder / "digests.json")
    return {name: image_splits.list_images(folder, name, digests) for name in ("train", "val")}, digests


def member_of(exif_rule, name):
    rules = replace(Preprocessing.of_base_pipeline(32), exif=exif_rule)
    entries = dict.fromkeys(catalog.Member.__dataclass_fields__)
    return catalog.Member(**{**entries, "name": name, "source": "trained", "preprocessing": rules.as_record()})


def test_turned_photographs_are_counted_with_the_members_of_each_rule(splits):
    images, digests = listed(splits)
    both = [member_of("ignore", "stored"), member_of("apply", "upright"), member_of("apply", "also")]
    (problem,) = orientations.orientation_problems(images, digests, both)
    assert (problem.code, problem.severity, problem.member) == ("exif_orientation", "warning", None)
    words = "5 of 16 images have an EXIF orientation that turns them, first train/a/6.jpg"
    assert problem.message == f"{words}: applied by also, upright; ignored by stored"
    (problem,) = orientations.orientation_problems(images, digests, both[1:])
    assert (problem.severity, problem.message[-22:]) == ("info", "applied by all members")


def test_files_are_opened_once_for_equal_splits(splits, monkeypatch):
    images, digests = listed(splits)
    first = orientations.orientation_problems(images, digests, [])
    digests.save()
    opened = []
    monkeypatch.setattr(Image, "open", lambda *a, **k: opened.append(a))
    images, digests = listed(splits)
    assert orientations.orientation_problems(images, digests, []) == first
    assert not opened


def test_no_pixel_is_decoded(splits, monkeypatch):
    images, digests = listed(splits)
    decoded = []
    for plugin in ("JpegImagePlugin.JpegImageFile", "PngImagePlugin.PngImageFile", "TiffImagePlugin.TiffImageFile"):
        monkeypatch.setattr(f"PIL.{plugin}.load", lambda *a: decoded.append(a))
    assert orientations.orientation_problems(images, digests, [member_of("ignore", "stored")])
    assert not decoded


def test_discover_says_it_and_reads_the_rule_of_a_checkpoint(workspace, config):
    image = next((workspace.split_dir / "val").glob("*/*.png"))
    with Image.open(image) as pixels:
        pixels.convert("RGB").save(image, exif=exif(6))
    text = discover.discover(config, workspace).text
    sample_id = image.relative_to(workspace.split_dir)
    assert f"warning: 1 of 280 images have an EXIF orientation that turns them, first {sample_id}" in text
    assert "ignored by all members" in text
    upright = replace(Preprocessing.of_base_pipeline(32), exif="apply").as_record()
    change(workspace.checkpoint(NAME, "final"), lambda record: record["extra"].update(preprocessing=upright))
    assert f"applied by {NAME}" in discover.discover(config, workspace).text
