"""Cross-fitting folds where no images are there to be looked at."""

from __future__ import annotations

import numpy as np
import pytest
from conftest import PROJECT
from given_predictions import CONFIG, empty_workspace, fewer, take_in, write

from utils import base_back
from utils.building import build_commands
from utils.core.config_file import load_config
from utils.core.errors import ConfigError, UserError
from utils.discovery import import_predictions


@pytest.fixture
def workspace(tmp_path):
    return empty_workspace(tmp_path / "w")


def test_a_class_with_one_row_cannot_be_cross_fitted(tmp_path, workspace):
    def one_cat(name, stem, given):
        cats = np.flatnonzero(given["labels"] == 2)
        return fewer(np.setdiff1d(np.arange(30), cats[1:]))(given)

    take_in(workspace, write(tmp_path / "given", stems=("val",), change=one_cat))
    with pytest.raises(UserError, match="one group of samples of class cat; cross-fitting needs two"):
        build_commands.build_ensemble(CONFIG, workspace)


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
