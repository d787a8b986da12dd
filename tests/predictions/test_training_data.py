"""Which rows a statement on training data makes fitted, also of derived members, on catalogs made by hand."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest

from utils.core.artifacts import write_arrays
from utils.core.errors import LeakageError, UserError
from utils.core.workspace import Workspace
from utils.predictions import training_data
from utils.predictions.catalog import Catalog, Member
from utils.predictions.rows import MemberRows, Samples

IDS = {"train": ("a/0", "a/1", "b/0"), "val": ("a/0", "b/1"), "test": ("b/2",)}


def member(name, trained_on="train", **entries):
    values = {
        "architecture": "timm:x",
        "size": "full",
        "img_size": 32,
        "classes": ("a", "b"),
        "checkpoints": (),
        "exports": (),
    }
    values |= {"metrics": None, "oof": None, "recorded_accuracy": None, "digest": name, "trained_on": trained_on}
    return Member(name=name, **(values | entries))


def catalog_of(*members):
    splits = {split: {"n": len(ids), "digest": split} for split, ids in IDS.items()}
    return Catalog({}, ("a", "b"), splits, {each.name: each for each in members})


@pytest.fixture
def store(tmp_path):
    workspace = Workspace(tmp_path, *(tmp_path / name for name in "abcdefg"))

    def samples(split):
        ids = IDS[split]
        return Samples(split, ids, np.zeros(len(ids), dtype=int), tuple(f"{split}:{name}" for name in ids))

    return lambda *members: SimpleNamespace(workspace=workspace, catalog=catalog_of(*members), samples=samples)


def fitted(store, each):
    return {split: sorted(ids) for split in IDS if (ids := training_data.fitted_rows(store, each, split))}


@pytest.mark.parametrize(
    ("statement", "splits"),
    [
        ("none", ()),
        ("train", ("train",)),
        ("train+val", ("train", "val")),
        ("all", tuple(IDS)),
        ("unknown", ("train",)),
    ],
)
def test_a_statement_names_whole_splits(store, statement, splits):
    each = member("m", statement)
    assert fitted(store(each), each) == {split: list(IDS[split]) for split in splits}
    assert training_data.is_unknown(catalog_of(each), each) == (statement == "unknown")


def test_a_list_names_images_by_their_content(store):
    each = member("m", "file")
    opened = store(each)
    write_arrays(opened.workspace.training_data("m"), {"contents": np.array(["train:a/1", "val:b/1", "gone"])})
    assert fitted(opened, each) == {"train": ["a/1"], "val": ["b/1"]}
    assert training_data.predicts_unseen_train_rows(opened, each)
    opened.workspace.training_data("m").unlink()
    with pytest.raises(UserError, match=r"m\.npz: missing; .*--trained-on m=FILE"):
        fitted(opened, each)


@pytest.mark.parametrize(("parent", "splits"), [("none", ["train"]), ("train+val", ["train", "val"]), ("all", [*IDS])])
def test_what_a_parent_was_trained_on_counts_for_what_is_derived_from_it(store, parent, splits):
    first, second = member("a", parent), member("b")
    soup = member("a_soup", source="derived", parents=("a",))
    student = member("student", source="derived", parents=("a_soup", "b"))
    for each in (soup, student):
        assert list(fitted(store(first, second, soup, student), each)) == splits


def test_what_is_derived_from_the_unknown_is_unknown_and_the_remedy_names_the_source():
    leak, soup = member("leak", "unknown"), member("leak_soup", source="derived", parents=("leak",))
    listed = catalog_of(member("a"), leak, soup)
    assert training_data.unknown_names(listed, ["a", "leak_soup"]) == ["leak_soup"]
    with pytest.raises(
        LeakageError, match=r"discover --trained-on leak=train; otherwise none, train\+val, all, or a file"
    ):
        training_data.require_some_known(listed, ["leak_soup"])
    training_data.require_some_known(listed, ["a", "leak_soup"])
    of_list = member("listed_soup", "file", source="derived", parents=("listed",))
    assert training_data.is_unknown(catalog_of(of_list), of_list)  # the list is gone with the parent
    for others in ((of_list,), ()):
        assert not training_data.is_unknown(catalog_of(member("listed", "file"), *others), of_list)


def test_the_remedy_for_what_outlives_its_network_names_the_network():
    soup = member("leak_soup", "unknown", source="derived", parents=("leak",))
    with pytest.raises(
        LeakageError, match=r"recommended\. Add again: python .* --add leak=SOURCE --trained-on STATEMENT$"
    ):
        training_data.require_some_known(catalog_of(soup), ["leak_soup"])


def test_weights_that_a_training_started_from_count_for_its_fold_networks(store):
    oof = {"path": "x", "rows": 3, "folds": 2, "accuracy": 0.5, "sha256": "0"}
    started = {on: member("m", "train", pretrained_on=on, oof=oof) for on in ("none", "train", "all", "unknown")}
    for on, each in started.items():
        assert training_data.has_train_rows(store(each), each) == (on == "none")
        assert training_data.pretraining_rows(store(each), each) == frozenset(IDS["train"] if on != "none" else ())


def test_digests_know_statements_and_leave_plain_members_alone():
    plain, stated = member("a"), member("b", "none")
    soup = member("b_soup", source="derived", parents=("b",))
    assert training_data.stated(catalog_of(plain), ["a", "gone"]) == {}
    found = training_data.stated(catalog_of(plain, stated, soup), ["a", "b", "b_soup"])
    assert list(found) == ["b", "b_soup"]
    listed = member("b", "file", training_list={"digest": "1", "rows": {}, "unmatched": 0})
    other = member("b", "file", training_list={"digest": "2", "rows": {}, "unmatched": 0})
    assert training_data.stated(catalog_of(listed), ["b"]) != training_data.stated(catalog_of(other), ["b"])


def test_members_without_a_split_in_common_are_refused_by_name():
    def rows(split):
        none = np.empty(0)
        return MemberRows(split, ("a", "b"), none, none, none, none)

    listed = catalog_of(member("a"), member("wide", "train+val"))
    training_data.require_shared_splits(listed, {"a": [rows("val")], "wide": [rows("train"), rows("val")]})
    with pytest.raises(LeakageError, match=r"a \(train\) of val, wide \(train\+val\) of train.*exclude="):
        training_data.require_shared_splits(listed, {"a": [rows("val")], "wide": [rows("train")]})
    with pytest.raises(LeakageError, match=r"wide \(train\+val\) of no split.*exclude=\[wide\]"):
        training_data.require_shared_splits(listed, {"a": [rows("val")], "wide": []})


@pytest.mark.parametrize("statement", training_data.STATEMENTS)
def test_train_rows_are_unseen_by_full_networks_that_were_trained_on_none_of_them(store, statement):
    each = member("m", statement)
    opened = store(each)
    write_arrays(
        opened.workspace.training_data("m"), {"contents": np.array([f"train:{name}" for name in IDS["train"]])}
    )
    expected = statement == "none"
    assert training_data.predicts_unseen_train_rows(opened, each) == expected
    assert training_data.has_train_rows(opened, each) == expected
    views = member("views", statement, source="derived", parents=("m",), views=("flip",))
    assert training_data.predicts_unseen_train_rows(store(each, views), views) == expected


@pytest.mark.parametrize(
    ("entries", "expected"),
    [
        ({"oof": {"rows": 3}}, True),
        ({"oof": {"rows": 3}, "pretrained_on": "all"}, False),
        ({"source": "imported"}, False),
        ({"source": "derived"}, False),
    ],
)
def test_train_rows_of_other_members_come_from_fold_networks_alone(store, entries, expected):
    each = member("m", "none", **entries)
    assert not training_data.predicts_unseen_train_rows(store(each), each)
    assert training_data.has_train_rows(store(each), each) == expected


@pytest.mark.parametrize(
    ("statement", "splits"),
    [
        ("none", ("train", "val", "test")),
        ("train", ("val", "test")),
        ("train+val", ("test",)),
        ("all", ()),
        ("unknown", ("val", "test")),
        ("file", ("val", "test")),
    ],
)
def test_splits_are_unseen_by_what_they_were_not_stated_for(statement, splits):
    rows = {"train": 2, "val": 0, "test": 0}
    each = member("m", statement, training_list={"rows": rows, "digest": "", "unmatched": 0})
    assert training_data.unseen_splits(each) == splits


def test_a_soup_whose_parent_was_removed_keeps_its_own_statement():
    soup = member("soup", "train", source="derived", parents=("gone",))
    assert not training_data.is_unknown(catalog_of(soup), soup)
    started = member("m", pretrained_on="unknown")
    assert training_data.is_unknown(catalog_of(started), started)


def test_the_widest_statement_is_that_on_averaged_weights():
    order = ("none", "train", "file", "train+val", "all", "unknown")
    for number, widest in enumerate(order):
        assert training_data.combined(order[: number + 1][::-1]) == widest


def test_a_parent_that_two_ways_lead_to_is_listed_once():
    first = member("a")
    left, right = (member(name, source="derived", parents=("a",)) for name in ("left", "right"))
    both = member("both", source="derived", parents=("left", "right", "gone"))
    found = training_data.lineage(catalog_of(first, left, right, both), both)
    assert sorted(each.name for each in found) == ["a", "both", "left", "right"]
