"""Discovery on really trained members and on what can be wrong with them."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest
import torch

from utils.predictions.catalog import Catalog, Problem

pytestmark = pytest.mark.usefixtures("few_folds", "short_paths")

DEMO = ("--config", "configs/votes.yaml")


@pytest.fixture
def workspace(tmp_path, trained):
    return shutil.copytree(trained, tmp_path / "w", ignore=shutil.ignore_patterns("Data"))


@pytest.fixture
def small(tmp_path, synthetic):
    """For what does not depend on images, classes and scores."""
    return shutil.copytree(synthetic, tmp_path / "w")


def catalog(workspace):
    return json.loads((workspace / "ensembles" / "ensemble_catalog.json").read_text())


def test_members_are_listed_with_all_that_is_known(workspace, orchestrator):
    assert orchestrator("discover", *DEMO, workspace=workspace).returncode == 0
    found = catalog(workspace)
    assert found["classes"] == ["0", "1", "2", "3"]
    assert {split: facts["n"] for split, facts in found["splits"].items()} == {"train": 224, "val": 28, "test": 28}
    assert found["base_back"]["kind"] == "bundled"
    member = found["members"]["CustomViTHybrid"]
    assert (member["architecture"], member["size"], member["img_size"]) == ("CustomViTHybrid", "tiny", 32)
    assert member["checkpoints"][0]["path"] == "checkpoints/CustomViTHybrid_final.pth"
    assert member["oof"]["rows"] == 224
    assert member["oof"]["folds"] == 2
    assert member["usable"] is True
    assert member["exports"] == ["checkpoint", "onnx", "state_dict", "torchscript"]
    metrics = json.loads((workspace / "metrics_output" / "CustomViTHybrid_training_metrics.json").read_text())
    assert member["recorded_accuracy"] == metrics["final_accuracy"]
    assert found["problems"] == []


def test_a_second_scan_reads_no_checkpoint_and_loads_no_torch(small, orchestrator):
    from conftest import run_python

    assert orchestrator("discover", *DEMO, workspace=small).returncode == 0
    first = catalog(small)
    code = (
        "import sys, ensemble_orchestrator as o\n"
        "assert o.main(['discover', *sys.argv[1:]]) == 0\n"
        "assert 'torch' not in sys.modules"
    )
    done = run_python("-c", code, *DEMO, "--workspace", str(small))
    assert done.returncode == 0, done.stderr
    assert catalog(small) == first


def test_without_oof_the_specifications_words_and_both_remedies(workspace, orchestrator):
    (workspace / "kfold_results" / "CustomConvNeXt_oof_predictions.npz").unlink()
    discovered, built, evaluated = (
        orchestrator(command, *DEMO, workspace=workspace) for command in ("discover", "build-ensemble", "evaluate")
    )
    assert (discovered.returncode, built.returncode, evaluated.returncode) == (0, 0, 0)
    assert "No K-fold results for backbone CustomConvNeXt" in discovered.stdout
    assert "ENABLE_KFOLD_CV=True" in discovered.stdout
    assert "backbones.exclude" in discovered.stdout
    assert "only the val rows are out-of-sample for all members" in built.stderr
    ranking = json.loads((workspace / "metrics_output" / "ensembles" / "ranking.json").read_text())
    assert ranking["recommended"]["evidence"]["n"] in (28, 252)


def test_class_order_is_matched_by_name(workspace, orchestrator):
    """A checkpoint whose outputs stand in another order gives the same probabilities by class."""
    for command in ("discover", "build-ensemble"):
        assert orchestrator(command, *DEMO, workspace=workspace).returncode == 0
    before = np.load(workspace / "ensembles" / "predictions" / "CustomConvNeXt" / "test" / "logits.npy")
    path = workspace / "checkpoints" / "CustomConvNeXt_final.pth"
    record = torch.load(path, weights_only=True)
    order = [2, 0, 3, 1]
    last = [name for name, value in record["model_state_dict"].items() if value.shape[:1] == (4,)][-2:]
    for name in last:
        record["model_state_dict"][name] = record["model_state_dict"][name][order]
    record["extra"]["classes"] = [record["extra"]["classes"][k] for k in order]
    torch.save(record, path)
    done = orchestrator("discover", *DEMO, workspace=workspace)
    assert "its classes are in another order; they are matched by name" in done.stdout
    done = orchestrator("build-ensemble", *DEMO, workspace=workspace)
    assert done.returncode == 0, done.stderr
    after = np.load(workspace / "ensembles" / "predictions" / "CustomConvNeXt" / "test" / "logits.npy")
    np.testing.assert_allclose(after, before, atol=1e-5)


def test_a_hostile_checkpoint_is_refused_by_name_and_nothing_runs(small, orchestrator, tmp_path):
    canary = tmp_path / "canary"

    class Hostile:
        def __reduce__(self):
            import os

            return os.system, (f"touch {canary}",)

    torch.save({"model_state_dict": Hostile()}, small / "checkpoints" / "CustomConvNeXt_final.pth")
    done = orchestrator("discover", "--verify", *DEMO, workspace=small)
    assert done.returncode == 4
    assert "refused, since loading it could run code: it asks for posix.system" in done.stdout
    assert not canary.exists()
    assert "CustomConvNeXt" not in catalog(small)["members"]
    places = ("stacking.enable=true", "stacking.meta_learners=[lr]", "model_soup.enable=true", "meta_fuser.enable=true")
    fuser = ("fuser_type=attention", "mlp_config.epochs=2", "input_ensembles=[soft_voting,stacking_lr]")
    sets = [word for place in (*places, *(f"meta_fuser.{one}" for one in fuser)) for word in ("--set", f"runs.{place}")]
    for command in ("build-ensemble", "stack", "meta-fuse", "evaluate", "status"):
        done = orchestrator(command, *DEMO, *sets, workspace=small)
        assert done.returncode == 0, done.stderr
        assert not canary.exists()


def test_numpy_scalars_in_a_checkpoint_are_allowed(small, orchestrator):
    path = small / "checkpoints" / "CustomConvNeXt_final.pth"
    record = torch.load(path, weights_only=True)
    record["extra"]["accuracy"] = np.float64(0.5)
    torch.save(record, path)
    assert orchestrator("discover", "--verify", *DEMO, workspace=small).returncode == 0


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda path: path.write_bytes(path.read_bytes()[:5000]), "cannot be read as a checkpoint"),
        (lambda path: torch.save([1, 2], path), "holds a list"),
    ],
)
def test_an_unreadable_checkpoint_is_named_and_the_others_are_found(workspace, orchestrator, damage, words):
    damage(workspace / "checkpoints" / "CustomResNetMish_final.pth")
    done = orchestrator("discover", *DEMO, workspace=workspace)
    assert done.returncode == 4
    assert words in done.stdout
    members = catalog(workspace)["members"]
    assert sorted(name for name in members if members[name]["source"] == "trained") == [
        "CustomConvNeXt",
        "CustomViTHybrid",
    ]
    assert members["CustomResNetMish_snapshot1"]["parents"] == ["CustomResNetMish"]


def test_verify_finds_weights_of_another_architecture(small, orchestrator):
    path = small / "checkpoints" / "CustomConvNeXt_final.pth"
    record = torch.load(path, weights_only=True)
    other = torch.load(small / "checkpoints" / "CustomResNetMish_final.pth", weights_only=True)
    torch.save(record | {"model_state_dict": other["model_state_dict"]}, path)
    done = orchestrator("discover", "--verify", *DEMO, workspace=small)
    assert done.returncode == 4
    assert "the weights of another architecture" in done.stdout
    assert catalog(small)["members"]["CustomConvNeXt"]["usable"] is False


def test_a_member_of_other_classes_cannot_be_used(workspace, orchestrator):
    path = workspace / "checkpoints" / "CustomConvNeXt_final.pth"
    record = torch.load(path, weights_only=True)
    record["extra"]["classes"] = ["0", "1", "2", "7"]
    torch.save(record, path)
    done = orchestrator("discover", *DEMO, workspace=workspace)
    assert done.returncode == 4
    assert "trained on the classes 0, 1, 2, 7; the split has 0, 1, 2, 3" in done.stdout


def test_an_unknown_backbone_in_the_configuration_is_named(small, orchestrator):
    assert orchestrator("discover", *DEMO, workspace=small).returncode == 0
    done = orchestrator("build-ensemble", "--set", "backbones.include=[CustomConvNext]", *DEMO, workspace=small)
    assert done.returncode == 1
    assert "did you mean 'CustomConvNeXt'?" in done.stderr
    done = orchestrator("build-ensemble", "--set", "backbones.include=[CustomMaxViT]", *DEMO, workspace=small)
    assert done.returncode == 1
    assert "none of CustomMaxViT is in the catalog" in done.stderr


def test_problems_stand_in_one_order_whenever_their_member_came():
    """A soup is listed when it is built; a later scan finds it among the others, and writes the same bytes."""
    found = [Problem("b", "info", name, "m", "r") for name in ("one", "two", None)]
    first, second = (Catalog({}, (), {}, {}, tuple(problems)).as_record() for problems in (found, reversed(found)))
    assert first == second
    assert [problem["member"] for problem in first["problems"]] == [None, "one", "two"]
