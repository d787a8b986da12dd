"""What is counted and removed: packs, leftovers, the quota; and nothing through a symbolic link."""

from __future__ import annotations

import os
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from utils import base_back
from utils.core import caches
from utils.core.artifacts import FileDigests, replacing


def decoded(folder: Path, count: int) -> Path:
    """A cache with one pack per image, written by the cache's own code, a day apart."""
    decoder = base_back.load_bundled("image_cache")
    digests = FileDigests(folder / "digests.json")
    for number in range(count):
        path = folder / f"{number}.png"
        Image.fromarray(np.full((40, 40, 3), number, dtype=np.uint8)).save(path)
        decoder.open_images([path], [digests.of(path)], decoder.Resizing(32, 36), folder / "image_cache")
        for pack in (folder / "image_cache").iterdir():
            if pack.stat().st_mtime > time.time() - 3600:
                stamp = time.time() - 86400 * (count - number)
                os.utime(pack, (stamp, stamp))
    return folder / "image_cache"


def test_packs_are_found_oldest_first_with_the_index_before_the_pixels(tmp_path):
    found = caches.image_packs(decoded(tmp_path, 3))
    assert [item.modified for item in found] == sorted(item.modified for item in found)
    assert all([path.suffix for path in item.paths] == [".npz", ".npy"] for item in found)
    assert all(item.size > 36 * 36 * 3 for item in found)


def test_the_quota_removes_the_oldest_packs_and_what_is_left_still_opens(tmp_path):
    folder = decoded(tmp_path, 4)
    (folder / "notes.txt").write_text("somebody's")
    before = caches.image_packs(folder)
    assert caches.enforce_quota(folder, None) == []
    assert caches.enforce_quota(folder, sum(item.size for item in before) / 1e9) == []
    removed = caches.enforce_quota(folder, (before[2].size + before[3].size) / 1e9)
    assert removed == before[:2]
    assert caches.image_packs(folder) == before[2:]
    assert (folder / "notes.txt").is_file()
    path = tmp_path / "3.png"
    digest = FileDigests(tmp_path / "digests.json").of(path)
    decoder = base_back.load_bundled("image_cache")
    images = decoder.open_images([path], [digest], decoder.Resizing(32, 36), folder)
    assert (images.image(0) == 3).all()
    assert caches.image_packs(folder) == before[2:]  # not decoded again


def test_leftovers_are_what_the_writers_leave_and_in_a_shared_folder_only_old_ones(tmp_path):
    for name in ("record.json", "array.npy", "plain"):
        with replacing(tmp_path / "deep" / name) as temporary:
            pass
        temporary.write_text("left")  # as when killed on the way
    (tmp_path / "deep" / "my.partial.txt").write_text("mine")
    (tmp_path / "deep" / "record.json").write_text("{}")
    found = caches.temporary_files(tmp_path, shared=False)
    assert len(found) == 3
    assert caches.temporary_files(tmp_path, shared=True) == []
    old = time.time() - 2 * caches.HOUR
    os.utime(found[0].paths[0], (old, old))
    assert [item.name for item in caches.temporary_files(tmp_path, shared=True)] == [found[0].name]


def test_nothing_is_reached_through_a_link(tmp_path):
    outside = tmp_path / "outside"
    (outside / "deep").mkdir(parents=True)
    (outside / ".x.12345678.partial").write_text("1234")
    (outside / "36_00ff.npz").write_text("1234")
    inside = tmp_path / "inside"
    (inside / "member").mkdir(parents=True)
    (inside / "linked").symlink_to(outside)
    (inside / "member" / "file").symlink_to(outside / "36_00ff.npz")
    (inside / "member" / "folder").symlink_to(outside)
    (tmp_path / "link").symlink_to(outside)
    assert caches.total_size(inside) == 0
    assert caches.temporary_files(inside, shared=False) == []
    assert caches.image_packs(tmp_path / "link") == caches.list_children(tmp_path / "link") == []
    (item,) = caches.list_children(inside)
    assert item.name == "member"
    caches.remove(item)
    assert not (inside / "member").exists()
    assert (outside / "36_00ff.npz").read_text() == "1234"
    assert (outside / ".x.12345678.partial").exists()


@pytest.mark.parametrize(
    ("size", "words"),
    [(0, "0 B"), (999, "999 B"), (1000, "1.0 kB"), (69_400, "69.4 kB"), (999_600, "1.0 MB"), (2.5e9, "2.5 GB")],
)
def test_sizes_for_a_reader(size, words):
    assert caches.format_bytes(size) == words


def test_embeddings_of_images_are_listed_and_other_files_beside_them_are_not(tmp_path):
    folder = tmp_path / "embeddings" / ("0" * 16)
    folder.mkdir(parents=True)
    for name in (f"{'a' * 16}.npz", "notes.txt", f".{'b' * 16}.abcd1234.partial.npz"):
        (folder / name).write_bytes(b"12345")
    (item,) = caches.image_embeddings(tmp_path)
    assert item.paths == (folder / f"{'a' * 16}.npz",)
    assert item.size == 5
    assert caches.image_packs(tmp_path) == []
    assert caches.image_embeddings(tmp_path / "none") == []


def test_the_quota_counts_embeddings_and_removes_the_oldest_packs_of_both_kinds(tmp_path):
    folder = decoded(tmp_path, 2)  # two days and one day old
    embeddings = folder / "embeddings" / ("0" * 16)
    embeddings.mkdir(parents=True)
    old, new = (embeddings / f"{letter * 16}.npz" for letter in "ab")
    for path, days in ((old, 3), (new, 0)):
        path.write_bytes(bytes(10_000))
        stamp = time.time() - 86400 * days
        os.utime(path, (stamp, stamp))
    images = caches.image_packs(folder)
    removed = caches.enforce_quota(folder, (images[1].size + 10_000) / 1e9)
    assert [item.paths[0] for item in removed] == [old, images[0].paths[0]]
    assert caches.image_packs(folder) == images[1:]
    assert new.is_file()
