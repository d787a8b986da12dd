"""Listing images and dealing them out to splits and folds."""

from __future__ import annotations

import numpy as np
import pytest

from utils.samples import content_digests, group_indices, scan, stratified_bins


def test_scan_sorts_by_class_and_name_and_takes_images_alone(tmp_path):
    for name in ("b/2.png", "b/10.PNG", "a/x.jpg", "a/notes.txt", "a/deeper/y.png"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(b"x")
    classes, samples = scan(tmp_path)
    assert classes == ["a", "b"]
    assert [(s.sample_id, s.label) for s in samples] == [("a/x.jpg", 0), ("b/10.PNG", 1), ("b/2.png", 1)]


def test_scan_names_a_missing_folder_and_an_empty_class(tmp_path):
    with pytest.raises(FileNotFoundError, match="no such folder"):
        scan(tmp_path / "none")
    (tmp_path / "a").mkdir()
    with pytest.raises(ValueError, match="a: the class folder holds no image"):
        scan(tmp_path)


def test_digest_is_believed_only_while_size_and_time_agree(tmp_path):
    (tmp_path / "a").mkdir()
    file = tmp_path / "a" / "1.png"
    file.write_bytes(b"one")
    samples = scan(tmp_path)[1]
    first = content_digests(samples)
    assert content_digests(samples, {"a/1.png": [*first["a/1.png"][:2], "believed"]})["a/1.png"][2] == "believed"
    file.write_bytes(b"other")
    assert content_digests(samples, first)["a/1.png"][2] != first["a/1.png"][2]


def test_groups_join_by_content_and_by_name_also_in_chains():
    ids = ["a/p1_x.png", "a/p1_y.png", "a/p2_x.png", "a/alone.png", "b/p3.png"]
    contents = ["c0", "c1", "c1", "c3", "c4"]  # p1 and p2 share an image, so both patients are one group
    groups = group_indices(ids, contents, r"^(p\d+)_")
    assert groups[0] == groups[1] == groups[2]
    assert len({groups[0], groups[3], groups[4]}) == 3


def test_single_images_meet_their_shares_exactly_per_class():
    labels = np.repeat([0, 1, 2], [100, 50, 30])
    bins = stratified_bins(labels, np.arange(180), [0.8, 0.1, 0.1], seed=1)
    assert [np.bincount(bins[labels == c]).tolist() for c in range(3)] == [[80, 10, 10], [40, 5, 5], [24, 3, 3]]


def test_groups_stay_whole_and_classes_stay_spread():
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 3, 400)
    groups = np.unique(rng.integers(0, 90, 400) * 3 + labels, return_inverse=True)[1]
    bins = stratified_bins(labels, groups, [0.2] * 5, seed=3)
    assert all(len(np.unique(bins[groups == group])) == 1 for group in np.unique(groups))
    table = np.array([np.bincount(bins[labels == c], minlength=5) for c in range(3)])
    assert (np.abs(table - table.mean(axis=1, keepdims=True)) <= 6).all()


def test_the_smallest_class_reaches_every_split_and_the_seed_decides():
    labels = np.repeat([0, 1], [60, 3])
    bins = stratified_bins(labels, np.arange(63), [0.8, 0.1, 0.1], seed=0)
    assert sorted(bins[labels == 1]) == [0, 1, 2]
    assert (bins == stratified_bins(labels, np.arange(63), [0.8, 0.1, 0.1], seed=0)).all()
    assert (bins != stratified_bins(labels, np.arange(63), [0.8, 0.1, 0.1], seed=1)).any()


def test_classes_of_few_groups_are_spread_over_all_bins():
    one_each = np.arange(1000)
    assert np.bincount(stratified_bins(one_each, one_each, [0.2] * 5, seed=0, rare=True)).tolist() == [200] * 5
    labels = np.repeat(np.arange(7), [100, 60, 3, 3, 2, 1, 1])
    bins = stratified_bins(labels, np.arange(170), [0.2] * 5, seed=4, rare=True)
    assert np.ptp(np.bincount(bins)) <= 2
    for label, count in enumerate(np.bincount(labels)):
        assert np.bincount(bins[labels == label], minlength=5).max() == -(-count // 5)


def test_classes_of_two_large_groups_do_not_share_two_bins():
    groups = np.repeat(np.arange(8), 50)
    labels = groups // 2
    bins = stratified_bins(labels, groups, [0.2] * 5, seed=0, rare=True)
    assert sorted(np.bincount(bins)) == [50, 50, 100, 100, 100]
    for label in range(4):
        assert len(np.unique(bins[labels == label])) == 2
