"""No key of the printed configuration is idle: changing it changes a digest, or what is built, selected or run.

Nothing is fitted here. What depends on a key is asked of the code that later decides by it.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import yaml
from conftest import PROJECT
from finished_workspace import at

import ensemble_orchestrator
from utils import build, catalog, ensembles, inventory, snapshot_building, soup_building, streaming
from utils.config import Config, validate
from utils.errors import UserError
from utils.predictions import Store

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
}
"""Another value, where neither the opposite, one more, one name less nor another name is one."""
AWAITED = {
    "project": "export",
    "exports": "export",
    "runs.fusion": "fusion-train",
    "runs.moe": "fusion-train",
    "distillation": "distill",
}
"""Section -> command that reads it; where it does not exist yet, nobody does."""


def leaves(values: dict[str, Any], before: str = "") -> Iterator[tuple[str, Any]]:
    """Dotted keys and their values; a list is one value."""
    for name, value in values.items():
        if isinstance(value, dict):
            yield from leaves(value, f"{before}{name}.")
        else:
            yield f"{before}{name}", value


KEYS = dict(leaves(PRINTED))


def another(key: str, value: Any) -> Any:
    """A valid value that is not the printed one."""
    if key in OTHERS:
        return OTHERS[key]
    if isinstance(value, bool):
        return not value
    if isinstance(value, list):
        return value[:-1]
    if isinstance(value, str):
        return f"{value}_2"
    return value + 1 if isinstance(value, int) else value * 1.5


def with_value(key: str, value: Any) -> Config:
    values = deepcopy(PRINTED)
    *sections, name = key.split(".")
    place = values
    for section in sections:
        place = place[section]
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
            patch.setattr(streaming, "decode", lambda *_, **__: None)
            patch.setattr(streaming, "stream", stream)
            patch.setattr(streaming, "decoding_threads", lambda wanted: wanted)
            with pytest.raises(Stopped):
                Store(config, workspace, found).ensure([member], ["val"])
    finally:
        logger.removeHandler(handler)
    return options, [line for line in warnings if "img_size" in line]


def observed(config: Config, workspace: Any) -> dict[str, Any]:
    """Everything that a configuration decides, found without fitting anything."""
    found = catalog.load(workspace)
    member = found.members["CustomConvNeXt"]
    store = Store(config, workspace, found)
    try:
        selected: Any = [own.name for own in catalog.select(found, config)]
    except UserError as error:
        selected = str(error)
    sections = {section for _, _, places in ensemble_orchestrator.PIPELINE for section in places}
    return {
        "recipes": {
            method: config.digest(*combiner.settings, "dataset.group_regex", "seed")
            for method, combiner in ensembles.COMBINERS.items()
        },
        "soups": soup_building.inputs_digest(store, member),
        "snapshots": snapshot_building._key(store, [member]),
        "wanted": (inventory.configured(config), inventory._learned(config), soup_building._methods(store)),
        "on": {place: config.at(f"{place}.enable") for place in {*sections, *build.SECTIONS}},
        "selected": selected,
        "streamed": how_it_streams(config, workspace, found, member),
    }


def read_somewhere(key: str) -> bool:
    """Whether code beside that of the configuration reads an attribute of the key's name."""
    name = "project" if key.startswith("project.") else key.rpartition(".")[2]
    rooms = [path for path in (PROJECT / "utils").glob("*.py") if path.stem not in ("config", "config_file")]
    return any(re.search(rf"\.{name}\b", path.read_text(encoding="utf-8")) for path in rooms)


@pytest.fixture(scope="module")
def as_printed(built):
    return observed(with_value("seed", PRINTED["seed"]), at(built))


@pytest.mark.parametrize("key", KEYS)
def test_changing_it_changes_something(key, built, as_printed):
    value = another(key, KEYS[key])
    assert value != KEYS[key]
    found = observed(with_value(key, value), at(built))
    changed = {name for name in found if found[name] != as_printed[name]}
    command = next((command for section, command in AWAITED.items() if key.startswith(f"{section}.")), None)
    if changed:
        return
    if command is None:
        raise AssertionError(f"{key}: {KEYS[key]!r} and {value!r} are the same to everything that was asked")
    if command not in ensemble_orchestrator.COMMANDS:
        pytest.skip(f"the command {command}, which reads {key}, does not exist yet")
    assert read_somewhere(key), f"{key}: nothing beside the configuration reads it, and {command} is there"


def test_equal_values_are_told_apart_by_nothing(built, as_printed):
    assert observed(with_value("seed", PRINTED["seed"]), at(built)) == as_printed


def test_a_key_changes_only_what_depends_on_it(built, as_printed):
    found = observed(with_value("runs.stacking.mlp_config.epochs", 51), at(built))
    changed = {method for method, digest in found["recipes"].items() if digest != as_printed["recipes"][method]}
    assert changed == {"stacking_mlp"}
    assert {name for name in found if found[name] != as_printed[name]} == {"recipes"}
