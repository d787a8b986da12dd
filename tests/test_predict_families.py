"""`predict` by what reads embeddings, and by what runs only some members: the answers of `evaluate`, row by row."""

from __future__ import annotations

import json
import os
import shutil

import in_process
import numpy as np
import pytest
from finished_workspace import at
from test_predict import NAME, asked, by_id, compare, stored

from utils import streaming

FAMILIES = (
    *("--config", "configs/votes.yaml", "--quiet", "--set", "runs.fusion.enable=true"),
    *("--set", "runs.fusion.fusion_methods=[concat_mlp]", "--set", "runs.fusion.fusion_config.epochs=3"),
    *("--set", "runs.stacking.fallback=false", "--set", "runs.moe.enable=true", "--set", "runs.moe.epochs=3"),
    *("--set", "runs.moe.num_experts=3", "--set", "runs.moe.top_k=1", "--set", "runs.cascade.enable=true"),
    *("--set", "runs.meta_fuser.enable=true", "--set", "runs.meta_fuser.fuser_type=mlp"),
    *("--set", "runs.meta_fuser.input_ensembles=[soft_voting,fusion_concat_mlp,moe]"),
    *("--set", "runs.meta_fuser.mlp_config.epochs=3"),
)


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


def test_a_row_that_a_network_has_no_number_for_has_an_error_of_its_own(families, monkeypatch):
    folder = families.split_dir / "test"
    sick = sorted(folder.rglob("*.png"))[3]
    running = streaming.stream

    def spoiled(spec, splits, **options):
        for batch in running(spec, splits, **options):
            ids = splits[0].sample_ids[batch.start : batch.start + len(batch.logits)]
            if spec.architecture == "CustomConvNeXt" and str(sick) in ids:
                batch.logits[ids.index(str(sick))] = np.nan
            yield batch

    monkeypatch.setattr(streaming, "stream", spoiled)
    for name in (NAME, "cascade", "CustomConvNeXt"):
        found = asked(families, folder, model_name=name, probabilities=True)
        said = {record["path"]: record["error"] for record in found.document["images"] if record["error"]}
        ran = name != "cascade" or said  # a cascade need not have run it for this image
        assert not ran or said == {str(sick): "CustomConvNeXt gives NaN or infinity for it"}
        assert len(found.failures) == len(said)
        records = by_id(found.document["images"], folder)
        if name == NAME:
            arrays = stored(families)
            others = arrays["sample_ids"] != os.path.relpath(sick, folder)
            del records[os.path.relpath(sick, folder)]
            compare(
                records,
                {key: arrays[key][others] for key in ("sample_ids", "probabilities")} | {"classes": arrays["classes"]},
            )
