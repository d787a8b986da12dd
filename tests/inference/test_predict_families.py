"""`predict` by what reads embeddings, and by what runs only some members: the answers of `evaluate`, row by row."""

from __future__ import annotations

import json
import shutil

import in_process
import numpy as np
import pytest
from finished_workspace import at
from predict_runs import NAME, asked, by_id, compare, stored

from utils.networks import embeddings
from utils.predictions import streaming

FAMILIES = (
    *("--config", "configs/votes.yaml", "--quiet", "--set", "runs.fusion.enable=true"),
    *("--set", "runs.fusion.fusion_methods=[concat_mlp]", "--set", "runs.fusion.fusion_config.epochs=3"),
    *("--set", "runs.stacking.fallback=false", "--set", "runs.moe.enable=true", "--set", "runs.moe.epochs=3"),
    *("--set", "runs.moe.num_experts=3", "--set", "runs.moe.top_k=1", "--set", "runs.cascade.enable=true"),
    *("--set", "runs.meta_fuser.enable=true", "--set", "runs.meta_fuser.fuser_type=mlp"),
    *("--set", "runs.meta_fuser.input_ensembles=[soft_voting,fusion_concat_mlp,moe]"),
    *("--set", "runs.meta_fuser.mlp_config.epochs=3"),
)


@pytest.fixture
def workspace(own_copy):
    return at(own_copy)


@pytest.fixture(scope="module")
def families(tmp_path_factory, built):
    """A workspace with what reads embeddings and what runs only some members, evaluated. Read only."""
    base = shutil.copytree(built, tmp_path_factory.mktemp("families") / "workspace")
    for command in ("fusion-train", "meta-fuse", "evaluate"):
        done = in_process.run(command, *FAMILIES, workspace=base)
        assert done.code == 0, done.stderr
    return at(base)


@pytest.mark.parametrize("name", ["fusion_concat_mlp", "meta_fuser", "moe", "cascade"])
def test_what_reads_embeddings_or_runs_few_members_agrees_as_well(families, name):
    folder = families.split_dir / "test"
    records = by_id(asked(families, folder, model_name=name, probabilities=True).document["images"], folder)
    compare(records, stored(families, name))
    metrics = json.loads(families.ensemble_metrics(name, "test").read_text())
    assert np.mean([row["class"] == key.split("/")[0] for key, row in records.items()]) == metrics["accuracy"]


@pytest.mark.parametrize("name", [NAME, "CustomConvNeXt"])
def test_a_row_that_a_network_has_no_number_for_has_an_error_of_its_own(families, monkeypatch, name):
    folder, sick = families.split_dir / "test", 3
    calling = embeddings.EmbeddingExtractor.__call__

    def without_number(outputs, images):
        logits, embeddings = calling(outputs, images)
        logits[sick] = np.nan
        return logits, embeddings

    healthy = asked(families, folder, model_name=name).document["images"]
    monkeypatch.setattr(embeddings.EmbeddingExtractor, "__call__", without_number)
    found = asked(families, folder, model_name=name)
    records = found.document["images"]
    assert records[sick]["error"] == "CustomConvNeXt gives NaN or infinity for it"
    assert records[sick]["class"] is None
    assert len(found.failures) == 1
    for row in {*range(len(records))} - {sick}:
        assert records[row] == healthy[row]


def test_an_image_that_the_first_of_a_cascade_has_no_number_for_is_the_only_one_lost(families, monkeypatch):
    folder = families.split_dir / "test"
    files, running = sorted(folder.rglob("*.png")), streaming.stream

    def spoiled(spec, splits, **options):
        for batch in running(spec, splits, **options):
            ids = splits[0].sample_ids
            batch.logits[[row for row in range(len(batch.logits)) if ids[batch.start + row] == str(files[5])]] = np.nan
            yield batch

    monkeypatch.setattr(streaming, "stream", spoiled)
    records = asked(families, folder, model_name="cascade").document["images"]
    assert {record["path"] for record in records if record["error"]} == {str(files[5])}
    assert all(record["class"] for record in records if not record["error"])
