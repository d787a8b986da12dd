"""Rows that are evaluated: overlap with fitted rows, groups, rows without a label."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
from given_predictions import empty_workspace, logged, opened, take_in, write

from utils.building.ensembles import RowSet
from utils.core.errors import UserError
from utils.evaluation import evaluated_rows
from utils.predictions.rows import UNKNOWN


@pytest.fixture
def store(tmp_path):
    workspace = empty_workspace(tmp_path / "w")
    take_in(workspace, write(tmp_path / "given"))
    return opened(workspace)


def rows_of(store, split="test"):
    return {name: store.rows(member, split) for name, member in store.catalog.members.items()}


def test_rows_are_those_that_all_members_have(store):
    rows, dropped = evaluated_rows.evaluated_rows(store, rows_of(store), "test")
    assert (rows.logits.shape, dropped) == ((3, 30, 3), 0)
    assert rows.sample_ids.tolist() == sorted(rows.sample_ids.tolist())


@pytest.mark.parametrize(("split", "copies"), [("test", {"t1": "train/a", "t2": "val/c"}), ("val", {"d": "train/b"})])
def test_copies_of_train_and_val_images_are_found_by_content(split, copies):
    images = {
        "train": SimpleNamespace(sample_ids=["a", "b"], contents=["1", "2"]),
        "val": SimpleNamespace(sample_ids=["c", "d"], contents=["3", "2"]),
        "test": SimpleNamespace(sample_ids=["t0", "t1", "t2", "t3"], contents=["7", "1", "3", "8"]),
    }
    rows = SimpleNamespace(sample_ids=images[split].sample_ids)
    assert dict(evaluated_rows._copies(SimpleNamespace(images=images.get), rows, split)) == copies


@pytest.mark.parametrize("count", [0, 1, 7, 30])
def test_copies_are_left_out_and_told(store, monkeypatch, caplog, count):
    parts = rows_of(store)
    ids = sorted(parts["bayes"].sample_ids.tolist())
    monkeypatch.setattr(evaluated_rows, "_copies", lambda *_: [(name, f"train/of {name}") for name in ids[:count]])
    with_images = SimpleNamespace(catalog=SimpleNamespace(classes=store.catalog.classes, has_images=True))
    if count == 30:
        with pytest.raises(UserError, match=r"^test: every image is also a train or val image"):
            evaluated_rows.evaluated_rows(with_images, parts, "test")
        return
    with logged(caplog):
        rows, dropped = evaluated_rows.evaluated_rows(with_images, parts, "test")
    assert (rows.sample_ids.tolist(), dropped) == (ids[count:], count)
    named = [f"evaluate: test/{name} is the same image as train/of {name} and is left out" for name in ids[:count]]
    summary = [f"evaluate: {count} row(s) left out for every member and ensemble"] * (count > 0)
    assert list(dict.fromkeys(caplog.messages)) == named[:5] + summary


def test_rows_without_a_label_are_left_out(store, caplog):
    parts = rows_of(store)
    for part in parts.values():
        object.__setattr__(part, "labels", np.where(np.arange(30) < 4, UNKNOWN, part.labels))
    with logged(caplog):
        rows, _ = evaluated_rows.evaluated_rows(store, parts, "test")
    assert len(rows.labels) == 26
    assert set(caplog.messages) == {"evaluate: 4 of 30 row(s) of test are left out: no label"}
    for part in parts.values():
        object.__setattr__(part, "labels", np.full(30, UNKNOWN))
    with pytest.raises(UserError, match=r"^test: no row has a label"):
        evaluated_rows.evaluated_rows(store, parts, "test")


def test_overlap_is_counted_by_split_and_id(store):
    rows, _ = evaluated_rows.evaluated_rows(store, rows_of(store), "test")
    ids = tuple(rows.sample_ids[:5].tolist())
    assert evaluated_rows.count_overlap([RowSet("test", "held_out", ids)], rows) == 5
    assert evaluated_rows.count_overlap([RowSet("val", "held_out", ids)], rows) == 0
    assert evaluated_rows.count_overlap([], rows) == 0
