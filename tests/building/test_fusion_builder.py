"""`fusion-train` by its command line, on really trained networks; which embeddings heads may be fitted on."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from conftest import PROJECT
from stored_predictions import workspace_at

from utils.building import embedding_rows, fusion_builder
from utils.building.builder_protocol import Session
from utils.core.config_file import load_config
from utils.core.errors import UserError
from utils.predictions import catalog, extraction
from utils.predictions.store import Store

pytestmark = pytest.mark.usefixtures("short_searches")

METHODS = ("concat_mlp", "attention", "bilinear", "cca_aligned")
QUICK = (
    *("--config", "configs/votes.yaml", "--set", "runs.fusion.enable=true"),
    *("--set", "runs.fusion.fusion_config.hidden_dims=[16]", "--set", "runs.fusion.fusion_config.epochs=2"),
    *("--set", "runs.meta_fuser.enable=true", "--set", "runs.meta_fuser.fuser_type=attention"),
    *("--set", "runs.meta_fuser.input_ensembles=[soft_voting,fusion_concat_mlp]"),
    *("--set", "runs.meta_fuser.mlp_config.epochs=4"),
)
ONE = ("--set", "runs.fusion.fusion_methods=[concat_mlp]")


@pytest.fixture(scope="module")
def fused(tmp_path_factory, built, orchestrator) -> Path:
    """A built workspace after `fusion-train` and `meta-fuse`. Shared: read it, never write into it."""
    workspace = Path(shutil.copytree(built, tmp_path_factory.mktemp("fused") / "workspace"))
    for command in ("fusion-train", "meta-fuse"):
        done = orchestrator(command, *QUICK, workspace=workspace)
        assert done.returncode == 0, done.stderr
    return workspace


@pytest.fixture
def own(tmp_path, fused) -> Path:
    return Path(shutil.copytree(fused, tmp_path / "workspace"))


def record(workspace: Path, name: str) -> dict:
    return json.loads((workspace / "ensembles" / "models" / name / "ensemble.json").read_text())


def opened(workspace: Path, *overrides: str) -> tuple[Store, list]:
    config = load_config(
        PROJECT / "configs" / "votes.yaml", overrides=["device=cpu", "runs.fusion.enable=true", *overrides]
    )
    found = catalog.read(workspace_at(workspace))
    store = Store(config, workspace_at(workspace), found)
    return store, [member for member in found.members.values() if member.source == "trained"]


@pytest.mark.parametrize("method", METHODS)
def test_each_is_saved_beside_its_guards_with_the_rows_it_was_fitted_on(fused, method):
    found = record(fused, f"fusion_{method}")
    source = found["train_embeddings"]
    assert source["asked"] == "auto"
    assert set(source["val_log_loss"]) == {"val", "aligned"}
    assert source["chosen"] == ("val" if source["gain_of_val"]["ci95"][0] > 0 else "aligned")
    assert set(source["train_log_loss"]) == {"val", "aligned"}
    assert found["crossfit"]["n"] == 252
    own = {("val", "held_out"), *([("train", "oof")] if source["chosen"] == "aligned" else [])}
    assert {(part["split"], part["rows"]) for part in found["fitted_on"]} == {("train", "in_sample"), *own}
    assert own <= {(part["split"], part["rows"]) for part in found["selected_on"]}
    assert set(found["guards"]) > {"best_single", "soft_voting", "greedy_selection"}
    assert "log-loss" in found["verdict"]
    assert min(facts["agreement"] or 1 for facts in source["members"]["aligned"].values()) > 0.3


def test_embeddings_of_fold_networks_are_kept_and_stand_in_the_full_networks_space(fused):
    store, members = opened(fused)
    found = embedding_rows.aligned(store, members)
    train = found.rows.split == "train"
    assert train.sum() == 224
    assert found.rows.out_of_sample.all()
    for member, embeddings in zip(members, found.rows.embeddings, strict=True):
        kept = json.loads(store.workspace.embeddings_record(member.name, "train").read_text())
        assert kept["rows"] == "oof"
        assert len(kept["explained"]) == 2
        # The full network, which has seen these rows, does not say the same of them, but nearly.
        extraction.ensure(store, [member], ("train",))
        seen = store.rows(member, "train", embeddings=True).embeddings
        order = np.argsort(found.rows.sample_ids[train])
        assert np.array_equal(order, np.arange(224))
        correlation = np.corrcoef(embeddings[train].ravel(), np.asarray(seen).ravel())[0, 1]
        assert 0.3 < correlation < 0.999


def test_a_rotation_between_train_and_inference_is_caught(fused):
    store, members = opened(fused)
    name = members[0].name
    val = store.rows(members[0], "val", embeddings=True)
    train = store.rows(members[0], "test", embeddings=True)
    assert embedding_rows.require_shared_space(name, train, val) > 0.5
    width = val.embeddings.shape[1]
    turned = np.linalg.qr(np.random.default_rng(0).normal(size=(width, width)))[0]
    with pytest.raises(UserError, match=rf"member {name}: .*not of the space of its val rows.*train_embeddings=val"):
        embedding_rows.require_shared_space(name, replace(train, embeddings=train.embeddings @ turned), val)


def test_pooling_the_fold_networks_as_they_are_is_refused(own, monkeypatch):
    store, members = opened(own)
    for path in (own / "ensembles" / "fusion_embeddings").glob("*/train*"):
        path.unlink()

    class Identity:
        explained = 1.0

        def apply(self, values):
            return values

    real = embedding_rows.fit_ridge_map
    monkeypatch.setattr(
        embedding_rows, "fit_ridge_map", lambda one, two: Identity() if one.shape == two.shape else real(one, two)
    )
    with pytest.raises(UserError, match="Embeddings of several fold networks cannot be pooled"):
        embedding_rows.aligned(store, members)


def test_a_second_run_keeps_them_and_needs_no_torch(own, orchestrator):
    again = orchestrator("fusion-train", *QUICK, "--json", workspace=own)
    assert json.loads(again.stdout)["built"] == []
    changed = orchestrator("fusion-train", *QUICK, *ONE, "--set", "runs.fusion.seeds=2", "--json", workspace=own)
    assert json.loads(changed.stdout)["built"] == ["fusion_concat_mlp"]


def test_a_fuser_takes_a_fusion_and_evaluate_scores_both(own, orchestrator):
    assert record(own, "meta_fuser")["inputs"] == ["fusion_concat_mlp", "soft_voting"]
    done = orchestrator("evaluate", *QUICK, "--json", workspace=own)
    assert done.returncode == 0, done.stderr
    names = {row["name"] for row in json.loads(done.stdout)["rows"]}
    assert {"meta_fuser", *(f"fusion_{method}" for method in METHODS)} <= names
    refused = orchestrator("evaluate", *QUICK, "--split", "val", "--model-name", "fusion_attention", workspace=own)
    assert refused.returncode == 3


def test_in_sample_is_marked_and_judged_on_val(own, orchestrator):
    wanted = (*QUICK, *ONE, "--set", "runs.fusion.train_embeddings=in_sample")
    done = orchestrator("fusion-train", *wanted, workspace=own)
    assert done.returncode == 0, done.stderr
    assert "in_sample: heads are fitted on embeddings of images that the networks were trained on" in done.stderr
    found = record(own, "fusion_concat_mlp")
    assert {(part["split"], part["rows"]) for part in found["fitted_on"]} == {("train", "in_sample")}
    assert found["crossfit"]["n"] == 28
    assert found["train_embeddings"]["chosen"] == "in_sample"


def test_without_fold_networks_val_is_taken_and_aligned_is_refused_by_name(own, orchestrator):
    (own / "checkpoints" / "CustomViTHybrid_fold0.pth").unlink()
    orchestrator("discover", workspace=own)
    done = orchestrator("fusion-train", *QUICK, *ONE, workspace=own)
    assert done.returncode == 0, done.stderr
    source = record(own, "fusion_concat_mlp")["train_embeddings"]
    assert source["chosen"] == "val"
    assert "no complete set of fold networks: CustomViTHybrid" in source["reason"]
    wanted = (*QUICK, *ONE, "--set", "runs.fusion.train_embeddings=aligned")
    refused = orchestrator("fusion-train", *wanted, workspace=own)
    assert refused.returncode == 1
    for words in ("CustomViTHybrid", "--stages kfold", "runs.fusion.train_embeddings=val"):
        assert words in refused.stderr


def test_another_fold_network_under_the_same_name_is_found(own):
    store, members = opened(own)
    member = members[0]
    rows = store.oof(member)
    inside = rows.fold == 1
    part = replace(rows, sample_ids=rows.sample_ids[inside], logits=rows.logits[inside])
    with pytest.raises(UserError, match=r"fold0 does not give the out-of-fold predictions of its rows"):
        embedding_rows._embeddings(store, member, 0, part)


def test_embeddings_of_another_checkpoint_or_shape_are_refused(own):
    store, members = opened(own)
    place = store.workspace.embeddings_record(members[0].name, "val")
    kept = json.loads(place.read_text())
    place.write_text(json.dumps(kept | {"key": "of another checkpoint"}))
    with pytest.raises(UserError, match=r"val\.npy: embeddings of another checkpoint.*run the command again"):
        store.rows(members[0], "val", embeddings=True)
    place.write_text(json.dumps(kept))
    file = store.workspace.embeddings(members[0].name, "val")
    np.save(file, np.load(file)[:5])
    with pytest.raises(UserError, match=r"val\.npy: embeddings of shape \(5, \d+\) for 28 rows\."):
        store.rows(members[0], "val", embeddings=True)


def test_a_member_without_embeddings_is_left_out_and_one_alone_is_no_fusion(own):
    store, members = opened(own)
    path = store.workspace.predictions(members[0].name, "val") / "record.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"width": 0}))
    builder = fusion_builder.FusionBuilder()
    left = builder.members(Session(store, tuple(members)))
    assert [member.name for member in left] == [member.name for member in members[1:]]
    with pytest.raises(UserError, match=rf"1 member\(s\) with embeddings.*no embeddings of {members[0].name}"):
        builder.check(Session(store, tuple(members[:2])))


def test_extraction_that_is_switched_off_names_what_is_missing(own, orchestrator):
    shutil.rmtree(own / "ensembles" / "predictions" / "CustomConvNeXt" / "test")
    wanted = (*QUICK, *ONE, "--force", "--set", "runs.fusion.extract_embeddings=false")
    refused = orchestrator("fusion-train", *wanted, workspace=own)
    assert refused.returncode == 1
    assert "1 are not there, first CustomConvNeXt/test" in refused.stderr
