"""Members with test-time augmentation: derived from another member by averaging over views, with the same weights.

`ensembles/tta/<member>.json` records the views selected for a member on out-of-sample rows; if there are any,
`<member>_tta` is in the catalog as long as the member's files do not change. Its fold networks average over the same
views, so that it has out-of-fold predictions and aligned embeddings like the member.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable
from dataclasses import replace
from typing import Any

from utils.core.artifacts import digest_of
from utils.core.config import Config
from utils.core.errors import UserError
from utils.core.parsed_files import record_once
from utils.core.record_forms import Each, Form
from utils.core.workspace import Workspace
from utils.predictions.catalog import IMPORTED, Catalog, Member

logger = logging.getLogger("disease_pipeline")

VERSION = 1  # incremented whenever the computation of the same views changes
AGAIN = "Remove it, then run build-ensemble again"
FORM: Form = {
    "key": str,
    "networks": str,
    "views": Each(str, list),
    "oof?": {"path": str, "sha256": str, "rows": int, "folds": int, "accuracy": float},
    "reason?": str,
    "chosen_on_all_rows?": Each(str, list),
    "log_loss_gain?": float,
    "log_loss_gain_ci95?": Each(float, list, count=2),
}


def name_with_views(member: str) -> str:
    """Name of the member that averages `member` over views."""
    return f"{member}_tta"


def networks_digest(member: Member) -> str:
    """Digest of a member's networks, including fold networks, and of its out-of-fold predictions."""
    folds = [[entry["stage"], entry["sha256"]] for entry in member.checkpoints if entry["stage"].startswith("fold")]
    return digest_of([VERSION, member.digest, folds, member.oof["sha256"] if member.oof else None])


def record_of(workspace: Workspace, member: str) -> dict[str, Any] | None:
    """The record of the last selection of views for a member, or None. Raises UserError for a damaged record."""
    return record_once(workspace.view_choice(member), remedy=AGAIN, form=FORM)


def derive(member: Member, record: dict[str, Any]) -> Member:
    """The member that averages `member` over the views of a record."""
    oof = record.get("oof")
    return replace(
        member,
        name=name_with_views(member.name),
        source="derived",
        parents=(member.name,),
        views=tuple(record["views"]),
        digest=digest_of([VERSION, member.digest, list(record["views"])]),
        oof=None if oof is None else {**oof, "checked": True},  # compared with its fold networks when it was created
        exports=(),
        metrics=None,
        recorded_test_accuracy=None,
    )


def with_views(workspace: Workspace, current: Catalog) -> Catalog:
    """The catalog with the members of the recorded selections instead of those of earlier selections."""
    members = {name: member for name, member in current.members.items() if not member.views}
    derived = {}
    for member in members.values():
        if member.source == IMPORTED or not member.usable or not workspace.view_choice(member.name).is_file():
            continue
        try:
            record = record_of(workspace, member.name)
        except UserError as error:
            logger.warning("%s", error)
            continue
        name = name_with_views(member.name)
        if record and record["views"] and record["networks"] == networks_digest(member) and name not in members:
            derived[name] = derive(member, record)
    return replace(current, members={**members, **derived})


def preferred(catalog: Catalog, config: Config, selected: Iterable[Member]) -> list[Member]:
    """The selected members, sorted by name; with `tta.enable`, replaced by their versions with views, if any."""
    preferred_members: dict[str, Member] = {}
    for member in selected:
        name = name_with_views(member.name)
        with_them = catalog.members.get(name) if config.tta.enable and not member.views else None
        if with_them is not None and with_them.views:
            member = with_them
        preferred_members[member.name] = member
    return [preferred_members[name] for name in sorted(preferred_members)]


def without_views(catalog: Catalog, members: Iterable[Member]) -> tuple[Member, ...]:
    """The members, sorted by name, with members with views replaced by those that they were derived from."""
    origins = (catalog.members.get(member.parents[0], member) if member.views else member for member in members)
    plain = {member.name: member for member in origins}
    return tuple(plain[name] for name in sorted(plain))
