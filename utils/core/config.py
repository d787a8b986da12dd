"""The configuration: all sections (`config_sections`), the values of one command, and their digests.

`utils.core.config_file` locates and reads the file; code that receives a `Config` needs only this module.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

from pydantic import Field, PrivateAttr

from utils.core.config_sections import (
    Backbones,
    Cache,
    Dataset,
    Distillation,
    Exports,
    Project,
    Pruning,
    Runs,
    Section,
    Tta,
)
from utils.core.config_values import Device, Seed
from utils.core.errors import UserError

# Names in the specification are accepted even before their method exists; the tables of the families add others.
SPECIFIED: dict[str, tuple[str, ...]] = {
    "exports.formats": (
        *("state_dict", "checkpoint", "torchscript", "exported_program", "onnx", "tflite", "tensorrt", "custom"),
    ),
    "runs.score_ensemble.methods": (
        *("soft_voting", "hard_voting", "logit_averaging", "weighted", "greedy_selection"),
        *("soft_voting_calibrated", "logit_averaging_calibrated", "best_single_calibrated"),
    ),
    "runs.model_soup.methods": ("uniform", "greedy", "wise_ft"),
    "runs.stacking.meta_learners": ("lr", "xgb", "rf", "mlp"),
    "runs.fusion.fusion_methods": ("concat_mlp", "attention", "bilinear", "cca_aligned"),
    "runs.meta_fuser.fuser_type": ("xgb", "mlp", "attention", "convex"),  # the last one is not in the specification
    "pruning.methods": ("greedy_forward", "greedy_backward", "diversity_max", "clustering"),
}
FILE = "file"
"""Origin of a value that is set in a configuration file."""


class Config(Section):
    """The whole file; `source` is its path and not one of the values."""

    project: Project = Field(default=Project(), description="What the report is titled.")
    device: Device = Field(
        default="cuda",
        description="Processor that networks run on. `cuda` falls back to the CPU with a warning where there is none; "
        "`auto` does so without.",
    )
    seed: Seed = Field(default=42, description="Seed of everything that is random: folds, learners, students.")
    dataset: Dataset = Field(default=Dataset(), description="How images are read.")
    backbones: Backbones = Field(default=Backbones(), description="Which members are combined.")
    exports: Exports = Field(default=Exports(), description="Which deployment files `export` writes.")
    runs: Runs = Field(default=Runs(), description="The families of ensembles.")
    pruning: Pruning = Field(
        default=Pruning(), description="Subsets of the members within a budget of latency and size."
    )
    tta: Tta = Field(default=Tta(), description="Test-time augmentation: views that networks are averaged over.")
    distillation: Distillation = Field(default=Distillation(), description="An ensemble into one student network.")
    cache: Cache = Field(default=Cache(), description="Decoded images and embeddings that are kept for the next run.")
    _source: Path = PrivateAttr(default=Path("built-in configuration"))
    _origins: Mapping[str, str] = PrivateAttr(default_factory=dict)
    _overrides: tuple[str, ...] = PrivateAttr(default=())
    _recorded_overrides: tuple[str, ...] = PrivateAttr(default=())
    _is_remembered: bool = PrivateAttr(default=False)

    @property
    def source(self) -> Path:
        """Path of the file as the user named it, for messages."""
        return self._source

    @property
    def origins(self) -> Mapping[str, str]:
        """{dotted key: origin of its value}: `FILE`, or `KEY=VALUE` of the command line; other keys have defaults."""
        return self._origins

    @property
    def overrides(self) -> tuple[str, ...]:
        """`KEY=VALUE` of each `--set` of this command; they override those recorded by an earlier build."""
        return self._overrides

    @property
    def recorded_overrides(self) -> tuple[str, ...]:
        """Those of `overrides` that differ from the workspace's stored configuration: recorded with what is built."""
        return self._recorded_overrides

    @property
    def is_remembered(self) -> bool:
        """Whether it is the workspace's stored configuration, so that results built with a `--set` stay valid."""
        return self._is_remembered

    def at(self, key: str) -> Any:
        """The section or value at a dotted key such as `runs.moe.top_k`. Raises KeyError if there is none."""
        value: Any = self
        for name in key.split("."):
            if not isinstance(value, Section) or name not in type(value).model_fields:
                raise KeyError(f"the configuration has no {key}")
            value = getattr(value, name)
        return value

    def as_dict(self) -> dict[str, Any]:
        """All values in plain types, in the specification's order."""
        return self.model_dump(mode="json")

    def digest(self, *keys: str) -> str:
        """SHA-256 in hexadecimal of the values at these keys, in any order; without keys, of all values."""
        values = {key: self.at(key) for key in keys} if keys else {"": self}
        plain = {key: value.model_dump() if isinstance(value, Section) else value for key, value in values.items()}
        return hashlib.sha256(json.dumps(plain, sort_keys=True, allow_nan=False).encode()).hexdigest()


def validate(values: dict[str, Any], *, source: Path, origins: Mapping[str, str] = MappingProxyType({})) -> Config:
    """Validate plain values; returns a Config with `source` and `origins`. Raises pydantic's ValidationError."""
    config = Config.model_validate(values)
    config._source, config._origins = source, dict(origins)
    return config


def of_workspace(
    config: Config, *, overrides: Sequence[str] = (), recorded: Sequence[str] = (), is_remembered: bool = False
) -> Config:
    """A copy of the configuration with these properties, which depend on the workspace."""
    copy = config.model_copy()
    copy._overrides, copy._recorded_overrides = tuple(overrides), tuple(recorded)
    copy._is_remembered = is_remembered
    return copy


def require_enabled(config: Config, *keys: str) -> None:
    """Raise UserError, with the settings to type, if none of the sections at `keys` is enabled."""
    if any(config.at(f"{key}.enable") for key in keys):
        return
    *others, last = (f"{key}.enable=true" for key in keys)
    if others:
        raise UserError(
            f"{config.source}: {', '.join(keys)} are all disabled; run again with --set {', '.join(others)} or {last}"
        )
    raise UserError(
        f"{config.source}: {keys[0]} is disabled; run again with --set {last}, "
        f"or write `enable: true` under {keys[0]} in the file"
    )
