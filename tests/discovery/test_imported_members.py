"""Members of files are matched by id and class name; what does not fit is named, all of it at once."""

from __future__ import annotations

import shutil

import numpy as np
import pytest
from given_predictions import (
    CONFIG,
    NAMES,
    arrays,
    changing,
    codes,
    content,
    empty_workspace,
    fewer,
    logged,
    opened,
    take_in,
    without,
    write,
)

from utils.building import build_commands
from utils.core.errors import UserError
from utils.evaluation.evaluate import evaluate
from utils.predictions import catalog


@pytest.fixture
def workspace(tmp_path):
    return empty_workspace(tmp_path / "w")


# rows and labels ----------------------------------------------------------------------------------------------------


def test_rows_that_not_all_have_are_told_and_left_out_of_ensembles(tmp_path, workspace):
    result = take_in(workspace, write(tmp_path / "given", change=changing("forest", "val", fewer(slice(4, None)))))
    assert "warning: the members have 26 to 30 rows of val and share 26, which are used" in result.text
    assert "rows_not_shared" in codes(workspace)
    build_commands.build_ensemble(CONFIG, workspace)
    with np.load(workspace.ensemble("soft_voting_ensemble") / "crossfit.npz") as unseen:
        assert len(unseen["labels"]) == 60 + 26


def test_a_label_that_one_member_does_not_know_comes_from_another(tmp_path, workspace):
    def unlabelled(name, stem, given):
        if stem == "test" or name == "linear":
            return given | {"labels": np.full_like(given["labels"], -1)}
        return without("labels")(given) if name == "forest" else given

    take_in(workspace, write(tmp_path / "given", change=unlabelled))
    store = opened(workspace)
    truth = arrays("val", 1)
    for name in NAMES:
        rows = store.rows(store.catalog.members[name], "val")
        assert np.array_equal(rows.labels, truth["labels"][np.argsort(truth["sample_ids"])])
    assert (store.rows(store.catalog.members["bayes"], "test").labels == -1).all()
    assert codes(workspace, "bayes") == {"unlabelled"}
    build_commands.build_ensemble(CONFIG, workspace)
    with pytest.raises(UserError, match=r"test: no row has a label. Write labels into test\.npz of any member"):
        evaluate(CONFIG, workspace)
    assert evaluate(CONFIG, workspace, split="val").document["n"] == 30


def test_rows_whose_class_nobody_knows_are_not_fitted_on_and_not_scored(tmp_path, workspace, caplog):
    def hidden(name, stem, given):
        return given | {"labels": np.where(np.arange(len(given["labels"])) < 5, -1, given["labels"])}

    result = take_in(workspace, write(tmp_path / "given", change=hidden))
    assert "bayes, forest, linear: 5 of 30 rows of val.npz have no label and are left out" in result.text
    assert catalog.read(workspace).splits["train"]["n"] == 55
    build_commands.build_ensemble(CONFIG, workspace)
    with logged(caplog):
        found = evaluate(CONFIG, workspace)
    assert found.document["n"] == 25
    assert "evaluate: 5 of 30 row(s) of test are left out: no label" in caplog.text


def test_ids_in_two_splits_with_equal_labels_are_a_warning(tmp_path, workspace):
    def repeated(name, stem, given):
        return given if stem != "test" else arrays("val", len(name)) | {"logits": given["logits"]}

    result = take_in(workspace, write(tmp_path / "given", change=repeated))
    assert "30 ids are in val and in test with equal labels, such as ant/2" in result.text


def test_one_member_and_one_class_are_told(tmp_path, workspace):
    ants = changing("bayes", "val", lambda given: fewer(given["labels"] == 0)(given))
    result = take_in(workspace, write(tmp_path / "given", {"bayes": 1}, ("val", "test"), ants))
    assert "one member alone: an ensemble of it answers as it does" in result.text
    assert "bayes: all 10 rows of val.npz are of class ant" in result.text
    with pytest.raises(
        UserError, match="all 10 out-of-sample rows that the members share are of class ant; nothing can be"
    ):
        build_commands.build_ensemble(CONFIG, workspace)


# refusals -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (
            changing(
                "forest", "val", lambda a: a | {"logits": np.where(np.arange(30)[:, None] < 2, np.nan, a["logits"])}
            ),
            r"forest/val\.npz: predictions of member forest refused: 2 rows have NaN or infinite logits, first ",
        ),
        (
            changing("linear", "test", lambda a: a | {"labels": (a["labels"] + 1) % 3}),
            r"members bayes and linear: 30 label\(s\) of test disagree, first ant/3\d+\.png: ant for bayes, bee for li",
        ),
        (
            changing("linear", "val", lambda a: a | {"sample_ids": np.char.add("val/", a["sample_ids"])}),
            "member linear: no row of val in common with the other members; its first id is val/ant/",
        ),
        (
            changing("bayes", "oof", lambda a: a | {"classes": np.array(["ant", "bee", "dog"])}),
            r"member bayes: oof\.npz has the classes ant, bee, dog; expected ant, bee, cat",
        ),
        (
            changing("linear", "val", lambda a: without("classes")(a) | {"logits": np.eye(4)[a["labels"]]}),
            r"member linear: val\.npz has 4 columns and no `classes`; expected the 3 classes ant, bee, cat",
        ),
        (changing("linear", "oof", without("fold")), "predictions of member linear refused: no array fold"),
        (
            lambda name, stem, a: a | {"labels": np.full(len(a["labels"]), -1)},
            r"member forest: no row of oof\.npz has a label",
        ),
        (
            lambda name, stem, a: a | {"embeddings": np.ones((len(a["labels"]), 2 + (stem == "val")))},
            "member bayes: embeddings of 2 and 3 numbers",
        ),
    ],
)
def test_files_that_do_not_fit_are_named_and_nothing_is_imported(tmp_path, workspace, change, words):
    with pytest.raises(UserError, match=rf"(?s){words}.*\(nothing was imported\)$"):
        take_in(workspace, write(tmp_path / "given", change=change))
    assert content(workspace.base) == {}


def test_all_refusals_are_told_at_once(tmp_path, workspace):
    take_in(workspace, write(tmp_path / "given"))
    before = content(workspace.ensembles)

    def broken(name, stem, given):
        return without("sample_ids")(given) if stem == "val" and name != "bayes" else arrays(stem, 7)

    with pytest.raises(UserError) as caught:
        take_in(workspace, write(tmp_path / "broken", change=broken))
    lines = str(caught.value).splitlines()
    assert len(lines) == 2
    assert "member forest refused: no array sample_ids" in lines[0]
    assert content(workspace.ensembles) == before


def test_folders_that_hold_no_predictions_are_told(tmp_path, workspace, caplog):
    folder = write(tmp_path / "given")
    (folder / "notes").mkdir()
    shutil.copy(folder / "bayes" / "val.npz", folder / "bayes" / "vall.npz")
    with logged(caplog):
        take_in(workspace, folder)
    assert "notes is passed over: none of oof.npz, val.npz, test.npz, train.npz is in it" in caplog.text
    assert "vall.npz is passed over; did you mean 'val'?" in caplog.text
    with pytest.raises(UserError, match=r"these are one member's files, so give the folder above: --from .*given$"):
        take_in(workspace, folder / "bayes")
    with pytest.raises(UserError, match="no such folder; expected DIR/<member>"):
        take_in(workspace, folder / "none")
    with pytest.raises(UserError, match=r"neither oof\.npz nor val\.npz"):
        take_in(workspace, write(tmp_path / "test only", stems=("test",)))


def test_names_of_ensembles_are_taken(tmp_path, workspace):
    take_in(workspace, write(tmp_path / "given"))
    build_commands.build_ensemble(CONFIG, workspace)
    with pytest.raises(UserError, match="member 'soft_voting_ensemble': the name is reserved for ensembles"):
        take_in(workspace, write(tmp_path / "more", {"soft_voting_ensemble": 5}))
