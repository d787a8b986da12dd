"""The members that a configuration selects: `backbones.include` and `backbones.exclude`."""

from __future__ import annotations

import logging
from collections.abc import Sequence

from utils import base_back
from utils.core.config import Config
from utils.core.config_values import ALL
from utils.core.display_text import join_names
from utils.core.errors import UserError, nearest_first
from utils.predictions import training_data, view_members
from utils.predictions.catalog import Catalog, Member

logger = logging.getLogger("disease_pipeline")


def select(catalog: Catalog, config: Config) -> list[Member]:
    """The members that the configuration selects, sorted by name.

    Imported members are selected by name, or all of them if `include` has its default value. `all` selects every member
    that is not derived and whose training data is known; a message names the others. A listed backbone that was never
    trained is skipped with a warning; an unknown name is an error. With `tta.enable`, members with views replace those
    that they are derived from. Raises UserError if no member is selected, and LeakageError if `all` selects none
    because the training data of no member is stated.
    """
    include, exclude = config.backbones.include, config.backbones.exclude
    settings = base_back.settings()
    # A mounted BASE-BACK may lack backbones of the specification, but the specification's names are always accepted.
    default = type(config.backbones).model_fields["include"].default
    available = {*getattr(settings, "ALL_BACKBONES", settings.BACKBONES), *default, *catalog.members}
    named = [*(include if include != ALL else ()), *exclude]
    unknown = [name for name in named if name not in available]
    if unknown:
        raise UserError(
            f"{config.source}: backbones.include or backbones.exclude: no member or backbone is called "
            f"{', '.join(map(repr, unknown))}{nearest_first(unknown[0], sorted(available), 'Known')}"
        )
    if include == ALL:
        selected = _all_members(catalog, exclude)
    else:
        selected = _named_members(catalog, config, is_default=include == default)
    usable = sorted(name for name in selected if name in catalog.members and catalog.members[name].usable)
    if not usable:
        if listed := [name for name in selected if name in catalog.members]:
            raise UserError(f"{config.source}: {_unusable(catalog, listed)}")
        raise UserError(
            f"{config.source}: none of {', '.join(selected) or 'an empty list'} is in the catalog, which holds "
            f"{', '.join(sorted(catalog.members))}. Train one of them, or name others in backbones.include"
        )
    return view_members.preferred(catalog, config, [catalog.members[name] for name in usable])


def _unusable(catalog: Catalog, names: Sequence[str]) -> str:
    """The reason why the named members cannot be used, from the first of their errors, and the remedy."""
    errors = [problem for problem in catalog.problems if problem.severity == "error" and problem.member in names]
    reason = f": {errors[0].member}: {errors[0].message} ({errors[0].remedy})" if errors else ""
    others = ", ".join(sorted(name for name, member in catalog.members.items() if member.usable))
    return (
        f"of the selected members none can be used ({', '.join(names)}){reason}. Then type: python "
        f"ensemble_orchestrator.py discover; or name others in backbones.include: {others or 'none is usable'}"
    )


def _named_members(catalog: Catalog, config: Config, *, is_default: bool) -> tuple[str, ...]:
    selected = config.backbones.selected
    imported = catalog.imported()
    if is_default:
        selected += tuple(name for name in imported if name not in (*selected, *config.backbones.exclude))
    missing = [name for name in selected if name not in catalog.members]
    if missing and (not is_default or len(imported) < len(catalog.members)):
        logger.warning("Model %s not found, skipping (train it, then run discover)", ", ".join(missing))
    return selected


def _all_members(catalog: Catalog, exclude: tuple[str, ...]) -> tuple[str, ...]:
    candidates = [name for name in sorted(catalog.members) if name not in exclude]
    derived = [name for name in candidates if catalog.members[name].source == "derived"]
    members = [name for name in candidates if name not in derived]
    usable = [name for name in members if catalog.members[name].usable]
    training_data.require_some_known(catalog, usable)
    unknown = training_data.unknown_names(catalog, members)
    selected = tuple(name for name in members if name not in unknown)
    if unknown:
        logger.warning(
            "backbones.include is all: left out, since their training data is not stated: %s. %s",
            ", ".join(unknown),
            training_data.remedy(catalog, unknown),
        )
    if derived:
        logger.info(
            "backbones.include is all: left out, since they are derived from others: %s. To use one too, list it with "
            "the others in backbones.include",
            join_names(derived),
        )
    return selected
