"""Frozen networks: fold checkpoints that hold a head alone, and what follows from the one trunk that they share."""

from __future__ import annotations

import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch
from conftest import PROJECT, write_digits
from pretrained_files import frozen_options, write_weights
from stored_predictions import workspace_at

from utils.building import embedding_rows, end_to_end, ensembles, fitting
from utils.core.config_file import load_config
from utils.core.errors import LeakageError, UserError
from utils.discovery import discover
from utils.predictions import catalog, extraction, fold_networks, image_splits, streaming, training_data
from utils.predictions.fold_networks import FOLDS
from utils.predictions.store import Store

NAME = "small"
CONFIG = load_config(
    PROJECT / "configs" / "votes.yaml", overrides=["device=cpu", f"backbones.include=[{NAME}]", "dataset.img_size=32"]
)


@pytest.fixture(scope="module")
def frozen(tmp_path_factory, base_main):
    """A workspace of one frozen network on weights that saw none of the images, after `discover`."""
    folder = tmp_path_factory.mktemp("frozen")
    weights = write_weights(folder / "small.pth")
    data = write_digits(folder / "raw", classes=(0, 1, 2), per_class=30)
    done = base_main(*frozen_options(weights, data=str(data), trained_on="none"), workspace=folder / "w")
    assert done.returncode == 0, done.stderr
    discover.discover(CONFIG, workspace_at(folder / "w"), verify=True)
    return folder / "w"


@pytest.fixture
def store(tmp_path, frozen):
    workspace = workspace_at(shutil.copytree(frozen, tmp_path / "w"))
    return Store(CONFIG, workspace, catalog.load(workspace))


def member_of(store):
    return store.catalog.members[NAME]


def change(path, alter):
    record = torch.load(path, weights_only=True)
    alter(record)
    torch.save(record, path)


def test_a_frozen_network_is_listed_with_its_trunk_and_what_its_weights_had_seen(store):
    member = member_of(store)
    assert (member.trained_on, member.pretrained_on) == ("train", "none")
    assert ensembles.network_provenance(store, [member]).selected_on == ()  # inner folds of train chose the strength
    assert member.trunk is not None
    assert member.trunk["checkpoint"] == f"{NAME}_final.pth"
    assert not any(problem.severity == "error" for problem in store.catalog.problems)
    assert member.oof["checked"]


def test_fold_networks_answer_from_embeddings_as_they_do_when_they_run(store, monkeypatch):
    member, order = member_of(store), [member_of(store).classes.index(name) for name in store.catalog.classes]
    extraction.ensure(store, [member], ("val",))
    run = []
    stream = streaming.stream
    monkeypatch.setattr(
        streaming, "stream", lambda spec, *a, **k: (run.append(spec.checkpoint.name), stream(spec, *a, **k))[1]
    )
    fold_networks.ensure(store, [member], ("val", "test"), FOLDS)
    assert run == [f"{NAME}_final.pth"]  # test alone was missing; the folds need no pass
    for split in ("val", "test"):
        images = store.images(split)
        mean = fold_networks.FoldMean(len(images.paths), len(order))
        for stage in fold_networks.stages(member):
            batches = stream(
                member.network(store.workspace, stage=stage),
                [images],
                batch_size=64,
                device="cpu",
                image_cache=store.workspace.image_cache,
                decoding_threads=image_splits.decoding_threads(0),
            )
            for batch in batches:
                mean.add(batch.logits[:, order], batch.start)
        stored = fold_networks.rows(store, member, split, FOLDS).logits
        np.testing.assert_allclose(stored, mean.mean(2), atol=1e-4)
        assert np.abs(stored - store.rows(member, split).logits).max() > 1e-2  # not the full network's


def test_train_embeddings_of_an_unseen_trunk_need_no_alignment(store):
    member = member_of(store)
    fold_networks.ensure(store, [member], ("val",), "full")
    assert embedding_rows.reason_not_aligned(store, [member]) is None
    embedded = embedding_rows.aligned(store, [member])
    assert embedded.facts[NAME] == {"agreement": None, "trunk": member.trunk["sha256"], "explained": None}
    train = np.flatnonzero(embedded.rows.split == "train")
    full = store.rows(member, "train", embeddings=True)
    assert embedded.rows.sample_ids[train].tolist() == sorted(full.sample_ids.tolist())
    np.testing.assert_array_equal(embedded.rows.embeddings[0][train], full.embeddings[np.argsort(full.sample_ids)])
    np.testing.assert_array_equal(embedded.rows.logits[0][train], store.oof(member).logits)
    assert fitting.row_sets(embedded.rows)[0].rows == "oof"


def test_weights_that_had_seen_train_images_leave_no_train_row_out_of_sample(store):
    for path in [*store.workspace.checkpoints.glob(f"{NAME}_*.pth")]:
        change(path, lambda record: record["extra"]["weights"].update(trained_on="train"))
    discover.discover(CONFIG, store.workspace)
    seen = Store(CONFIG, store.workspace, catalog.load(store.workspace))
    member = member_of(seen)
    assert (member.trained_on, member.pretrained_on) == ("train", "train")
    extraction.ensure(seen, [member], ("val",))
    assert [part.split for part in seen.out_of_sample_parts([member])[NAME]] == ["val"]
    assert "trained on weights that had seen train images" in embedding_rows.reason_not_aligned(seen, [member])
    assert not training_data.has_train_rows(seen, member)


def test_val_rows_that_a_network_was_trained_on_judge_no_fusion(store):
    listed = replace(store.catalog, members={NAME: replace(member_of(store), trained_on="train+val")})
    seen = store.with_catalog(listed)
    extraction.ensure(seen, [member_of(seen)], ("val",))
    for rows_of in (embedding_rows.of_val, embedding_rows.aligned):
        with pytest.raises(LeakageError, match=f"no val row is out of sample for all of {NAME}"):
            rows_of(seen, [member_of(seen)])
    with pytest.raises(LeakageError, match=rf"val rows choose the epoch, and {NAME} was trained on them"):
        end_to_end.require_networks([member_of(seen)])


def test_weights_of_unknown_origin_can_be_spoken_of_later(store):
    for path in [*store.workspace.checkpoints.glob(f"{NAME}_*.pth")]:
        change(path, lambda record: record["extra"]["weights"].update(trained_on="unknown"))
    result = discover.discover(CONFIG, store.workspace)
    assert f"discover --trained-on {NAME}=train" in result.text
    assert training_data.unknown_names(catalog.load(store.workspace), [NAME]) == [NAME]
    discover.discover(CONFIG, store.workspace, trained_on=[f"{NAME}=none"])
    for _ in range(2):
        member = catalog.load(store.workspace).members[NAME]
        assert (member.trained_on, member.pretrained_on) == ("train", "none")
        discover.discover(CONFIG, store.workspace)


def test_verification_runs_the_trunk_once_and_finds_a_head_that_did_not_make_the_predictions(store, caplog):
    caplog.set_level("INFO", logger="disease_pipeline")
    discover.discover(CONFIG, store.workspace, verify=True, force=True)
    passes = [record.getMessage() for record in caplog.records if record.getMessage().startswith("verify")]
    assert [message for message in passes if "of train" in message] == [f"verify {NAME}: ran on 9 of val, 72 of train"]
    assert catalog.load(store.workspace).members[NAME].oof is not None
    change(store.workspace.checkpoint(NAME, "fold1"), lambda record: record["model_state_dict"]["fc.weight"].add_(1.0))
    discover.discover(CONFIG, store.workspace, verify=True)
    (problem,) = [p for p in catalog.load(store.workspace).problems if p.code == "oof_fold_disagrees"]
    assert problem.message.startswith("out-of-fold predictions refused: fold1 run again differs on")


def test_a_head_of_another_trunk_is_refused_and_both_files_are_named(store):
    member = member_of(store)
    final = store.workspace.checkpoint(NAME, "final")
    fold = store.workspace.checkpoint(NAME, "fold0")
    change(final, lambda record: next(iter(record["model_state_dict"].values())).add_(1.0))
    with pytest.raises(UserError, match=rf"{fold.name}: its head was fitted on the trunk .* and .*{final.name} holds"):
        streaming.open_network(member.network(store.workspace, stage="fold0"))
    final.rename(final.with_name("elsewhere.pth"))
    with pytest.raises(UserError, match=rf"{fold.name}: holds a head alone, and .*{final.name}, .* is gone"):
        streaming.open_network(member.network(store.workspace, stage="fold0"))


@pytest.mark.parametrize("trunk", ["small_final.pth", {"checkpoint": "../x.pth", "sha256": "a"}, {"sha256": "a"}])
def test_a_trunk_of_another_form_is_refused(store, trunk):
    fold = store.workspace.checkpoint(NAME, "fold0")
    change(fold, lambda record: record["extra"].update(trunk=trunk))
    with pytest.raises(UserError, match=r"extra\.trunk is .*; expected the name of a checkpoint in the same folder"):
        streaming.open_network(member_of(store).network(store.workspace, stage="fold0"))


def test_a_head_that_does_not_explain_the_stored_logits_is_not_used(store):
    from utils.predictions import fold_heads

    member = member_of(store)
    extraction.ensure(store, [member], ("val",))
    rows = store.rows(member, "val", embeddings=True)
    full, folds = fold_heads.read(store.workspace, member, fold_networks.stages(member))
    columns = list(range(3))
    assert fold_heads.explains(full, rows.logits, rows.embeddings, columns)
    assert not fold_heads.explains(full, np.asarray(rows.logits) + 5, rows.embeddings, columns)
    assert not fold_heads.explains(replace(full, weight=full.weight[:, 1:]), rows.logits, rows.embeddings, columns)
    assert len(folds) == 2
