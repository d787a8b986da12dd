"""The steps of `distill`, and the reasons why a student is out of date."""

from __future__ import annotations

from pathlib import Path

import pytest
from given_predictions import empty_workspace, opened, take_in, write
from student_runs import config

from utils.core.artifacts import write_json
from utils.distillation import student_plan, students
from utils.distillation.student_plan import DistillationStep
from utils.predictions.store import Store

STUDENT = "distillation.student=CustomConvNeXt"


def imported(folder: Path) -> Store:
    """Three imported members, of which one teaches."""
    workspace = empty_workspace(folder / "workspace")
    take_in(workspace, write(folder / "given"))
    return Store(config(STUDENT, "distillation.teacher=forest"), workspace, opened(workspace).catalog)


@pytest.fixture(scope="module")
def store(tmp_path_factory) -> Store:
    """Shared: read its workspace, never write into it."""
    return imported(tmp_path_factory.mktemp("imported"))


def test_without_an_assistant_there_is_one_step():
    settings = config(STUDENT)
    assert student_plan.distillation_steps(settings) == [DistillationStep("CustomConvNeXt", "soft_voting")]
    assert student_plan.names(settings) == ["distilled_convnext"]


def test_an_assistant_is_the_student_of_the_first_step_and_the_teacher_of_the_second():
    settings = config(STUDENT, "distillation.assistant=CustomResNetMish")
    assert student_plan.distillation_steps(settings) == [
        DistillationStep("CustomResNetMish", "soft_voting"),
        DistillationStep("CustomConvNeXt", "CustomResNetMish_distilled"),
    ]
    assert student_plan.names(settings) == ["distilled_resnetmish", "distilled_convnext"]


def test_the_reasons_name_a_missing_record_other_inputs_and_an_unknown_teacher(tmp_path):
    store = imported(tmp_path)
    assert "missing" in student_plan.stale_reason(store, "CustomConvNeXt", "forest")
    path = store.workspace.distillation("distilled_convnext") / "record.json"
    write_json(path, {"key": "of other settings", "teacher": "forest", "sha256": ""})
    student = students.resolve(store, "CustomConvNeXt")
    assert student_plan.read_student_record(store, student)["teacher"] == "forest"
    assert "settings have changed" in student_plan.stale_reason(store, "CustomConvNeXt", "forest")
    assert "did you mean 'forest'" in student_plan.stale_reason(store, "CustomConvNeXt", "forrest")


def test_the_digest_of_a_step_depends_on_student_and_teacher(store):
    pairs = [("CustomConvNeXt", "forest"), ("CustomConvNeXt", "linear"), ("CustomMobileOne", "forest")]
    assert len({student_plan.step_digest(store, *pair) for pair in pairs}) == 3


@pytest.mark.parametrize(
    "override",
    [
        *("temperature=2", "alpha=0.1", "epochs=3", "lr=0.1", "batch_size=7", "targets=views", "views=9", "mix=mixup"),
        *("initial_weights=member", "feature_weight=1", "feature_weight=auto", "seeds=3"),
    ],
)
def test_every_setting_of_the_training_is_part_of_the_digest(store, override):
    settings = config(STUDENT, "distillation.teacher=forest", f"distillation.{override}")
    changed = Store(settings, store.workspace, store.catalog)
    digests = [student_plan.step_digest(each, "CustomConvNeXt", "forest") for each in (store, changed)]
    assert digests[0] != digests[1]
