"""The commands `build-ensemble` and `fusion-train`: which sections are on, what is up to date, what is built."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from utils.building import (
    ensembles,
    fitting,
    fusion_builder,
    moe_builder,
    pruning_builder,
    snapshot_builder,
    soup_builder,
)
from utils.core.config import Config, require_enabled
from utils.core.errors import UserError
from utils.core.results import Result
from utils.core.workspace import Workspace
from utils.discovery import discover
from utils.predictions import catalog, extraction
from utils.predictions.catalog import Member
from utils.predictions.extraction import STREAMED_SPLITS
from utils.predictions.store import Store

Section = Callable[[Store, Sequence[Member], bool], Result]
"""Builds what one section of the configuration asks for, from the members; the flag builds it again."""


def build_ensemble(config: Config, workspace: Workspace, *, pick: str | None = None, force: bool = False) -> Result:
    """Build the score-level ensembles that the configuration lists, from honest predictions.

    `pick` takes the place of `pruning.pick`. What is there with equal inputs is kept, unless `force`. Raises UserError
    without catalog or members, and for a `pick` where pruning is off; what could not be built is a failure of the
    result.
    """
    if pick is not None:
        require_enabled(config, pruning_builder.CONFIG_KEY)
        config = config.model_copy(update={"pruning": config.pruning.model_copy(update={"pick": pick})})
    return _of_sections(SECTIONS, config, workspace, force)


def fusion_train(config: Config, workspace: Workspace, *, force: bool = False) -> Result:
    """Train what reads more of the members than their votes, and what runs fewer of them, by `FUSION_SECTIONS`.

    What is there with equal inputs is kept, unless `force`. Raises UserError without catalog or members.
    """
    return _of_sections(FUSION_SECTIONS, config, workspace, force)


def _of_sections(sections: Mapping[str, Section], config: Config, workspace: Workspace, force: bool) -> Result:
    """Run those that are on, over the members that the configuration selects, and join what they tell."""
    wanted = [section for place, section in sections.items() if config.at(f"{place}.enable")]
    if not wanted:
        require_enabled(config, next(iter(sections)))
    found = discover.verified_catalog(config, workspace)
    members = catalog.select(found, config)
    store = Store(config, workspace, found)
    results = [section(store, members, force) for section in wanted]
    store.digests.save()
    lines = [result.text for result in results if result.text]
    lines.append(f"{len(members)} members: {', '.join(member.name for member in members)}")
    lines.append(f"written: {workspace.models}")
    document = {
        **{key: sorted(name for result in results for name in result.document.get(key, ())) for key in KEYS},
        "members": [member.name for member in members],
        "folder": str(workspace.models),
    }
    failures = [failure for result in results for failure in result.failures]
    return Result("\n".join(lines), document, failures, "evaluate")


def score_level(store: Store, members: Sequence[Member], force: bool) -> Result:
    """`runs.score_ensemble`: votes, weights and greedy selection over all the members."""
    config, settings = store.config, store.config.runs.score_ensemble
    unknown = [method for method in settings.methods if method not in ensembles.NAMES]
    failures = [f"{method}: this version builds {', '.join(ensembles.NAMES)}" for method in unknown]
    wanted = [method for method in settings.methods if method in ensembles.NAMES]
    if not wanted:
        raise UserError(
            f"{config.source}: runs.score_ensemble.methods names nothing that can be built "
            f"({', '.join(settings.methods) or 'empty'}); choose from {', '.join(ensembles.NAMES)}"
        )
    fresh = [method for method in wanted if force or not _is_up_to_date(store, members, method)]
    if fresh:
        extraction.ensure(store, members, STREAMED_SPLITS)
        honest = fitting.out_of_sample_rows(store, members)
        for method in fresh:
            recipe = ensembles.COMBINERS[method].configured(config, fitting.member_facts(store, members))
            chosen = honest
            if recipe.learns and settings.fit_rows != "honest":
                chosen = fitting.out_of_sample_rows(store, members, kind=settings.fit_rows)
            fitting.build(store, ensembles.NAMES[method], method, recipe, members, chosen)
    names = [ensembles.NAMES[method] for method in wanted]
    built = [ensembles.NAMES[method] for method in fresh]
    lines = [fitting.summary_line(store, name, "built" if name in built else "up to date") for name in names]
    kept = [name for name in names if name not in built]
    return Result("\n".join(lines), {"built": built, "up_to_date": kept}, failures)


def _is_up_to_date(store: Store, members: Sequence[Member], method: str) -> bool:
    wanted = fitting.inputs_digest(store.config, store, members, method)
    return ensembles.stored_digest(store.workspace, ensembles.NAMES[method]) == wanted


KEYS = ("built", "up_to_date")
SECTIONS: dict[str, Section] = {
    soup_builder.CONFIG_KEY: soup_builder.model_soups,  # first: what it makes may be a member of the others
    snapshot_builder.CONFIG_KEY: snapshot_builder.snapshots,
    "runs.score_ensemble": score_level,
    pruning_builder.CONFIG_KEY: pruning_builder.pruned,
}
FUSION_SECTIONS: dict[str, Section] = {
    fusion_builder.CONFIG_KEY: fusion_builder.fusion,
    moe_builder.CASCADE: moe_builder.cascades,
    moe_builder.MOE: moe_builder.mixture,
}
