"""Cross-fitting folds where no images are there to be looked at."""

from __future__ import annotations

import numpy as np
import pytest
from conftest import PROJECT
from given_predictions import CONFIG, empty_workspace, fewer, logged, take_in, write

from utils import base_back
from utils.building import build_commands, ensembles
from utils.core.config_file import load_config
from utils.core.errors import ConfigError, UserError
from utils.discovery import import_predictions


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
