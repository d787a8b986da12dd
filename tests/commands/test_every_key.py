"""No key of the printed configuration is idle: changing it changes a digest, or what is built, selected or run.

Nothing is fitted here. What depends on a key is asked of the code that later decides by it.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import yaml
from conftest import PROJECT
from finished_workspace import at

from utils import commands
from utils.building import (
    builder_protocol,
    end_to_end,
    ensembles,
    fusion_builder,
    meta_builder,
    snapshot_builder,
    soup_builder,
)
from utils.building.build_commands import BUILDERS
from utils.building.builder_protocol import Session
from utils.core.config import Config, validate
from utils.core.errors import UserError
from utils.distillation import student_plan, students, teachers, unlabeled
from utils.evaluation.report import report_page, report_sources
from utils.exporting import export
from utils.predictions import catalog, extraction, image_splits, member_selection, streaming
from utils.predictions.store import Store

PRINTED = yaml.safe_load((PROJECT / "configs" / "ensemble_config.yaml").read_text(encoding="utf-8"))
OTHERS = {
    "device": "cpu",
    "project.version": "2.0",
    "backbones.exclude": ["CustomConvNeXt"],
    "backbones.include": ["CustomConvNeXt"],
    "runs.score_ensemble.optimization_metric": "accuracy",
    "runs.meta_fuser.fuser_type": "mlp",
    "distillation.teacher": "soft_voting",
    "distillation.student": "CustomRegNet",
    "distillation.alpha": 0.7,
    "distillation.targets": "oof",
    "distillation.mix": "mixup",
    "distillation.initial_weights": "member",
    "distillation.unlabeled_dir": "no_such_folder",
    "distillation.assistant": "CustomRegNet",
    "exports.input": "uint8-nhwc",
    "exports.max_members": 1,
    "exports.precision": ["fp32", "fp16"],
    "runs.fusion.train_embeddings": "val",
    "runs.fusion.label_smoothing": 0.1,
    "exports.onnx_exporter": "dynamo",
    "distillation.feature_weight": 0.5,
}
"""Another value, where neither the opposite, one more, one name less nor another name is one."""
BEYOND = ("exports.", "runs.fusion.", "runs.moe.", "runs.cascade.", "distillation.")
"""Sections whose keys that the specification does not print are looked at as well."""


def leaves(values: dict[str, Any], before: str = "") -> Iterator[tuple[str, Any]]:
    """Dotted keys and their values; a list is one value."""
    for name, value in values.items():
        if isinstance(value, dict):
            yield from leaves(value, f"{before}{name}.")
        else:
            yield f"{before}{name}", value


FULL = dict(leaves(validate(deepcopy(PRINTED), source=Path("printed")).model_dump()))
KEYS = dict(leaves(PRINTED)) | {key: value for key, value in FULL.items() if key.startswith(BEYOND)}


def another(key: str, value: Any) -> Any:
    """A valid value that is not the printed one."""
    if key in OTHERS:
        return OTHERS[key]
    if isinstance(value, bool):
        return not value
    if isinstance(value, (list, tuple)):
        return list(value[:-1])
    if isinstance(value, str):
        return f"{value}_2"
    return value + 1 if isinstance(value, int) else value * 1.5


def with_values(changed: dict[str, Any]) -> Config:
    """The printed configuration with other values at these keys."""
    values = deepcopy(PRINTED)
    for key, value in changed.items():
        *sections, name = key.split(".")
        place = values
        for section in sections:
            place = place.setdefault(section, {})
        place[name] = value
    return validate(values, source=Path("of the test"))


class Stopped(Exception):
    """A network would be run now."""


def how_it_streams(config: Config, workspace: Any, found: Any, member: Any) -> Any:
    """What a member would be run with, and what is warned of before."""
    warnings: list[str] = []
    handler = logging.Handler(logging.WARNING)
    handler.emit = lambda record: warnings.append(record.getMessage())  # type: ignore[method-assign]
    options: list[Any] = []

    def stream(spec: Any, images: Any, **given: Any) -> Any:
        options.append({name: given[name] for name in ("batch_size", "device", "decoding_threads")})
        raise Stopped

    logger = logging.getLogger("disease_pipeline")
    logger.addHandler(handler)
    try:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(Store, "is_stored", lambda *_: False)
            patch.setattr(image_splits, "decode", lambda *_, **__: None)
            patch.setattr(streaming, "stream", stream)
            patch.setattr(image_splits, "decoding_threads", lambda wanted: wanted)
            with pytest.raises(Stopped):
                extraction.ensure(Store(config, workspace, found), [member], ["val"])
    finally:
        logger.removeHandler(handler)
    return options, [line for line in warnings if "img_size" in line]


def how_it_fuses(store: Store, members: Any) -> str:
    """What `fusion-train` does first with predictions that are not there yet, and asks first of networks of its own."""

    def ensure(*_: Any) -> None:
        raise Stopped("streams")

    def require_networks(*_: Any) -> None:
        raise Stopped("asks for networks that can be trained")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Store, "is_stored", lambda *_: False)
        patch.setattr(Store, "lacks_embeddings", lambda *_: False)
        patch.setattr(extraction, "ensure", ensure)
        patch.setattr(end_to_end, "require_networks", require_networks)
        try:
            builder_protocol.run([fusion_builder.FusionBuilder()], Session(store, tuple(members)))
        except (UserError, Stopped) as error:
            return str(error)
    return "has nothing to do"


def how_it_teaches(store: Store) -> Any:
    """Students and teachers, and what each student depends on, taught by an ensemble that is there."""
    steps = student_plan.distillation_steps(store.config)
    try:
        found = [students.resolve(store, step.student) for step in steps]
        teacher = teachers.resolve(store, "soft_voting", excluded_member=found[-1].member)
        return steps, [
            student_plan.inputs_digest(store, one, teacher, unlabeled.unlabeled_images(store)) for one in found
        ]
    except UserError as error:
        return str(error)


def how_it_exports(config: Config, workspace: Any) -> Any:
    """Digest and formats of an export, up to where its folder would be made."""
    asked: list[Any] = []

    def reusable_formats(final: Path, source_digest: str) -> dict[str, Any]:
        asked.append(source_digest)
        return {}

    def write_export(store: Store, request: Any) -> dict[str, Any]:
        asked.append(list(request.formats))
        raise Stopped

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(export.exported_network, "require_current_checkpoints", lambda *_: None)
        patch.setattr(export.export_folder, "recover_interrupted", lambda *_: None)
        patch.setattr(export.export_folder, "reusable_formats", reusable_formats)
        patch.setattr(export.export_folder, "require_free_space", lambda *_: None)
        patch.setattr(export, "write_export", write_export)
        try:
            export.export(config, workspace, model_name="soft_voting")
        except UserError as error:
            return str(error)
        except Stopped:
            return asked
    raise AssertionError("nothing was exported")


def observed(config: Config, workspace: Any) -> dict[str, Any]:
    """Everything that a configuration decides, found without fitting anything."""
    found = catalog.load(workspace)
    member = found.members["CustomConvNeXt"]
    store = Store(config, workspace, found)
    session = Session(store, (member, found.members["CustomResNetMish"]))
    try:
        selected: Any = [own.name for own in member_selection.select(found, config)]
    except UserError as error:
        selected = str(error)
    sections = {section for _, _, places in commands.PIPELINE_STAGES for section in places}
    return {
        "recipes": {
            method: config.digest(*combiner.settings, "dataset.group_regex", "seed")
            for method, combiner in ensembles.COMBINERS.items()
        },
        "soups": soup_builder.inputs_digest(store, member),
        "snapshots": snapshot_builder._key(store, [member]),
        "requested": {command: [b.names(session) for b in builders] for command, builders in BUILDERS.items()},
        "students": student_plan.names(config) if config.distillation.enable else [],
        "fused": how_it_fuses(store, list(found.members.values())),
        "trained_further": end_to_end.key(store, list(found.members.values()), "fusion_concat_mlp"),
        "meta": meta_builder.depends_on(config, {}),
        "taught": how_it_teaches(store),
        "exported": how_it_exports(config, workspace),
        "on": {
            place: config.at(f"{place}.enable")
            for place in {*sections, *(builder.config_key for group in BUILDERS.values() for builder in group)}
        },
        "selected": selected,
        "streamed": how_it_streams(config, workspace, found, member),
    }


@pytest.fixture(scope="module")
def as_printed(built):
    return observed(with_values({"seed": PRINTED["seed"]}), at(built))


@pytest.mark.parametrize("key", [key for key in KEYS if not key.startswith("project.")])
def test_changing_it_changes_something(key, built, as_printed):
    value = another(key, KEYS[key])
    assert value != KEYS[key]
    found = observed(with_values({key: value}), at(built))
    changed = {name for name in found if found[name] != as_printed[name]}
    assert changed, f"{key}: {KEYS[key]!r} and {value!r} are the same to everything that was asked"


def test_the_report_names_the_project_as_it_is_configured(built):
    config = with_values({"project.version": "7.5 beta"})
    page = report_page.render(
        config, report_sources.read(Store(config, at(built), catalog.load(at(built))), "test"), ""
    )
    assert f'<td class="text">{config.project.name}, version 7.5 beta</td>' in page


def test_equal_values_are_told_apart_by_nothing(built, as_printed):
    assert observed(with_values({"seed": PRINTED["seed"]}), at(built)) == as_printed


def test_a_key_changes_only_what_depends_on_it(built, as_printed):
    found = observed(with_values({"runs.stacking.mlp_config.epochs": 51}), at(built))
    changed = {method for method, digest in found["recipes"].items() if digest != as_printed["recipes"][method]}
    assert changed == {"stacking_mlp"}
    assert {name for name in found if found[name] != as_printed[name]} == {"recipes"}


def test_settings_of_boosters_matter_to_a_fuser_that_is_one(built, as_printed):
    key = "runs.stacking.xgb_config.max_depth"
    found = observed(with_values({key: 7}), at(built))
    assert {name for name in found if found[name] != as_printed[name]} == {"recipes", "meta"}
    changed = {method for method, digest in found["recipes"].items() if digest != as_printed["recipes"][method]}
    assert changed == {"stacking_xgb"}
    mlp = {"runs.meta_fuser.fuser_type": "mlp"}
    assert meta_builder.depends_on(with_values(mlp), {}) == meta_builder.depends_on(with_values({**mlp, key: 7}), {})
