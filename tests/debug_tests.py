"""The system in one sitting, from trained networks to a package: `cd tests && pytest debug_tests.py -v`.

A workspace of sixteen images is made and three small networks are trained on it, as `debug --fast` does. Then every
command is typed in the order of the specification, and each test shows what it leaves behind. Read from the top.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from in_process import run
from short_fits import short_searches

from ensemble_orchestrator import COMMANDS
from utils.core.workspace import SPLITS, Workspace
from utils.operations import debug_sandbox
from utils.operations.debug_plan import SECTIONS
from utils.predictions import catalog, streaming

SMALL = tuple(word for value in debug_sandbox.SYNTHETIC_SETTINGS for word in ("--set", value))
"""The printed configuration, for images of 32 pixels."""


@pytest.fixture(scope="module")
def folder(synthetic, tmp_path_factory) -> Path:
    """A copy of three backbones, trained for one epoch and two folds by the bundled base pipeline."""
    return Path(shutil.copytree(synthetic, tmp_path_factory.mktemp("tutorial") / "workspace"))


@pytest.fixture(scope="module")
def workspace(folder) -> Iterator[Workspace]:
    """Its file names, after discovery."""
    done = run("discover", *SMALL, workspace=folder)
    assert done.code == 0, done.stderr
    names = ("split_dataset", "checkpoints", "metrics_output", "kfold_results", "deployment_models", "cache", "logs")
    with short_searches():
        yield Workspace(folder, *(folder / name for name in names))


def typed(name: str, section: str, workspace: Workspace, *options: str):
    """A command with what `debug` sets for one of its sections."""
    values = [*SECTIONS[section].settings, *SECTIONS[section].quick_settings]
    overrides = [word for value in values for word in ("--set", value)]
    done = run(name, *options, *SMALL, *overrides, workspace=workspace.base)
    assert done.code == 0, done.stderr
    return done


def needs(command: str):
    return pytest.mark.skipif(command not in COMMANDS, reason=f"this version has no command {command}")


def test_discovery_finds_the_trained_networks_and_their_out_of_fold_predictions(workspace):
    found = catalog.read(workspace)
    trained = {name: member for name, member in found.members.items() if member.source == "trained"}
    assert sorted(trained) == list(debug_sandbox.BACKBONES)
    assert found.classes == debug_sandbox.CLASSES
    assert {split: found.splits[split]["n"] for split in SPLITS} == {"train": 12, "val": 2, "test": 2}
    for member in trained.values():
        assert member.usable
        assert member.oof["rows"] == 12
        assert member.oof["folds"] == 2


@pytest.mark.parametrize("name", debug_sandbox.BACKBONES)
def test_a_model_is_loaded_with_its_weights_and_answers(workspace, name):
    import torch

    member = catalog.read(workspace).members[name]
    with streaming.network_on_device(member.network(workspace), "cpu") as (answer, place):
        logits = answer(place(torch.zeros(2, 3, 32, 32)))
    assert logits.shape == (2, len(debug_sandbox.CLASSES))
    assert torch.isfinite(logits).all()


def test_predictions_are_extracted_once_and_lie_on_disk(workspace):
    typed("build-ensemble", "build_ensemble", workspace, "--set", "runs.model_soup.methods=[uniform]")
    for name in debug_sandbox.BACKBONES:
        for split in ("val", "test"):
            arrays = workspace.predictions(name, split)
            assert np.load(arrays / "logits.npy").shape == (2, 2)
            assert np.load(arrays / "sample_ids.npy")[0].startswith("bright/")
            assert np.load(workspace.embeddings(name, split)).shape[0] == 2


def test_an_ensemble_is_a_combiner_with_the_proof_of_what_it_was_fitted_on(workspace):
    folder = workspace.ensemble("weighted_ensemble")
    record = json.loads((folder / "ensemble.json").read_text())
    assert set(record["members"]) <= set(debug_sandbox.BACKBONES)  # those without weight are left out
    assert sum(record["weights"].values()) == pytest.approx(1)
    fitted = {(part["split"], part["rows"]) for part in record["fitted_on"]}
    assert {("train", "oof"), ("val", "held_out")} <= fitted
    assert "test" not in {split for split, _ in fitted}
    with np.load(folder / "crossfit.npz") as unseen:
        assert unseen["probabilities"].sum(axis=1) == pytest.approx(np.ones(14))


def test_stacking_reads_out_of_fold_predictions(workspace):
    typed("stack", "stack", workspace)
    for learner in ("lr", "xgb", "mlp"):
        record = json.loads((workspace.ensemble(f"stacking_{learner}") / "ensemble.json").read_text())
        assert "oof" in {part["rows"] for part in record["fitted_on"]}
        assert not {part["split"] for part in record["fitted_on"]} & {"test"}


@needs("fusion-train")
def test_fusion_trains_a_head_on_embeddings(workspace):
    typed("fusion-train", "fusion_train", workspace)
    for method in ("concat_mlp", "attention", "bilinear", "cca_aligned"):
        assert (workspace.ensemble(f"fusion_{method}") / "ensemble.json").is_file()


def test_evaluation_ranks_members_and_ensembles_and_recommends_one(workspace):
    done = run("evaluate", "--json", *SMALL, workspace=workspace.base)
    assert done.code == 0, done.stderr
    ranking = json.loads(workspace.ranking("test").read_text())
    names = [row["name"] for row in ranking["rows"]]
    assert {"soft_voting_ensemble", "stacking_lr", *debug_sandbox.BACKBONES} <= set(names)
    assert ranking["recommended"]["name"] in names
    assert not any(row["contaminated"] for row in ranking["rows"])


@needs("export")
def test_an_exported_ensemble_is_loaded_again_and_agrees(workspace):
    typed("export", "export", workspace, "--model-name", "soft_voting_ensemble", "--formats", "onnx")
    package = workspace.exports / "soft_voting_ensemble"
    status = json.loads((package / "export_status.json").read_text())
    assert status["onnx"]["status"] == "ok"
    assert status["onnx"]["parity"]["label_flips"] == 0
    for name in ("metadata.json", "class_mapping.json", "checksums.json"):
        assert (package / name).is_file()


def test_every_section_of_debug_stands_in_the_command_line():
    from utils.commands import DEBUG_SECTIONS

    assert tuple(SECTIONS) == DEBUG_SECTIONS
    assert (*SECTIONS, "all", "reset") == tuple(COMMANDS["debug"].arguments["--section"]["choices"])
