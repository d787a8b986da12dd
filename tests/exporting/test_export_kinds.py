"""Ensembles of every kind that `export` takes besides votes: imported ones, and what is learned from embeddings."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import onnx
import onnxruntime
import pytest
from export_runs import folder_of, run
from finished_workspace import CONFIG, at
from in_process import run as command_line

from utils.building import build_commands, ensembles
from utils.combiners.convex_pool import ConvexPool
from utils.core.artifacts import read_json
from utils.core.config_file import load_config
from utils.core.errors import UserError
from utils.discovery import import_predictions
from utils.meta_methods import FuserInput, MetaFuserCombiner
from utils.predictions import catalog

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


CONVEX = (
    *("runs.stacking={enable: true, meta_learners: [lr]}", "runs.meta_fuser.enable=true", "runs.moe.enable=true"),
    *("runs.meta_fuser.fuser_type=convex", "runs.meta_fuser.input_ensembles=all", "exports.enable=true"),
    *("pruning.enable=true", "pruning.methods=[greedy_forward]", "pruning.target_size=2", "runs.moe.epochs=2"),
)


@pytest.mark.slow
def test_a_convex_fuser_is_one_graph_without_the_networks_of_inputs_without_weight(own_copy):
    """Built, evaluated, predicted, exported and taught by the commands; then without an input that has a member."""
    workspace, options = at(own_copy), ("--config", CONFIG, "--quiet", *(w for v in CONVEX for w in ("--set", v)))
    for command in ("build-ensemble", "stack", "fusion-train", "meta-fuse", "evaluate"):
        done = command_line(command, *options, "--json", workspace=own_copy)
        assert done.code == 0, done.stderr
    entry = read_json(workspace.ensemble_metrics("meta_fuser", "test"), remedy="")
    assert entry["latency_ms"]["batch_1"]["p50"] > 0
    teach = ("--set", "distillation.teacher=meta_fuser", "--set", "distillation.student=CustomRegNet")
    quick = ("--set", "distillation.enable=true", "--set", "distillation.epochs=1")
    taught = command_line("distill", *options, *teach, *quick, workspace=own_copy)
    assert taught.code == 0, taught.stderr
    export = ("export", *options, "--model-name", "meta_fuser", "--formats", "torchscript", "onnx", "--json")
    assert_exact(command_line(*export, workspace=own_copy))
    pruned, voting = (ensembles.load(workspace, name) for name in ("pruned_greedy_forward", "soft_voting_ensemble"))
    fused = ensembles.load(workspace, "meta_fuser")
    names = voting.members
    inputs = [
        FuserInput(each.method, each.combiner, np.array([names.index(name) for name in each.members]), name=each.name)
        for each in (pruned, voting)
    ]
    sizes = {}
    for weight in (0.5, 0.0):
        pool = ConvexPool(weights=np.array([1 - weight, weight]), temperature=0.8, member_temperatures=np.ones(2))
        fuser = MetaFuserCombiner(inputs, pool, "convex", uniform_weight=0.001)
        used = fuser.used(len(names))
        members = tuple(name for name, needed in zip(names, used, strict=True) if needed)
        again = replace(fused, members=members, combiner=fuser.restricted(used), inputs_digest=f"by hand {weight}")
        record = ensembles.record_of(workspace, "meta_fuser")
        ensembles.save(workspace, again, ensembles.load_crossfit(workspace, "meta_fuser"), record)
        assert_exact(command_line(*export, "--force", workspace=own_copy))
        graph = onnx.load(folder_of(own_copy, "meta_fuser") / "onnx" / "meta_fuser.onnx").graph
        sizes[weight] = sum(int(np.prod(tensor.dims)) for tensor in graph.initializer)
    (dropped,) = set(names) - set(pruned.members)
    checkpoint = workspace.base / catalog.read(workspace).members[dropped].checkpoints[0]["path"]
    assert sizes[0.5] - sizes[0.0] == pytest.approx(checkpoint.stat().st_size / 4, rel=0.25)  # of float32 numbers


def assert_exact(done):
    """The exported files answer as the ensemble does."""
    assert done.code == 0, done.stderr
    for kind in ("torchscript", "onnx"):
        assert done.document["formats"][kind]["parity"]["max_abs_diff"] < 1e-4
