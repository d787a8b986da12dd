"""Members of files are matched by id and class name; what does not fit is named, all of it at once."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import numpy as np
import pytest
from given_predictions import (
    CLASSES,
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
    shuffled,
    take_in,
    without,
    write,
)

from utils.building import build_commands
from utils.core.artifacts import array_headers
from utils.core.errors import UserError
from utils.discovery import imported_members
from utils.discovery.imported_members import agree_on_classes, match_images, to_workspace_order
from utils.evaluation.evaluate import evaluate
from utils.predictions import catalog, prediction_files
from utils.predictions.image_splits import ImageSplit
from utils.predictions.prediction_files import Predictions
from utils.predictions.rows import MemberRows, Samples

pytestmark = pytest.mark.usefixtures("few_folds", "without_figures")


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


def predictions(stem="val", change=lambda given: given):
    """The content of a member's file."""
    given = {"classes": None, "fold": None, "embeddings": None, "kind": "logits", **change(arrays(stem, 1))}
    return Predictions(**given | {"classes": given["classes"] if given["classes"] is None else (*given["classes"],)})


def images(ids, labels=None):
    labels = np.array([CLASSES.index(name.partition("/")[0]) for name in ids]) if labels is None else labels
    return {"val": ImageSplit("val", CLASSES, tuple(ids), labels, tuple(map(Path, ids)), tuple(ids), "")}


def part(change=lambda given: given):
    return {"val": to_workspace_order(predictions(change=change), "val", CLASSES)}


IDS = sorted(arrays("val", 1)["sample_ids"].tolist())


def test_rows_of_a_file_are_sorted_and_its_columns_named():
    order = np.argsort(arrays("val", 1)["sample_ids"])
    embeddings = np.arange(60.0).reshape(30, 2)
    given = arrays("val", 1) | {"fold": np.arange(30) % 4, "embeddings": embeddings}
    found = to_workspace_order(predictions(change=lambda _: shuffled(given, 3)), "val", CLASSES)
    assert found.rows.sample_ids.tolist() == IDS
    for name in ("labels", "logits"):
        assert np.array_equal(getattr(found.rows, name), given[name][order])
    assert np.array_equal(found.fold, given["fold"][order])
    assert np.array_equal(found.embeddings, embeddings[order])
    assert (found.rows.split, found.rows.out_of_sample.all()) == ("val", True)
    in_sample = to_workspace_order(predictions("train"), "train", CLASSES).rows
    assert (in_sample.split, in_sample.out_of_sample.any()) == ("train", False)


def test_images_decide_rows_and_labels():
    def extended(given):
        more = {"fold": np.arange(30), "embeddings": np.arange(60.0).reshape(30, 2)}
        return given | more | {"labels": np.full(30, -1)}

    ids = [*IDS[:20], "cat/z.png"]
    matched, problems = match_images("bayes", part(extended), images(ids))
    rows = matched["val"].rows
    assert rows.sample_ids.tolist() == IDS[:20]
    assert rows.labels.tolist() == images(ids)["val"].labels[:20].tolist()
    whole = part(extended)["val"]
    for found, expected in (
        (rows.logits, whole.rows.logits),
        (rows.out_of_sample, whole.rows.out_of_sample),
        (matched["val"].fold, whole.fold),
        (matched["val"].embeddings, whole.embeddings),
    ):
        assert np.array_equal(found, expected[:20])
    assert [(problem.code, problem.severity, problem.member, problem.message) for problem in problems] == [
        ("rows_left_out", "warning", "bayes", "10 of 30 rows of val.npz are no images of val and are left out"),
        ("rows_left_out", "warning", "bayes", "1 of 21 images of val are missing in val.npz"),
    ]
    assert match_images("bayes", part(), images(IDS))[1] == []


def test_files_that_images_contradict_are_refused():
    with pytest.raises(UserError, match=rf"nothing in common with the images of val; its first id is {IDS[0]}, the fi"):
        match_images("bayes", part(), images(["ant/x.png"]))
    labels = images(IDS)["val"].labels.copy()
    labels[[4, 7]] = 2
    first = rf"bayes: 2 label\(s\) of val.npz are not those of the class folders, first {IDS[4]}: ant instead of cat"
    with pytest.raises(UserError, match=first):
        match_images("bayes", part(), images(IDS, labels))
    labels[labels == 0] = 1
    some_unknown = part(lambda given: given | {"labels": np.where(given["labels"] == 0, -1, given["labels"])})
    with pytest.raises(UserError, match=r"label\(s\) of val.npz are not those") as caught:
        match_images("bayes", some_unknown, images(IDS, np.where(labels == 2, 0, labels)))
    assert f"bayes: {int((images(IDS)['val'].labels == 2).sum())} label(s)" in str(caught.value)


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ([("a", "b"), ("b", "a"), ("a", "c")], ("a", "b")),
        ([("b", "c"), ("a", "c")], ("a", "c")),
        ([None, ("b", "a")], ("a", "b")),
        ([None, None], ("0", "1")),
        ([tuple(map(str, range(12)))], tuple(map(str, range(12)))),
        ([("1", "10", "9")], ("1", "10", "9")),
    ],
)
def test_the_names_in_most_files_are_the_classes(monkeypatch, given, expected):
    def of(classes):
        width = 2 if classes is None else len(classes)
        return Predictions(np.zeros((1, width)), np.zeros(1, int), np.array(["x"]), classes, None, None, "logits")

    imports = {f"m{number}": {"val": of(classes)} for number, classes in enumerate(given)}
    monkeypatch.setattr(imported_members, "apply_to_each", lambda names, step: None)
    classes, problems = agree_on_classes(imports, None, has_images=False)
    assert classes == expected
    assert [problem.code for problem in problems] == ["classes_unnamed"] * (None in given)
    assert agree_on_classes(imports, ("x", "y"), has_images=True) == (("x", "y"), [])


@pytest.mark.parametrize(("count", "shown"), [(20, r"c18, c19$"), (21, r"c18, c19 and 1 more$")])
def test_of_many_classes_twenty_are_shown(count, shown):
    names = tuple(f"c{number}" for number in range(count))
    with pytest.raises(UserError, match=r"has 3 columns and no `classes`; expected the \d+ classes c0, .*") as caught:
        agree_on_classes({"m": {"val": predictions(change=without("classes"))}}, names, has_images=True)
    assert re.search(shown, str(caught.value).removesuffix(" (nothing was imported)"))


def rows_with(ids, *, split="val", out_of_sample=True):
    count = len(ids)
    return [
        MemberRows(
            split, CLASSES, np.array(ids), np.zeros(count, int), np.zeros((count, 3)), np.full(count, out_of_sample)
        )
    ]


def test_a_member_that_shares_no_row_is_refused():
    imported_members.require_rows_in_common("val", {"a": rows_with(["1", "2"]), "b": rows_with(["2"])})
    imported_members.require_rows_in_common("val", {"a": rows_with(["1"])})
    imported_members.require_rows_in_common("val", {"a": rows_with(["1"]), "b": rows_with(["2"], out_of_sample=False)})
    with pytest.raises(
        UserError, match=r"b: no row of val in common with the other members; its first id is 3, ano.* 1"
    ):
        imported_members.require_rows_in_common(
            "val", {"a": rows_with(["1", "2"]), "b": rows_with(["3"]), "c": rows_with(["2"])}
        )


def test_ids_of_two_splits_are_told_where_all_labels_are_equal():
    def found(first, second):
        labels = {"train": {}, "val": first, "test": second}
        samples = {split: Samples(split, tuple(ids), np.array([*ids.values()]), None) for split, ids in labels.items()}
        return imported_members.sharing_problems({split: {} for split in samples}, samples)

    (problem,) = found({"1": 0, "2": 1, "3": 2}, {"3": 2, "2": 1, "4": 0})
    assert problem.message == "2 ids are in val and in test with equal labels, such as 2"
    assert found({"1": 0, "2": 1}, {"1": 0, "2": 2}) == []
    assert found({"1": 0}, {"2": 0}) == []


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
    (folder / ".cache").mkdir()
    (folder / "README").write_text("no folder")
    shutil.copy(folder / "bayes" / "val.npz", folder / "bayes" / "vall.npz")
    with logged(caplog):
        take_in(workspace, folder)
    assert "notes is passed over: none of oof.npz, val.npz, test.npz, train.npz is in it" in caplog.text
    assert "vall.npz is passed over; did you mean 'val'?" in caplog.text
    assert "README is passed over" not in caplog.text
    assert ".cache is passed over" not in caplog.text
    with pytest.raises(UserError, match=r"these are one member's files, so give the folder above: --from .*given$"):
        take_in(workspace, folder / "bayes")
    with pytest.raises(UserError, match="no such folder; expected DIR/<member>"):
        take_in(workspace, folder / "none")
    with pytest.raises(UserError, match=r"neither oof\.npz nor val\.npz"):
        take_in(workspace, write(tmp_path / "test only", stems=("test",)))


def test_all_files_together_may_need_half_of_the_memory(tmp_path, monkeypatch):
    folder = write(tmp_path / "given", stems=("val",))
    needed = sum(prediction_files.memory_needed(array_headers(path, remedy="")) for path in folder.glob("*/*.npz"))
    monkeypatch.setattr(imported_members, "physical_memory", lambda: 2 * needed)
    assert list(imported_members.read_folder(folder)) == list(NAMES)
    monkeypatch.setattr(imported_members, "physical_memory", lambda: 2 * needed - 1)
    with pytest.raises(UserError, match=r"the files of 3 members take 0.0 GB in memory at once, more than 0.0 GB"):
        imported_members.read_folder(folder)
    (folder / "bayes" / "val.npz").write_bytes(b"damaged")
    with pytest.raises(UserError, match=r"bayes/val\.npz: cannot be read"):
        imported_members.read_folder(folder)
    monkeypatch.setattr(prediction_files, "memory_limit", lambda: 0)
    with pytest.raises(UserError, match=r"linear/val\.npz: .*a quarter of this machine's memory"):
        imported_members.read_folder(folder)


def test_names_of_ensembles_are_taken(tmp_path, workspace):
    take_in(workspace, write(tmp_path / "given"))
    build_commands.build_ensemble(CONFIG, workspace)
    with pytest.raises(UserError, match="member 'soft_voting_ensemble': the name is reserved for ensembles"):
        take_in(workspace, write(tmp_path / "more", {"soft_voting_ensemble": 5}))
