"""Saved ensembles that the configuration requests; the others are neither ranked nor recommended nor combined.

For an ensemble that was built with `--set`, the configuration with this `--set` decides. An ensemble with a name that
no family generates is always listed.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from utils import ensemble_methods, fusion_methods, moe_methods, stacking_methods
from utils.building import ensembles
from utils.combiners import pruning
from utils.core import config_file
from utils.core.config import Config
from utils.core.errors import UserError
from utils.core.workspace import Workspace

SOUPS = {"uniform_soup": "uniform", "greedy_soup": "greedy", "wise_ft": "wise_ft"}
"""{method of an ensemble: its name in `runs.model_soup.methods`}"""
ALONE = {
    "snapshot": "runs.snapshot_ensemble",
    "distilled": "distillation",
    "meta_fuser": "runs.meta_fuser",
    "tta": "tta",
}
"""{method of an ensemble: the section that requests it}"""


def listed(workspace: Workspace, config: Config, names: Iterable[str] | None = None) -> list[str]:
    """Return those of the saved ensembles, or of `names`, that the configuration requests."""
    requested = {}
    configs: dict[tuple[str, ...], Config] = {}
    for name in ensembles.names(workspace) if names is None else names:
        record = _record(workspace, name)
        overrides = tuple(record.get("overrides") or ())
        if overrides not in configs:
            configs[overrides] = config_file.with_overrides(config, overrides) if overrides else config
        requested[name] = _asks_for(configs[overrides], name, record.get("method"))
    return [name for name, is_listed in requested.items() if is_listed]


def _record(workspace: Workspace, name: str) -> Mapping[str, Any]:
    """Return the record of a saved ensemble; an empty one if it is damaged, which readers of the ensemble report."""
    try:
        return ensembles.record_of(workspace, name) or {}
    except UserError:
        return {}


def unlisted(workspace: Workspace, config: Config) -> list[str]:
    """Return the saved ensembles that the configuration does not request."""
    saved = ensembles.names(workspace)
    requested = listed(workspace, config, saved)
    return [name for name in saved if name not in requested]


def without_readers(workspace: Workspace, names: Iterable[str]) -> list[str]:
    """Return those of `names` that are no input of a saved ensemble outside of `names`, directly or indirectly."""
    candidates = list(names)
    pending = [name for name in ensembles.names(workspace) if name not in candidates]
    read: set[str] = set()
    while pending:
        depends_on = _record(workspace, pending.pop()).get("depends_on")  # a list where latencies were measured
        inputs = set(depends_on.get("inputs") or () if isinstance(depends_on, Mapping) else ()) - read
        read |= inputs
        pending += inputs
    return [name for name in candidates if name not in read]


def note(names: Iterable[str]) -> str:
    """Return the line about ensembles that are not listed."""
    return f"not in the configuration: {', '.join(names)}; `clean --unlisted` removes what no other ensemble reads"


def _asks_for(config: Config, name: str, method: str | None) -> bool:
    if method in ensemble_methods.COMBINERS:
        return name != ensembles.NAMES[method] or _has(config, "runs.score_ensemble", "methods", method)
    if method in SOUPS:
        is_excluded = name.removeprefix(f"{method}_") in config.backbones.exclude
        return not is_excluded and _has(config, "runs.model_soup", "methods", SOUPS[method])
    if method in ALONE:
        return bool(config.at(f"{ALONE[method]}.enable"))
    if method in moe_methods.COMBINERS:
        return bool(config.at(f"runs.{method}.enable"))
    families = (
        (stacking_methods.COMBINERS, "stacking_", "runs.stacking", "meta_learners"),
        (fusion_methods.COMBINERS, "fusion_", "runs.fusion", "fusion_methods"),
        (pruning.COMBINERS, "pruned_", "pruning", "methods"),
    )
    for combiners, prefix, section, key in families:
        if method in combiners:
            return name != method or _has(config, section, key, method.removeprefix(prefix))
    return True


def _has(config: Config, section: str, key: str, item: str) -> bool:
    return bool(config.at(f"{section}.enable")) and item in config.at(f"{section}.{key}")
