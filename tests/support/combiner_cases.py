"""Shared by tests of combiners: members, a quick configuration, and one in which no setting has its default."""

from __future__ import annotations

from copy import deepcopy
from functools import cache
from pathlib import Path
from typing import Any, get_args

import numpy as np
from pydantic import BaseModel, ValidationError

from utils.combiners.protocol import Combiner, MemberFacts
from utils.core.config import Config, validate

M, N, C = 4, 60, 3


SHORT: dict[str, Any] = {
    "runs": {
        "stacking": {"mlp_config": {"hidden_dims": [8], "epochs": 4}, "xgb_config": {"n_estimators": 5}},
        "fusion": {"fusion_config": {"hidden_dims": [8], "epochs": 4}},
        "meta_fuser": {
            "fuser_type": "attention",
            "input_ensembles": ["soft_voting", "fusion_concat_mlp"],
            "mlp_config": {"hidden_dims": [8], "epochs": 4},
        },
        "moe": {"epochs": 4, "gating_hidden_dim": 8},
    }
}
QUICK = validate(SHORT, source=Path("of the battery"))
FIXED = {"device": "cpu", "runs.meta_fuser": {"fuser_type": "mlp", "mlp_config": {"hidden_dims": [6], "epochs": 3}}}
"""Settings whose other values do not follow from their types."""
FACTS = MemberFacts(("a", "b", "c", "d"), np.array([0.6, 0.7, 0.7, 0.5]), np.full(M, 10.0), np.full(M, 1.0))


def facts_of(members: int) -> MemberFacts:
    """What is known of so many members: each costs something else."""
    order = np.arange(members)
    names = tuple(f"m{place}" for place in order)
    return MemberFacts(names, 0.5 + order / 20, 8.0 - order / 2, 1.0 + order)


@cache
def changed_settings(kind: type[Combiner]) -> Config:
    """A configuration in which every setting of the combiner has another value than its default."""
    changes = deepcopy(SHORT)
    for key in kind.settings:
        *sections, name = key.split(".")
        within = changes
        for section in sections:
            within = within.setdefault(section, {})
        parent: Any = Config()
        for section in sections:
            parent = getattr(parent, section)
        within[name] = FIXED[key] if key in FIXED else _changed(parent, name)
    return validate(changes, source=Path("of the battery"))


def _changed(section: BaseModel, name: str) -> Any:
    """Another value of a setting, by its type; of a section all values but its names."""
    value = getattr(section, name)
    if isinstance(value, BaseModel):
        made: dict[str, Any] = {}
        for key in type(value).model_fields:
            inner = getattr(value, key)
            if not isinstance(inner, str) or get_args(type(value).model_fields[key].annotation):
                made[key] = _changed(value.model_copy(update=made), key)
        return made
    for candidate in _candidates(value, get_args(type(section).model_fields[name].annotation)):
        try:
            type(section).model_validate({**section.model_dump(), name: candidate})
        except ValidationError:
            continue
        return candidate
    raise AssertionError(f"{type(section).__name__}.{name} = {value!r}: no other value is known; add it to FIXED")


def _candidates(value: Any, choices: tuple[Any, ...]) -> list[Any]:
    if isinstance(value, bool):
        return [not value]
    if isinstance(value, int):
        return [value // 8 if value > 10 else value - 1, value + 1]
    if isinstance(value, float):
        return [value / 2 or 0.1, 1 - value]
    if isinstance(value, tuple):
        return [(6,) if value and isinstance(value[0], int) else value[::-1]]
    return [choice for choice in reversed(choices) if choice != value and choice is not None]
