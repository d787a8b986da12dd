"""What `distill` makes of imported predictions, and what it refuses in one line."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest
from given_predictions import empty_workspace, logged, take_in, write
from student_runs import SMALL, config, distill, record, store_of
from synthetic_votes import own, votes

from utils.core.errors import ConfigError, UserError
from utils.evaluation.evaluate import evaluate

__all__ = ["own", "votes"]
pytestmark = pytest.mark.usefixtures("without_figures")


@pytest.fixture
def imported(own, tmp_path):
    """The images of the workspace, and three members of which only the predictions are there."""
    from utils.building import build_commands
    from utils.discovery import discover, import_predictions

    store = store_of(own)
    folder = tmp_path / "given"
    for name in ("CustomConvNeXt", "CustomResNetMish", "CustomViTHybrid"):
        member = store.catalog.members[name]
        (folder / f"their_{name}").mkdir(parents=True)
        for stem in ("val", "test"):
            rows = store.rows(member, stem)
            arrays = {"logits": rows.logits, "labels": rows.labels, "sample_ids": rows.sample_ids}
            np.savez(folder / f"their_{name}" / f"{stem}.npz", **arrays, classes=np.array(rows.classes))
        shutil.copy(own.base_oof(name), folder / f"their_{name}" / "oof.npz")
    for place in (own.checkpoints, own.ensembles, own.kfold):
        shutil.rmtree(place)
    import_predictions.import_predictions(config(), own, folder=str(folder))
    discover.discover(config(), own)
    build_commands.build_ensemble(config(), own)
    return own


def test_imported_predictions_teach_about_the_images_with_their_ids(imported):
    distill(imported, SMALL)
    found = record(imported, SMALL)
    assert (found["targets"]["kind"], found["teacher"]) == ("oof", "soft_voting_ensemble")
    assert found["costs"]["teacher"] == {"latency_ms": None, "size_mb": None}
    evaluate(config(SMALL), imported)
    metrics = json.loads(imported.ensemble_metrics("distilled_convnext", "test").read_text())
    assert metrics["controls"]["teacher"]["accuracy"] > 0
    for kind in ("consistent", "views"):
        with pytest.raises(UserError, match=f"distillation.targets: {kind} .*set it to oof"):
            distill(imported, SMALL, f"distillation.targets={kind}")
    with pytest.raises(
        UserError, match=r"feature_weight needs the embeddings .* imported predictions alone; set it to 0"
    ):
        distill(imported, SMALL, "distillation.feature_weight=auto")


def test_without_images_there_is_nobody_to_teach(tmp_path):
    workspace = empty_workspace(tmp_path / "w")
    take_in(workspace, write(tmp_path / "given"))
    with pytest.raises(UserError, match="run discover and import-predictions again"):
        distill(workspace, SMALL)


# what it refuses ------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("distillation.teacher=soft_votin", "soft_votin: unknown; did you mean 'soft_voting'?"),
        ("distillation.teacher=stacking_lr", "not built. Build it: python ensemble_orchestrator.py stack"),
        ("distillation.student=CustomMobilOne", "did you mean 'CustomMobileOne'?"),
        ("distillation.student=resnet18x", "neither a backbone of BASE-BACK nor a model of timm"),
        ("distillation.unlabeled_dir=/nowhere/at/all", "/nowhere/at/all: no such folder"),
        ("distillation.teacher=distilled_convnext", "unknown"),
    ],
)
def test_what_cannot_be_done_is_said_in_one_line(votes, override, words):
    with pytest.raises(UserError, match=None) as refused:
        distill(votes, SMALL, override)
    assert words in str(refused.value)
    assert "\n" not in str(refused.value)


def test_targets_of_the_evaluation_view_are_not_mixed(votes):
    with pytest.raises(UserError, match=r"needs targets for augmented images.* or views, or distillation\.mix to none"):
        distill(votes, SMALL, "distillation.targets=oof", "distillation.mix=mixup")


@pytest.mark.parametrize("kind", ["oof", "views"])
def test_embeddings_of_other_views_are_not_matched(votes, kind):
    with pytest.raises(UserError, match=rf"{kind} has none; set distillation\.targets to consistent, or .* to 0"):
        distill(votes, SMALL, f"distillation.targets={kind}", "distillation.feature_weight=1")


def test_an_empty_folder_of_unlabeled_images_is_refused(votes, tmp_path):
    with pytest.raises(UserError, match="no image in it"):
        distill(votes, SMALL, f"distillation.unlabeled_dir={tmp_path}")


@pytest.mark.parametrize(
    "override",
    [
        *(
            "distillation.temperature=0",
            "distillation.temperature=-1",
            "distillation.alpha=1.1",
            "distillation.alpha=-0.1",
        ),
        *("distillation.epochs=0", "distillation.targets=some", "distillation.batch_size=1", "distillation.views=0"),
        "distillation.assistant=CustomMobileOne",
    ],
)
def test_values_out_of_range_are_errors_of_the_configuration(override):
    with pytest.raises(ConfigError, match=override.partition("=")[0]):
        config(override)


def test_a_teacher_of_other_classes_or_checkpoints_is_refused(own):
    path = own.ensemble("soft_voting_ensemble") / "ensemble.json"
    whole = path.read_text()
    path.write_text(json.dumps(json.loads(whole) | {"classes": ["a", "b"]}))
    with pytest.raises(UserError, match=r"classes a, b; .* bright, dark"):
        distill(own, SMALL)
    changed = json.loads(whole)
    changed["member_digests"]["CustomConvNeXt"] = "0" * 64
    path.write_text(json.dumps(changed))
    with pytest.raises(UserError, match="its member CustomConvNeXt has another checkpoint now"):
        distill(own, SMALL)


def test_a_student_larger_than_its_teacher_is_warned_of(own, caplog):
    sizes = {name: own.checkpoint(name, "final").stat().st_size for name in ("CustomConvNeXt", "CustomResNetMish")}
    small, large = sorted(sizes, key=sizes.__getitem__)
    with logged(caplog):
        distill(own, f"distillation.student={large}", f"distillation.teacher={small}", "distillation.epochs=1")
    assert f"the student {large} is larger than its teacher {small}" in caplog.text


def test_nothing_is_written_behind_a_link(own, tmp_path):
    shutil.move(own.checkpoints, tmp_path / "elsewhere")
    own.checkpoints.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(UserError, match="nothing is written behind links"):
        distill(own, SMALL)
