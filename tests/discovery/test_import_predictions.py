"""Members from files in a workspace without anything else: what they become, and that a kill harms nothing."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest
from conftest import PROJECT
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
from utils.core import artifacts
from utils.core.config_file import load_config
from utils.core.errors import UserError
from utils.discovery import discover
from utils.evaluation.evaluate import evaluate
from utils.numeric.metrics import softmax
from utils.predictions import catalog, member_selection

pytestmark = pytest.mark.usefixtures("few_folds", "without_figures")


@pytest.fixture
def workspace(tmp_path):
    return empty_workspace(tmp_path / "w")


# what members become ------------------------------------------------------------------------------------------------


def test_members_join_an_empty_folder_with_what_their_files_say(tmp_path, workspace):
    result = take_in(workspace, write(tmp_path / "given"))
    found = catalog.read(workspace)
    assert sorted(found.members) == list(NAMES)
    assert found.classes == CLASSES
    assert {split: facts["n"] for split, facts in found.splits.items()} == {"train": 60, "val": 30, "test": 30}
    assert not found.has_images
    assert not found.problems
    given, member = arrays("val", 1), found.members["bayes"]
    assert (member.source, member.img_size, member.checkpoints) == ("imported", None, ())
    assert member.recorded_accuracy == (given["logits"].argmax(axis=1) == given["labels"]).mean()
    assert (member.oof["rows"], member.oof["folds"]) == (60, 5)
    store = opened(workspace)
    rows = store.rows(member, "val")
    order = np.argsort(given["sample_ids"])
    for name in ("logits", "labels", "sample_ids"):
        assert np.array_equal(getattr(rows, name), given[name][order])
    assert rows.out_of_sample.all()
    assert np.array_equal(
        store.oof(member).logits, arrays("oof", 1)["logits"][np.argsort(arrays("oof", 1)["sample_ids"])]
    )
    assert result.next == "build-ensemble"
    assert result.document["members"]["linear"]["state"] == "imported"


def test_the_order_of_rows_and_classes_changes_no_byte(tmp_path, workspace):
    take_in(workspace, write(tmp_path / "given"))
    other = empty_workspace(tmp_path / "v")
    take_in(other, write(tmp_path / "shuffled", change=lambda name, stem, given: shuffled(given, len(name + stem))))
    for each in (workspace, other):
        build_commands.build_ensemble(CONFIG, each)
    first, second = content(workspace.ensembles), content(other.ensembles)
    assert len(first) > 30
    assert first == second


def test_the_same_again_changes_nothing_and_other_content_replaces(tmp_path, workspace):
    folder = write(tmp_path / "given")
    take_in(workspace, folder)
    build_commands.build_ensemble(CONFIG, workspace)
    before = {path: path.stat().st_mtime_ns for path in workspace.ensembles.rglob("*")}
    again = take_in(workspace, write(tmp_path / "again", change=lambda name, stem, given: shuffled(given, 5)))
    assert {entry["state"] for entry in again.document["members"].values()} == {"up to date"}
    assert before == {path: path.stat().st_mtime_ns for path in workspace.ensembles.rglob("*")}
    write(folder, {"bayes": 9}, stems=("oof", "val"))
    (folder / "bayes" / "test.npz").unlink()
    states = {name: entry["state"] for name, entry in take_in(workspace, folder).document["members"].items()}
    assert states == {"bayes": "replaced", "forest": "up to date", "linear": "up to date"}
    assert not workspace.predictions("bayes", "test").joinpath("record.json").exists()  # the new one has no test.npz
    result = build_commands.build_ensemble(CONFIG, workspace)
    assert len(result.document["built"]) == 3  # not what was built of the old one
    forced = take_in(workspace, folder, force=True).document["members"]
    assert {entry["state"] for entry in forced.values()} == {"replaced"}


def test_members_that_come_later_join_those_that_are_there(tmp_path, workspace):
    take_in(workspace, write(tmp_path / "one", {"bayes": 1, "forest": 2}))
    more = write(tmp_path / "two", {"linear": 3}, change=lambda name, stem, given: without("classes")(given))
    take_in(workspace, more)
    together = empty_workspace(tmp_path / "v")
    take_in(together, write(tmp_path / "all"))
    found, other = catalog.read(workspace), catalog.read(together)
    assert found.members == other.members
    assert (found.splits, found.classes) == (other.splits, other.classes)


def test_what_was_said_of_a_member_is_not_forgotten_when_another_comes(tmp_path, workspace):
    ants = changing("bayes", "val", lambda given: fewer(given["labels"] == 0)(given))
    take_in(workspace, write(tmp_path / "one", {"bayes": 1}, change=ants))
    take_in(workspace, write(tmp_path / "two", {"linear": 3}))
    assert codes(workspace, "bayes") == {"single_class"}
    take_in(workspace, write(tmp_path / "three", {"bayes": 1}))
    assert codes(workspace, "bayes") == set()


def test_rows_of_a_member_that_is_not_used_decide_the_folds_as_well(tmp_path, workspace):
    config = load_config(PROJECT / "configs" / "votes.yaml", overrides=["backbones.include=[bayes,forest]"])
    take_in(workspace, write(tmp_path / "one", {"bayes": 1, "forest": 2}))
    build_commands.build_ensemble(config, workspace)
    assert build_commands.build_ensemble(config, workspace).document["built"] == []

    def longer(name, stem, given):
        more = {key: value if key == "classes" else value[:5] for key, value in given.items()}
        more["sample_ids"] = np.char.add(more["sample_ids"], ".more")
        return {key: value if key == "classes" else np.concatenate([value, more[key]]) for key, value in given.items()}

    take_in(workspace, write(tmp_path / "two", {"linear": 3}, change=longer))
    assert len(build_commands.build_ensemble(config, workspace).document["built"]) == 3


def test_probabilities_and_their_logarithms_are_one_member(tmp_path, workspace):
    def as_probabilities(name, stem, given):
        return without("logits")(given) | {"probabilities": softmax(given["logits"])}

    take_in(workspace, write(tmp_path / "given", {"bayes": 1}, change=as_probabilities))
    store = opened(workspace)
    rows = store.rows(store.catalog.members["bayes"], "val")
    given = arrays("val", 1)
    np.testing.assert_allclose(
        np.exp(rows.logits), softmax(given["logits"])[np.argsort(given["sample_ids"])], rtol=1e-5
    )


def test_embeddings_are_kept_those_of_out_of_fold_rows_beside_them(tmp_path, workspace):
    def with_embeddings(name, stem, given):
        rows = len(given["labels"])
        return given | {"embeddings": np.arange(rows * 2, dtype=np.float16).reshape(rows, 2)}

    take_in(workspace, write(tmp_path / "given", stems=("oof", "val", "test", "train"), change=with_embeddings))
    order = np.argsort(arrays("test", 1)["sample_ids"])
    assert np.array_equal(np.load(workspace.embeddings("bayes", "test"))[:, 0], order * 2)
    record = json.loads(workspace.embeddings_record("bayes", "train").read_text())
    assert (record["rows"], record["width"]) == ("in_sample", 2)  # of the full network, marked
    store = opened(workspace)
    member = store.catalog.members["bayes"]
    order = np.argsort(arrays("oof", 1)["sample_ids"])
    assert np.array_equal(store.oof(member, embeddings=True).embeddings[:, 0], order * 2)
    assert store.oof(member).embeddings is None
    assert store.has_oof_embeddings(member)


def test_classes_without_names_are_numbers_in_their_order(tmp_path, workspace):
    classes = tuple(f"class {number:02d}" for number in range(12))

    def unnamed(name, stem, _):
        return without("classes")(arrays(stem, len(name), classes))

    result = take_in(workspace, write(tmp_path / "given", change=unnamed))
    assert catalog.read(workspace).classes == tuple(map(str, range(12)))
    assert "no `classes` in the files of bayes, forest, linear; their columns are taken to be 0, 1, 2, " in result.text
    named = write(
        tmp_path / "named", {"tree": 4}, change=lambda *_: arrays(_[1], 4, classes) | {"classes": np.arange(12)}
    )
    take_in(workspace, named)  # numbers are names as well, and stay in the order of numbers
    assert catalog.read(workspace).classes == tuple(map(str, range(12)))


def test_val_may_be_missing_where_there_are_out_of_fold_rows(tmp_path, workspace):
    take_in(workspace, write(tmp_path / "given", stems=("oof", "test")))
    build_commands.build_ensemble(CONFIG, workspace)
    evaluate(CONFIG, workspace)
    ranking = json.loads(workspace.ranking("test").read_text())
    assert ranking["recommended"]["evidence"]["n"] == 60
    with pytest.raises(
        UserError, match=r"member bayes: no predictions for val; none are imported. Write DIR/bayes/val"
    ):
        evaluate(CONFIG, workspace, split="val")


def test_without_any_out_of_fold_rows_val_is_what_is_honest(tmp_path, workspace, caplog):
    take_in(workspace, write(tmp_path / "given", stems=("val", "test")))
    with logged(caplog):
        build_commands.build_ensemble(CONFIG, workspace)
    assert "No oof.npz of member linear" in caplog.text
    assert (
        "out-of-fold predictions come from: oof.npz and python ensemble_orchestrator.py import-predict" in caplog.text
    )
    with np.load(workspace.ensemble("soft_voting_ensemble") / "crossfit.npz") as unseen:
        assert set(unseen["split"].tolist()) == {"val"}


# kills --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("arriving", "staying"), [(("forest", "linear"), ["bayes"]), (("bayes", "forest"), [])])
def test_a_kill_at_any_write_leaves_a_catalog_whose_members_are_whole(
    tmp_path, workspace, monkeypatch, arriving, staying
):
    take_in(workspace, write(tmp_path / "given", {"bayes": 1, "forest": 2}))
    change = write(tmp_path / "more", dict.fromkeys(arriving, 8))
    saved = shutil.copytree(workspace.base, tmp_path / "saved")
    replacing = artifacts.replacing
    for survived in range(100):
        shutil.rmtree(workspace.base)
        shutil.copytree(saved, workspace.base)
        left = iter(range(survived))

        def dying(path, left=left):
            if next(left, None) is None:
                raise KeyboardInterrupt
            return replacing(path)

        monkeypatch.setattr(artifacts, "replacing", dying)
        try:
            take_in(workspace, change)
            break
        except KeyboardInterrupt:
            monkeypatch.setattr(artifacts, "replacing", replacing)
        assert survived == 0 or workspace.catalog.is_file() is bool(staying)
        if not workspace.catalog.is_file():
            continue
        store = opened(workspace)
        assert sorted(store.catalog.members) in (staying, ["bayes", "forest"])
        for member in store.catalog.members.values():
            assert not store.outdated_parts(member)
            assert store.rows(member, "test").logits.shape == (30, 3)
        assert len(store.samples("val").sample_ids) == store.catalog.splits["val"]["n"]
        if survived % 8 == 0:
            build_commands.build_ensemble(CONFIG, workspace)
    assert survived > 20
    assert sorted(catalog.read(workspace).members) == sorted({"bayes", "forest", *arriving})


def test_a_damaged_catalog_without_images_is_told_and_made_anew(tmp_path, workspace, caplog):
    folder = write(tmp_path / "given")
    take_in(workspace, folder)
    workspace.catalog.write_text("{")
    with logged(caplog):
        take_in(workspace, folder)
    assert "what was imported before must be imported again" in caplog.text
    assert sorted(catalog.read(workspace).members) == list(NAMES)


# selection and discovery --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("overrides", "chosen"),
    [
        ((), NAMES),
        (("backbones.exclude=[forest]",), ("bayes", "linear")),
        (("backbones.include=[linear,bayes]",), ("bayes", "linear")),
        (("backbones.include=[CustomMaxViT,linear]",), ("linear",)),
    ],
)
def test_imported_members_join_unless_the_configuration_names_others(tmp_path, workspace, overrides, chosen, caplog):
    take_in(workspace, write(tmp_path / "given"))
    config = load_config(PROJECT / "configs" / "votes.yaml", overrides=overrides)
    with logged(caplog):
        found = member_selection.select(catalog.read(workspace), config)
    assert tuple(member.name for member in found) == chosen
    assert ("CustomMaxViT not found" in caplog.text) is ("CustomMaxViT" in "".join(overrides))


def test_a_later_discovery_keeps_them_and_what_was_said_of_them(tmp_path, workspace):
    ants = changing("bayes", "val", lambda given: fewer(given["labels"] == 0)(given))
    take_in(workspace, write(tmp_path / "given", change=ants))
    before = catalog.read(workspace)
    result = discover.discover(CONFIG, workspace, verify=True)
    assert catalog.read(workspace) == before
    assert not result.failures
    assert "3 members, 3 classes, samples: train 60, val 30, test 30" in result.text


def test_a_member_that_is_taken_back_takes_its_rows_with_it(tmp_path, workspace):
    def longer(given):
        more = given["sample_ids"][:2]
        return fewer(np.r_[:30, :2])(given) | {"sample_ids": np.append(given["sample_ids"], np.char.add(more, ".more"))}

    take_in(workspace, write(tmp_path / "given", change=changing("forest", "val", longer)))
    assert codes(workspace) == {"rows_not_shared"}
    assert catalog.read(workspace).splits["val"]["n"] == 32
    discover.discover(CONFIG, workspace, remove=["forest"])
    other = empty_workspace(tmp_path / "v")
    take_in(other, write(tmp_path / "two", {"bayes": 1, "linear": 3}))
    assert catalog.read(workspace) == catalog.read(other)
    assert build_commands.build_ensemble(CONFIG, workspace).document["members"] == ["bayes", "linear"]
    with pytest.raises(UserError, match="no trained model"):
        discover.discover(CONFIG, workspace, remove=["bayes", "linear"])
    assert not workspace.catalog.exists()
    take_in(workspace, tmp_path / "given")
