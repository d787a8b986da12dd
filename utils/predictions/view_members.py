"""Members with test-time augmentation: derived from another by views, without weights of their own.

`ensembles/tta/<member>.json` records the views that out-of-sample rows chose for a member; where it chose some,
`<member>_tta` is in the catalog as long as the member's files stay the same. Its fold networks average over the same
views, so that it has out-of-fold predictions and aligned embeddings like the member itself.
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

VERSION = 1  # raised whenever the same views would be made in another way
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
    """Name of the member that averages another over views."""
    return f"{member}_tta"


def networks_digest(member: Member) -> str:
    """Digest of a member's networks, those of the folds included, and of its out-of-fold predictions."""
    folds = [[entry["stage"], entry["sha256"]] for entry in member.checkpoints if entry["stage"].startswith("fold")]
    return digest_of([VERSION, member.digest, folds, member.oof["sha256"] if member.oof else None])


def record_of(workspace: Workspace, member: str) -> dict[str, Any] | None:
    """What the last choice of views for a member has recorded. Raises UserError for a damaged record."""
    return record_once(workspace.view_choice(member), remedy=AGAIN, form=FORM)


def derive(member: Member, record: dict[str, Any]) -> Member:
    """The member that averages another over the views of a record."""
    oof = record.get("oof")
    return replace(
        member,
        name=name_with_views(member.name),
        source="derived",
        parents=(member.name,),
        views=tuple(record["views"]),
        digest=digest_of([VERSION, member.digest, list(record["views"])]),
        oof=None if oof is None else {**oof, "checked": True},  # its fold networks were compared when it was made
        exports=(),
        metrics=None,
        recorded_test_accuracy=None,
    )


def with_views(workspace: Workspace, current: Catalog) -> Catalog:
    """The catalog with the members that the recorded choices give, in place of those that earlier ones gave."""
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
    """The selected members, with views in place of those that have them, sorted by name, where `tta` is on."""
    chosen: dict[str, Member] = {}
    for member in selected:
        name = name_with_views(member.name)
        with_them = catalog.members.get(name) if config.tta.enable and not member.views else None
        if with_them is not None and with_them.views:
            member = with_them
        chosen[member.name] = member
    return [chosen[name] for name in sorted(chosen)]


def without_views(catalog: Catalog, members: Iterable[Member]) -> tuple[Member, ...]:
    """The members, those with views replaced by what they were derived from, sorted by name."""
    origins = (catalog.members.get(member.parents[0], member) if member.views else member for member in members)
    plain = {member.name: member for member in origins}
    return tuple(plain[name] for name in sorted(plain))
