"""The mean of really trained fold networks beside the full network of each member."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from stored_predictions import CONFIG, workspace_at

from utils.building import embedding_rows
from utils.core import engines, worker_processes
from utils.core.config_file import load_config
from utils.core.errors import UserError
from utils.discovery import discover
from utils.numeric.metrics import softmax
from utils.predictions import catalog, extraction, fold_networks, streaming
from utils.predictions.store import Store

NAME = "CustomConvNeXt"


@pytest.fixture(scope="module")
def config():
    return load_config(CONFIG, overrides=["device=cpu"])


@pytest.fixture(scope="module")
def discovered(tmp_path_factory, trained, config) -> Path:
    """One member of three, which is what these tests run, after `discover`."""
    left_out = shutil.ignore_patterns("Data", "deployment_models")
    base = Path(shutil.copytree(trained, tmp_path_factory.mktemp("discovered") / "w", ignore=left_out))
    for path in (base / "checkpoints").glob("*.pth"):
        if not path.name.startswith(NAME):
            path.unlink()
    discover.discover(config, workspace_at(base))
    return base


@pytest.fixture
def store(tmp_path, discovered, config):
    workspace = workspace_at(Path(shutil.copytree(discovered, tmp_path / "w")))
    return Store(config, workspace, catalog.load(workspace))


def outputs(store, member, stage, split):
    batches = streaming.stream(
        member.network(store.workspace, stage=stage),
        [store.images(split)],
        batch_size=64,
        device="cpu",
        image_cache=store.workspace.image_cache,
        decoding_threads=1,
        val=None,
    )
    return np.concatenate([batch.logits for batch in batches])


def test_the_mean_of_the_fold_networks_is_stored_beside_the_full_network(store):
    member = store.catalog.members[NAME]
    assert fold_networks.stages(member) == ("fold0", "fold1")
    fold_networks.ensure(store, [member], ("val", "test"), "folds")
    for split in ("val", "test"):
        found = fold_networks.rows(store, member, split, "folds")
        full = fold_networks.rows(store, member, split, "full")
        expected = np.mean([softmax(outputs(store, member, stage, split)) for stage in ("fold0", "fold1")], axis=0)
        np.testing.assert_allclose(softmax(found.logits), expected, atol=1e-6)
        assert found.sample_ids.tolist() == full.sample_ids.tolist()
        assert np.abs(softmax(full.logits) - expected).max() > 0.01
    assert fold_networks.aligned(store, [member], "val", "folds").inference == "folds"
    joined = fold_networks.out_of_sample(store, [member], "folds")
    np.testing.assert_array_equal(
        joined.logits[0, joined.split == "val"], fold_networks.rows(store, member, "val", "folds").logits
    )
    np.testing.assert_array_equal(
        joined.logits[:, joined.split == "train"],
        fold_networks.out_of_sample(store, [member], "full").logits[:, joined.split == "train"],
    )


def test_nothing_is_run_twice_and_a_changed_fold_network_is_refused(store, monkeypatch):
    member = store.catalog.members[NAME]
    fold_networks.ensure(store, [member], ("val",), "folds")
    path = store.workspace.checkpoint(NAME, "fold1")
    path.write_bytes(path.read_bytes() + b" ")
    with pytest.raises(UserError, match=r"fold1\.pth: changed since discovery"):
        fold_networks.ensure(store, [member], ("val", "test"), "folds")
    monkeypatch.setattr(streaming, "stream", lambda *_, **__: pytest.fail("a network was run again"))
    fold_networks.ensure(store, [member], ("val",), "folds")


def test_other_fold_networks_are_other_members_to_whoever_asks_for_them_alone(store):
    member = store.catalog.members[NAME]
    others = [entry | {"sha256": "0"} if entry["stage"] == "fold1" else entry for entry in member.checkpoints]
    changed = replace(member, checkpoints=tuple(others))
    assert fold_networks.digest(changed, "full") == fold_networks.digest(member, "full") == member.digest
    assert fold_networks.digest(changed, "folds") != fold_networks.digest(member, "folds")
    assert fold_networks.key(store, changed, "val", "folds") != fold_networks.key(store, member, "val", "folds")


def test_without_every_fold_network_there_is_no_mean(store):
    member = store.catalog.members[NAME]
    one = tuple(entry for entry in member.checkpoints if entry["stage"] != "fold1")
    assert fold_networks.stages(replace(member, checkpoints=one)) == ()
    assert fold_networks.stages(replace(member, oof=None)) == ()  # refused predictions speak for no network


def example_member(**options):
    checkpoints = tuple(
        {"path": f"{stage}.pth", "stage": stage, "sha256": stage * 4} for stage in ("final", "fold1", "fold0")
    )
    known = {"oof": {"folds": 2}, "recorded_accuracy": None, "digest": "d", "exports": (), "metrics": None}
    return catalog.Member("m", "Net", "tiny", 32, ("a", "b"), checkpoints, **(known | options))


def test_the_networks_that_answer_follow_from_inference_and_embeddings():
    member = example_member()
    assert fold_networks.answering(member, "full") == (None,)
    assert fold_networks.answering(member, "full", embeddings=True) == (None,)
    assert fold_networks.answering(member, "folds") == ("fold0", "fold1")
    assert fold_networks.answering(member, "folds", embeddings=True) == (None, "fold0", "fold1")


@pytest.mark.parametrize("inference", ["full", "folds"])
def test_an_ensemble_knows_the_members_that_are_missing_and_those_that_have_changed(inference):
    member = example_member()
    digests = {name: fold_networks.digest(member, inference) for name in ("a", "b", "c", "unused")}
    ensemble = SimpleNamespace(members=("a", "b", "c"), member_digests=digests, inference=inference)
    assert fold_networks.missing_and_changed(dict.fromkeys("abc", member), ensemble) == ([], [])
    now = {"a": member, "b": example_member(digest="other")}
    assert fold_networks.missing_and_changed(now, ensemble) == (["c"], ["b"])


def test_the_mean_of_networks_is_that_of_their_probabilities_whatever_the_batches():
    logits = np.random.default_rng(0).normal(size=(3, 5, 4)).astype(np.float32) * 10
    mean = fold_networks.FoldMean(5, 4)
    for network in logits:
        mean.add(network[:2])
        mean.add(network[2:], start=2)
    probabilities = np.exp(logits.astype(float)) / np.exp(logits.astype(float)).sum(axis=2, keepdims=True)
    found = mean.mean(3)
    assert found.dtype == np.float32
    np.testing.assert_allclose(np.exp(found), probabilities.mean(axis=0), atol=1e-6)


@pytest.mark.skipif(worker_processes.start_method() != "fork", reason="members are divided among forks only")
def test_members_are_divided_among_processes_with_equal_bytes(tmp_path, trained, config, monkeypatch):
    left_out = shutil.ignore_patterns(
        "Data", "deployment_models", "*_snapshot?.pth", "*_best.pth", "CustomConvNeXt_*.pth"
    )
    monkeypatch.setattr(worker_processes, "START_SECONDS", dict.fromkeys(worker_processes.START_SECONDS, 0.0))
    found = {}
    for cores in (1, 2):
        monkeypatch.setattr(engines, "cores", lambda cores=cores: cores)
        workspace = workspace_at(Path(shutil.copytree(trained, tmp_path / f"{cores}", ignore=left_out)))
        discover.discover(config, workspace)
        store = Store(config, workspace, catalog.load(workspace))
        members = [member for member in store.catalog.members.values() if member.source == "trained"]
        assert extraction.n_processes(store, members, "cpu") == cores
        fold_networks.ensure(store, members, ("val",), "folds")
        aligned = embedding_rows.aligned(store, members)
        means = [workspace.fold_predictions(member.name, "val").read_bytes() for member in members]
        found[cores] = means, aligned.facts, aligned.rows
    (means, facts, rows), (other_means, other_facts, other_rows) = found[1], found[2]
    assert means == other_means
    assert facts == other_facts
    assert all(np.array_equal(one, other) for one, other in zip(rows.embeddings, other_rows.embeddings, strict=True))
