"""Fusion of members known by their predictions alone: one fixed network's embeddings, and those of fold networks."""

from __future__ import annotations

import json

import pytest
from conftest import PROJECT
from embedded_members import embedded
from given_predictions import empty_workspace, take_in, write

from utils.building import build_commands
from utils.core.config_file import load_config
from utils.core.errors import UserError

OVERRIDES = (
    *("device=cpu", "runs.fusion.enable=true", "runs.fusion.fusion_methods=[concat_mlp]"),
    *("runs.fusion.fusion_config.hidden_dims=[8]", "runs.fusion.fusion_config.epochs=6"),
)


def config(*overrides):
    return load_config(PROJECT / "configs" / "votes.yaml", overrides=[*OVERRIDES, *overrides])


@pytest.fixture
def workspace(tmp_path):
    return empty_workspace(tmp_path / "w")


def source(workspace):
    return json.loads((workspace.ensemble("fusion_concat_mlp") / "ensemble.json").read_text())["train_embeddings"]


def test_embeddings_of_one_fixed_network_are_taken_as_they_are(workspace, tmp_path):
    take_in(workspace, write(tmp_path / "given", change=embedded(per_fold=False)))
    build_commands.fusion_train(config("runs.fusion.train_embeddings=aligned"), workspace)
    found = source(workspace)
    assert found["chosen"] == "aligned"
    assert min(facts["agreement"] for facts in found["members"]["aligned"].values()) > 0.99


def test_embeddings_of_fold_networks_are_not_pooled(workspace, tmp_path):
    take_in(workspace, write(tmp_path / "given", change=embedded(per_fold=True)))
    with pytest.raises(UserError, match="Embeddings of several fold networks cannot be pooled"):
        build_commands.fusion_train(config("runs.fusion.train_embeddings=aligned"), workspace)
    build_commands.fusion_train(config(), workspace)
    found = source(workspace)
    assert found["chosen"] == "val"
    assert "cannot be pooled" in found["reason"]


def test_members_without_embeddings_are_named(workspace, tmp_path):
    def some(name, stem, given):
        return embedded(per_fold=False)(name, stem, given) if name == "bayes" else given

    take_in(workspace, write(tmp_path / "given", change=some))
    with pytest.raises(UserError, match=r"1 member\(s\) with embeddings.*no embeddings of forest, linear"):
        build_commands.fusion_train(config(), workspace)
