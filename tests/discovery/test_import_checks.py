"""Imported predictions are held against each other and against their labels."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from given_predictions import CLASSES, arrays, changing, codes, empty_workspace, opened, take_in, write

from utils.building import fitting
from utils.core.errors import LeakageError, UserError
from utils.discovery.import_checks import count_copied_rows, equal_rows_limit
from utils.discovery.imported_members import ImportedPart
from utils.numeric.metrics import softmax
from utils.predictions.rows import MemberRows


@pytest.fixture
def workspace(tmp_path):
    return empty_workspace(tmp_path / "w")


def test_out_of_fold_rows_that_are_those_of_train_are_refused_and_the_member_is_used_without(tmp_path, workspace):
    planted = arrays("train", 1)["logits"]
    change = changing(
        "bayes", "oof", lambda given: given | {"logits": np.where(np.arange(60)[:, None] < 3, planted, given["logits"])}
    )
    result = take_in(workspace, write(tmp_path / "given", stems=("oof", "val", "test", "train"), change=change))
    assert "bayes: out-of-fold predictions refused: 3 of 60 comparable rows equal those of train.npz" in result.text
    store = opened(workspace)
    bayes, forest = store.catalog.members["bayes"], store.catalog.members["forest"]
    assert bayes.oof is None
    assert not workspace.oof("bayes").exists()
    assert store.oof(forest) is not None
    assert not store.rows(bayes, "train").out_of_sample.any()
    with pytest.raises(LeakageError, match=r"which not all of bayes, forest have. Make them: oof\.npz and python"):
        fitting.out_of_sample_rows(store, [bayes, forest], kind="oof")


def part(stem, logits, kind="logits"):
    given = arrays(stem, 1)
    rows = MemberRows("train", CLASSES, given["sample_ids"], given["labels"], logits, np.ones(len(logits), dtype=bool))
    return ImportedPart(rows, kind, None, None)


def rounded(logits, steps):
    """Log-probabilities of a model that knows few different answers, as a forest of that many trees does."""
    shares = np.rint(softmax(logits) * steps)
    shares[:, 0] = steps - shares[:, 1:].sum(axis=1)
    return np.log(np.clip(shares / steps, 1e-12, None)).astype(np.float32)


@pytest.mark.parametrize("kinds", [("logits", "logits"), ("logits", "probabilities"), ("probabilities", "logits")])
def test_copied_rows_are_counted_by_id_whatever_the_files_hold(kinds):
    honest, full = arrays("oof", 1)["logits"], arrays("train", 1)["logits"]
    own = [full if kind == "logits" else np.log(softmax(full)).astype(np.float32) for kind in kinds]
    mixed = np.where(np.arange(60)[:, None] % 4 == 0, own[0], honest)
    assert count_copied_rows(part("oof", mixed, kinds[0]), part("train", own[1], kinds[1])) == (15, 60)
    assert count_copied_rows(part("oof", honest, kinds[0]), part("train", own[1], kinds[1])) == (0, 60)


def test_a_model_of_few_answers_may_meet_them_again():
    honest, full = (rounded(arrays(stem, 1)["logits"], steps=4) for stem in ("oof", "train"))
    equal, comparable = count_copied_rows(part("oof", honest, "probabilities"), part("train", full, "probabilities"))
    assert 0.01 < equal / comparable < 0.5
    assert equal_rows_limit(part("train", full)) == 0.5
    assert equal_rows_limit(part("train", arrays("train", 1)["logits"])) == 0.01


def test_members_without_a_common_row_cannot_be_compared():
    train = part("train", arrays("train", 1)["logits"])
    other = replace(train, rows=replace(train.rows, sample_ids=np.char.add("x", train.rows.sample_ids)))
    assert count_copied_rows(other, train) == (0, 0)


def test_out_of_fold_rows_that_are_too_good_are_suspected(tmp_path, workspace):
    perfect = changing("forest", "oof", lambda given: given | {"logits": np.eye(3)[given["labels"]] * 3})
    poor = changing("forest", "val", lambda given: given | {"logits": arrays("val", 2)["logits"] * [[1, 0, 1]]})
    folder = write(tmp_path / "given", change=lambda *a: poor(*a[:2], perfect(*a)))
    assert "forest: out-of-fold accuracy 1.0000 on 60 rows beats val accuracy" in take_in(workspace, folder).text
    assert codes(workspace, "forest") == {"oof_suspected"}


def test_columns_in_another_order_than_is_said_are_found(tmp_path, workspace):
    change = changing("linear", "val", lambda a: a | {"logits": a["logits"][:, [1, 2, 0]]})
    words = r"member linear: its classes are in another order .* Write `classes` in the order of its columns"
    with pytest.raises(UserError, match=words):
        take_in(workspace, write(tmp_path / "given", change=change))
