"""Ensembles of every kind that `export` takes besides votes: imported ones, and what is learned from embeddings."""

from __future__ import annotations

import json

import numpy as np
import onnxruntime
import pytest
from export_runs import folder_of, run
from finished_workspace import CONFIG, at
from in_process import run as command_line

from utils.building import build_commands
from utils.core.artifacts import read_json
from utils.core.config_file import load_config
from utils.core.errors import UserError
from utils.discovery import import_predictions

SET = (
    "runs.stacking={enable: true, meta_learners: [xgb]}",
    "runs.fusion={enable: true, fusion_methods: [cca_aligned], fusion_config: {hidden_dims: [8], epochs: 2}}",
    "runs.moe={enable: true, num_experts: 3, epochs: 2}",
    "runs.cascade.enable=true",
    "runs.meta_fuser.enable=true",
    "runs.meta_fuser.input_ensembles=[soft_voting, stacking_xgb, fusion_cca_aligned]",
    "exports.enable=true",
)
LEARNED = ("--quiet", *(word for value in SET for word in ("--set", value)))


@pytest.mark.slow
def test_what_reads_embeddings_and_what_runs_few_members_is_exported(own_copy):
    """By the commands, from the members' networks to files that answer as `evaluate` would."""
    for command in ("stack", "fusion-train", "meta-fuse"):
        assert command_line(command, "--config", CONFIG, *LEARNED, workspace=own_copy).code in (0, 4)
    for name in ("fusion_cca_aligned", "moe", "cascade", "meta_fuser"):
        typed = ("export", "--config", CONFIG, *LEARNED, "--model-name", name, "--formats", "torchscript", "onnx")
        done = command_line(*typed, "--json", workspace=own_copy)
        assert done.code == 0, done.stderr
        for kind in ("torchscript", "onnx"):
            entry = done.document["formats"][kind]
            assert entry["parity"]["max_abs_diff"] < 1e-4
            assert ("combiner" in entry["parity"]) == (name != "fusion_cca_aligned")


def test_an_ensemble_of_imported_members_exports_its_combiner_alone(tmp_path):
    """Class names with commas, quotes and letters of any script come through."""
    classes = ("leaf, spotted", 'the "healthy" one', "zdravý 葉")
    base, names = tmp_path / "workspace", ("forest", "notebook")
    base.mkdir()
    rng = np.random.default_rng(1)
    for split, count in (("oof", 90), ("val", 40), ("test", 70)):
        labels = np.arange(count) % 3
        for name in names:
            logits = rng.normal(size=(count, 3)).astype(np.float32)
            logits[np.arange(count), labels] += 1
            given = {"labels": labels, "sample_ids": np.array([f"{split}{n:03d}" for n in range(count)])}
            given |= {"fold": np.arange(count) % 5} if split == "oof" else {}
            (tmp_path / "given" / name).mkdir(parents=True, exist_ok=True)
            np.savez(tmp_path / "given" / name / f"{split}.npz", logits=logits, classes=np.array(classes), **given)
    config = load_config(CONFIG, overrides=["exports.enable=true"])
    import_predictions.import_predictions(config, at(base), folder=str(tmp_path / "given"))
    build_commands.build_ensemble(config, at(base))
    result = run(base, "hard_voting_ensemble", "torchscript", "onnx")
    assert result.failures == []
    folder = folder_of(base, "hard_voting_ensemble")
    assert list(read_json(folder / "class_mapping.json", remedy="").values()) == list(classes)
    session = onnxruntime.InferenceSession(str(folder / "onnx" / "hard_voting_ensemble.onnx"))
    assert json.loads(session.get_modelmeta().custom_metadata_map["classes"]) == list(classes)
    assert [(given.name, given.shape) for given in session.get_inputs()] == [("member_logits", ["batch", 2, 3])]
    with pytest.raises(UserError, match="imported predictions and no network to export"):
        run(base, "forest")
