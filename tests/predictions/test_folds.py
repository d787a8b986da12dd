"""Cross-fitting folds where no images are there to be looked at, and of images made by hand."""

from __future__ import annotations

import json
from types import SimpleNamespace

import numpy as np
import pytest
from conftest import PROJECT
from given_predictions import CONFIG, empty_workspace, fewer, logged, take_in, write

from utils import base_back
from utils.building import build_commands, ensembles
from utils.core.config_file import load_config
from utils.core.errors import ConfigError, UserError
from utils.discovery import import_predictions
from utils.predictions import folds
from utils.predictions.rows import Samples


@pytest.fixture
def workspace(tmp_path):
    return empty_workspace(tmp_path / "w")


def folds_of(workspace):
    """{sample id: fold}, of a stored assignment."""
    with np.load(workspace.crossfit_folds) as folds:
        return dict(zip(folds["sample_ids"].tolist(), folds["fold"].tolist(), strict=True))


def grouped(rule):
    return load_config(PROJECT / "configs" / "votes.yaml", overrides=[f"dataset.group_regex={rule}"])


def test_a_class_of_one_row_leaves_five_folds(tmp_path, workspace):
    def one_cat(name, stem, given):
        cats = np.flatnonzero(given["labels"] == 2)
        return fewer(np.setdiff1d(np.arange(30), cats[1:]))(given)

    take_in(workspace, write(tmp_path / "given", stems=("val",), change=one_cat))
    build_commands.build_ensemble(CONFIG, workspace)
    assert sorted(np.bincount(list(folds_of(workspace).values()))) == [4, 4, 4, 4, 5]
    record = ensembles.record_of(workspace, "logit_averaging_ensemble")["crossfit"]
    assert (record["n"], record["folds"], record["selected_by"]) == (21, 5, "folds")


def test_two_groups_are_two_folds_and_select_by_rows_with_a_warning(tmp_path, workspace, caplog):
    config = grouped(r"^([12])\d+\.png$")  # the rows of each split are one group
    import_predictions.import_predictions(config, workspace, folder=str(write(tmp_path / "given")))
    with logged(caplog):
        build_commands.build_ensemble(config, workspace)
    assert "90 out-of-sample rows are in 2 cross-fitting folds: settings are selected on single rows" in caplog.text
    assert {(sample_id.split("/")[1][0], fold) for sample_id, fold in folds_of(workspace).items()} == {
        ("1", 0),
        ("2", 1),
    }
    record = ensembles.record_of(workspace, "logit_averaging_ensemble")["crossfit"]
    assert (record["folds"], record["selected_by"]) == (2, "rows")


def test_one_group_alone_cannot_be_cross_fitted(tmp_path, workspace):
    config = grouped(r"(\.png)$")
    import_predictions.import_predictions(config, workspace, folder=str(write(tmp_path / "given")))
    with pytest.raises(UserError, match=r"all 90 samples of train and val are one group.*Narrow dataset\.group_regex"):
        build_commands.build_ensemble(config, workspace)


def test_folds_keep_groups_together_by_their_names_alone(tmp_path, workspace):
    config = load_config(PROJECT / "configs" / "votes.yaml", overrides=[r"dataset.group_regex=^\d\d\d(\d)\.png$"])
    import_predictions.import_predictions(config, workspace, folder=str(write(tmp_path / "given")))
    build_commands.build_ensemble(config, workspace)
    with np.load(workspace.crossfit_folds) as folds:
        groups = [sample_id[-5] for sample_id in folds["sample_ids"].tolist()]
        assert len({(group, fold) for group, fold in zip(groups, folds["fold"].tolist(), strict=True)}) == 10


def test_an_expression_that_never_ends_is_an_error_of_the_configuration(tmp_path, workspace, monkeypatch):
    monkeypatch.setattr(base_back.load_bundled("patterns"), "SECONDS", 0.5)

    def long_names(name, stem, given):
        return given | {"sample_ids": np.char.add("a" * 50, np.char.replace(given["sample_ids"], "/", "-"))}

    take_in(workspace, write(tmp_path / "given", change=long_names))
    config = load_config(PROJECT / "configs" / "votes.yaml", overrides=["dataset.group_regex=^(?:a+)+(x)$"])
    with pytest.raises(ConfigError, match=r"dataset.group_regex: .* does not end within .* such as"):
        build_commands.build_ensemble(config, workspace)
    assert not workspace.crossfit_folds.exists()


@pytest.fixture
def store(tmp_path):
    """Make a store of 45 train and 15 val images, `<number>.png`, of three classes in turn."""

    def make(*, seed=0, regex=None, digest="0", copies=(), groups=None, label_of=lambda number: number % 3):
        (tmp_path / "image_set.json").write_text(json.dumps({"classes": None, "groups": groups or {}}))
        samples = {}
        for split, numbers in (("train", range(45)), ("val", range(45, 60))):
            ids = tuple(f"{number:02d}.png" for number in numbers)
            contents = tuple("copy" if sample_id in copies else sample_id for sample_id in ids)
            samples[split] = Samples(split, ids, np.array([label_of(number) for number in numbers]), contents)
        return SimpleNamespace(
            config=SimpleNamespace(dataset=SimpleNamespace(group_regex=regex), seed=seed),
            catalog=SimpleNamespace(splits={"train": {"digest": digest}, "val": {"digest": "1"}}),
            workspace=SimpleNamespace(split_dir=tmp_path, crossfit_folds=tmp_path / "folds.npz"),
            samples=samples.get,
        )

    return make


def test_every_class_is_spread_evenly_over_five_folds(store):
    found = folds.crossfit_folds(store())
    assert set(found) == {("train" if number < 45 else "val", f"{number:02d}.png") for number in range(60)}
    counts = np.zeros((5, 3), dtype=int)
    for (_, sample_id), fold in found.items():
        counts[fold, int(sample_id[:2]) % 3] += 1
    assert (counts == 4).all()


def test_classes_of_single_images_are_not_all_in_one_fold(store):
    found = folds.crossfit_folds(store(label_of=lambda number: max(0, number - 54)))
    assert len({found["val", f"{number}.png"] for number in range(55, 60)}) > 2
    assert np.ptp(np.bincount(list(found.values()))) <= 2


def test_copies_and_groups_of_both_splits_share_a_fold(store):
    copies = ("03.png", "10.png", "50.png")
    groups = {"train": {"20.png": "p", "31.png": "p"}, "val": {"51.png": "p", "52.png": "q"}}
    for seed in range(3):
        found = {name: fold for (_, name), fold in folds.crossfit_folds(store(copies=copies, seed=seed)).items()}
        assert len({found[name] for name in copies}) == 1
        found = {name: fold for (_, name), fold in folds.crossfit_folds(store(groups=groups, seed=seed)).items()}
        assert found["20.png"] == found["31.png"] == found["51.png"]


@pytest.mark.parametrize("count", [2, 5])
def test_up_to_five_groups_are_folds(store, count):
    rows = {f"{number:02d}.png": str(number // 10) for number in range(60)}
    groups = {split: {name: min(group, str(count - 1)) for name, group in rows.items()} for split in ("train", "val")}
    found = folds.crossfit_folds(store(groups=groups))
    assert {(groups["train"][name], fold) for (_, name), fold in found.items()} == {(str(n), n) for n in range(count)}


def test_six_groups_are_five_folds(store):
    groups = {split: {f"{n:02d}.png": str(n // 10) for n in range(60)} for split in ("train", "val")}
    found = folds.crossfit_folds(store(groups=groups))
    assert sorted(np.bincount(list(found.values()))) == [10, 10, 10, 10, 20]


@pytest.mark.parametrize("groups", [None, {"train": {"20.png": "p", "32.png": "p"}}])
def test_stored_folds_are_kept_until_images_seed_or_groups_change(store, groups):
    first = folds.crossfit_folds(store(groups=groups))
    path = store().workspace.crossfit_folds
    with np.load(path) as arrays:
        np.savez(path, **{**arrays, "fold": arrays["fold"] + 10})
    kept = path.read_bytes()
    assert folds.crossfit_folds(store(groups=groups)) == {key: fold + 10 for key, fold in first.items()}
    other_groups = {"train": {"20.png": "p", "31.png": "p"}}
    for changed in ({"seed": 1}, {"regex": "^(0)"}, {"digest": "other"}, {"groups": other_groups}):
        path.write_bytes(kept)
        assert set(folds.crossfit_folds(store(**{"groups": groups} | changed)).values()) == set(range(5))
