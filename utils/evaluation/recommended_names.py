"""The names `recommended` (`best`) and `recommended_fast`, which `--model-name` accepts instead of a model's name."""

from __future__ import annotations

from collections.abc import Iterable

from utils.building import ensembles, listing, recommendation
from utils.building.command_hints import build_command
from utils.core.artifacts import read_record
from utils.core.errors import UserError, nearest_first
from utils.evaluation import scoring
from utils.evaluation.evaluation_records import RANKING
from utils.predictions import extraction, fold_networks, member_selection, view_members
from utils.predictions.catalog import Member
from utils.predictions.store import Store

RECOMMENDED, FAST = "recommended", "recommended_fast"
BEST = "best"
"""Alias of RECOMMENDED, as in `distillation.teacher`."""


def resolve(store: Store, name: str) -> str:
    """Return the member or ensemble of a name; names of members and ensembles are returned unchanged.

    A voting method is replaced by the name of its ensemble. Raises UserError for `recommended_fast` without a current
    evaluation, which measures latencies.
    """
    saved = ensembles.names(store.workspace)
    if name not in (RECOMMENDED, BEST, FAST) or name in saved or name in store.catalog.members:
        return f"{name}_ensemble" if name not in saved and f"{name}_ensemble" in saved else name
    return _fast_name(store) if name == FAST else recommended_name(store)


def unknown_name(name: str, saved: Iterable[str], members: Iterable[str]) -> UserError:
    """Return the error for an unknown name, with similar names and the command that builds it if there is one."""
    available = [*saved, *members, RECOMMENDED, FAST]
    buildable = [*ensembles.NAMES, *ensembles.NAMES.values(), *ensembles.COMBINERS]
    build = f". Build it: {build_command(name)}" if name in buildable else ""
    return UserError(f"--model-name {name}: neither an ensemble nor a member{build}{nearest_first(name, available)}")


def recommended_name(store: Store) -> str:
    """Return the name of the recommended ensemble or member, selected on out-of-sample rows.

    Raises UserError if no member or ensemble can be recommended.
    """
    saved = {name: ensembles.load(store.workspace, name) for name in listing.listed(store.workspace, store.config)}
    selected = member_selection.select(store.catalog, store.config)
    members = {member.name: member for member in (*selected, *view_members.without_views(store.catalog, selected))}
    candidates = {name: member for name, member in sorted(members.items()) if _is_candidate(member, store)}
    current = {
        name: ensemble
        for name, ensemble in saved.items()
        if not any(fold_networks.missing_and_changed(store.catalog.members, ensemble))
    }
    extraction.ensure(store, list(candidates.values()), ("val",))
    name: str = recommendation.recommended(store, candidates, current)["name"]
    return name


def _fast_name(store: Store) -> str:
    """Return the recommended fast model of the newest evaluation on test, which measured latencies."""
    path = store.workspace.ranking("test")
    ranking = read_record(path, remedy="Remove it, then evaluate again", form=RANKING) or {}
    saved = {name: ensembles.load(store.workspace, name) for name in listing.listed(store.workspace, store.config)}
    members = scoring.members_to_score(store.catalog, member_selection.select(store.catalog, store.config), saved)
    again = "Run: python ensemble_orchestrator.py evaluate"
    if ranking.get("inputs_digest") != scoring.inputs_digest(store, saved, members, "test"):
        state = "is of other members, ensembles or settings" if ranking else "is missing"
        raise UserError(f"--model-name {FAST}: {path} {state}; it names the model by measured latencies. {again}")
    name = (ranking.get(FAST) or {}).get("name")
    if name is None:
        raise UserError(
            f"--model-name {FAST}: no latency of a model near the recommended one is measured (imported predictions "
            f"have none). Use --model-name {RECOMMENDED}"
        )
    return str(name)


def _is_candidate(member: Member, store: Store) -> bool:
    """Return whether a member may be recommended; a derived one only if the configuration requests it."""
    is_requested = member.name in store.config.backbones.selected or (member.views and store.config.tta.enable)
    return member.source != "derived" or bool(is_requested)
