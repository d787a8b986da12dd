"""Runs `distill` in a small trained workspace and reads its record."""

from __future__ import annotations

from conftest import PROJECT

from utils.core.config_file import load_config
from utils.distillation import student_builder
from utils.distillation.student_plan import read_student_record
from utils.distillation.students import resolve
from utils.predictions import catalog
from utils.predictions.store import Store

QUICK = (
    *("device=cpu", "distillation.enable=true", "distillation.teacher=soft_voting", "distillation.epochs=2"),
    *("distillation.batch_size=4", "dataset.num_workers=0"),  # three steps an epoch in the synthetic workspace
)


SMALL = "distillation.student=CustomConvNeXt"  # the quickest to train


def config(*overrides):
    return load_config(PROJECT / "configs" / "votes.yaml", overrides=[*QUICK, *overrides])


def distill(workspace, *overrides, **options):
    return student_builder.distill(config(*overrides), workspace, **options)


def store_of(workspace, *overrides) -> Store:
    return Store(config(*overrides), workspace, catalog.load(workspace))


def record(workspace, *overrides) -> dict:
    store = store_of(workspace, *overrides)
    return read_student_record(store, resolve(store, store.config.distillation.student))
