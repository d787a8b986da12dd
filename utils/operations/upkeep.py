"""The commands `status` (contents of the workspace and next command) and `clean` (removable files)."""

from __future__ import annotations

import re
import shlex
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from utils import base_back
from utils.building import listing as ensemble_listing
from utils.building.builder_protocol import CURRENT, MISSING
from utils.core import caches, locks, remembered
from utils.core.artifacts import read_record
from utils.core.caches import Item, format_bytes
from utils.core.config import Config
from utils.core.display_text import first_names
from utils.core.errors import ConfigError, UserError, cannot_write
from utils.core.record_forms import Each, Form
from utils.core.results import Result
from utils.core.workspace import SPLITS, Workspace
from utils.exporting import export_folder
from utils.operations import inventory
from utils.operations.inventory import Inventory
from utils.predictions.catalog import MADE

MOST_REASONS = 5
UNFINISHED = re.compile(rf"\..+_(?:{MADE})\.[a-z0-9_]{{8}}\.partial\.pth")
"""This project's checkpoints under temporary names, in a folder that the base pipeline may write to as well."""

RECOVERY_STATE: Form = {"units?": Each({"files": Each(list)})}
"""{unit: its entry with {file: [size, modification time in ns, SHA-256]}}"""
TRAIN_ANEW = "Remove it, and the base pipeline trains anew"


@dataclass(frozen=True)
class Group:
    """Removable items of one kind."""

    what: str
    items: tuple[Item, ...]
    option: str | None
    """Option that removes them; without it they are only listed."""

    @property
    def size(self) -> int:
        """Bytes of all items."""
        return sum(item.size for item in self.items)


def status(config: Config, workspace: Workspace, *, force: bool = False) -> Result:
    """Report built and stale parts, disk usage and the next command. Writes nothing; `force` has no effect."""
    listing = inventory.take(config, workspace)
    sizes = {
        "decoded_images": sum(item.size for item in caches.all_packs(workspace.image_cache)),
        "predictions": caches.total_size(workspace.all_predictions) + caches.total_size(workspace.all_oof),
        "embeddings": caches.total_size(workspace.all_embeddings),
        "ensembles": caches.total_size(workspace.models),
        "training_progress": caches.total_size(workspace.training_progress),
        "temporary": sum(item.size for item in _temporary(workspace)),
    }
    writer, locked = _writer(workspace)
    following = _next_command(listing)
    imported = listing.content is not None and bool(listing.content.imported())
    base_command = _base_command(workspace) if following == "discover" and not imported else None
    text = [
        f"workspace    {workspace.base}{f'; ours in {workspace.output}' if workspace.output else ''}",
        f"configured   {_configuration_words(config, workspace)}",
        *([f"writing      {locked}"] if locked else []),
        f"catalog      {_catalog_words(listing)}",
        *_prediction_lines(listing),
        *_lines("ensembles", _ensemble_lines(listing)),
        *([f"evaluation   {listing.evaluation}"] if listing.content else []),
        *_lines("disk", _size_words(sizes, config)),
        *_links(workspace),
        *(f"problem: {problem}" for problem in listing.problems),
    ]
    if base_command:
        text.append(f"next: {base_command}")
    elif following is None and not listing.problems:
        text.append("nothing is missing or stale")
    document = {
        "workspace": str(workspace.base),
        "output": None if workspace.output is None else str(workspace.output),
        "writer": writer,
        "catalog": asdict(listing.catalog) | {"members": sorted(listing.content.members) if listing.content else []},
        "predictions": {
            name: {split: asdict(state) for split, state in states.items()}
            for name, states in listing.predictions.items()
        },
        "ensembles": {name: asdict(state) for name, state in listing.ensembles.items()},
        "configuration": str(config.source),
        "unlisted": list(listing.unlisted),
        "evaluation": asdict(listing.evaluation),
        "bytes": sizes,
        "quota_gb": config.cache.quota_gb,
        "problems": list(listing.problems),
    }
    return Result("\n".join(text), document, next=None if base_command else following)


def clean(
    config: Config,
    workspace: Workspace,
    *,
    confirm: bool = False,
    temporary: bool = False,
    cache: bool = False,
    stale: bool = False,
    unlisted: bool = False,
    force: bool = False,
) -> Result:
    """List removable files, and remove them with `confirm`.

    These are temporary files, predictions of members that no longer exist and progress of finished trainings; with
    `cache` also the decoded images, with `stale` also stale ensembles, with `unlisted` also those that the
    configuration does not request. `temporary` removes only files under temporary names, and needs no `confirm`. Other
    files of the base pipeline and anything behind a symbolic link are never removed (`force` has no effect). Items that
    cannot be removed are failures of the result. Raises UserError for a damaged recovery state, which records finished
    trainings.
    """
    if temporary and (confirm or cache or stale or unlisted):
        raise ConfigError(
            "clean --temporary: takes none of --confirm, --cache, --stale and --unlisted; it removes at once"
        )
    groups = [Group("temporary files", tuple(_temporary(workspace)), None)]
    if not temporary:
        groups += _removable(config, workspace)
    switches = {"--cache": cache, "--stale": stale, "--unlisted": unlisted}
    options = [option for option, is_on in switches.items() if is_on]
    allowed = {None, *options}
    groups_to_remove = [group for group in groups if group.option in allowed]
    removed, failures = _remove(groups_to_remove) if confirm or temporary else ([], [])
    lines = []
    for group in groups:
        note = "" if group.option in allowed else f"  (stay, unless {group.option})"
        lines.append(f"{group.what:38} {len(group.items):>5}  {format_bytes(group.size):>8}{note}")
        lines += [f"  {item.name}  {format_bytes(item.size)}" for item in group.items if len(group.items) <= 20]
    lines += _links(workspace)
    waiting = not (confirm or temporary) and any(group.items for group in groups_to_remove)
    if confirm or temporary:
        lines.append(f"removed: {len(removed)}, {format_bytes(sum(item.size for item in removed))}")
    else:
        lines.append("nothing is removed without --confirm" if waiting else "nothing to remove")
    document = {
        "groups": [
            {
                "what": group.what,
                "option": group.option,
                "bytes": group.size,
                "items": [{"name": item.name, "bytes": item.size, "path": str(item.paths[0])} for item in group.items],
            }
            for group in groups
        ],
        "removed": [str(item.paths[0]) for item in removed],
        "bytes_removed": sum(item.size for item in removed),
    }
    return Result("\n".join(lines), document, failures, " ".join(["clean", *options, "--confirm"]) if waiting else None)


def _remove(groups: list[Group]) -> tuple[list[Item], list[str]]:
    removed, failures = [], []
    for group in groups:
        for item in group.items:
            try:
                caches.remove(item)
                removed.append(item)
            except OSError as error:
                failures.append(str(cannot_write(item.paths[0], error)))
    return removed, failures


def _temporary(workspace: Workspace) -> list[Item]:
    """Leftovers in folders that only this project writes, and old ones in the cache shared with the base pipeline."""
    folders = [workspace.ensembles, workspace.scores, *([workspace.exports] if workspace.output else [])]
    items = [
        item
        for folder in folders
        if not _linked(workspace, folder)
        for item in caches.temporary_files(folder, shared=False)
    ]
    derived_items = (
        [] if _linked(workspace, workspace.derived_checkpoints) else caches.list_children(workspace.derived_checkpoints)
    )
    items += [item for item in derived_items if UNFINISHED.fullmatch(item.name)]
    items += [] if _linked(workspace, workspace.exports) else export_folder.unfinished_folders(workspace.exports)
    return items + caches.temporary_files(workspace.image_cache, shared=True)


def _removable(config: Config, workspace: Workspace) -> list[Group]:
    listing = inventory.take(config, workspace)
    orphans: list[Item] = []
    if listing.content is not None:
        members = listing.content.members
        for folder in (workspace.all_predictions, workspace.all_embeddings):
            items = [] if _linked(workspace, folder) else caches.list_children(folder)
            orphans += [item for item in items if item.paths[0].is_dir() and item.name not in members]
        oof_names = {workspace.oof(name).name for name in members}
        for folder in (workspace.all_oof, workspace.all_training_data):
            items = [] if _linked(workspace, folder) else caches.list_children(folder)
            orphans += [item for item in items if item.paths[0].suffix == ".npz" and item.name not in oof_names]
    saved = [] if _linked(workspace, workspace.models) else caches.list_children(workspace.models)
    stale = listing.stale_ensembles()
    old = [_saved_item(item, f": {stale[item.name]}") for item in saved if item.name in stale]
    unread = ensemble_listing.without_readers(workspace, listing.unlisted)
    apart = [_saved_item(item) for item in saved if item.name in unread and item.name not in stale]
    return [
        Group("predictions of members that are gone", tuple(orphans), None),
        Group("progress of finished trainings", tuple(_finished_progress(workspace)), None),
        Group("decoded images", tuple(caches.image_packs(workspace.image_cache)), "--cache"),
        Group(
            "embeddings of images by frozen networks", tuple(caches.image_embeddings(workspace.image_cache)), "--cache"
        ),
        Group("stale ensembles", tuple(old), "--stale"),
        Group("ensembles not in the configuration", tuple(apart), "--unlisted"),
    ]


def _saved_item(item: Item, why: str = "") -> Item:
    """An ensemble's folder; `ensemble.json` is removed first, since it defines the ensemble."""
    return Item(f"{item.name}{why}", (item.paths[0] / "ensemble.json", *item.paths), item.size, item.modified)


def _finished_progress(workspace: Workspace) -> list[Item]:
    """Progress files left by runs that were killed right after their training was recorded as finished.

    An unfinished training has no entry, or its progress file is newer than the files of its older entry.
    """
    if workspace.output is not None or _linked(workspace, workspace.training_progress):
        return []
    state = read_record(workspace.recovery_state, remedy=TRAIN_ANEW, form=RECOVERY_STATE) or {}
    written = {}
    for unit, entry in (state.get("units") or {}).items():
        backbone, _, kind = unit.partition(" ")
        times = [file[1] for file in entry["files"].values() if len(file) == 3 and isinstance(file[1], int)]
        written[f"{backbone}_{kind.replace(' ', '')}.pth"] = max(times, default=0) / 1e9
    files = caches.list_children(workspace.training_progress)
    return [item for item in files if item.modified <= written.get(item.name, 0)]


def _linked(workspace: Workspace, folder: Path) -> Path | None:
    """The symbolic link on the path from the workspace to a folder, if any; nothing behind it may be removed."""
    folders = [
        path for path in (folder, *folder.parents) if path.is_relative_to(workspace.root) and path != workspace.root
    ]
    return next((path for path in (folders or [folder]) if path.is_symlink()), None)


def _links(workspace: Workspace) -> list[str]:
    """A line for each of this project's folders behind a symbolic link."""
    folders = (
        *(workspace.ensembles, workspace.all_predictions, workspace.all_embeddings, workspace.all_oof),
        workspace.all_training_data,
        *(workspace.models, workspace.scores, workspace.image_cache),
    )
    links = dict.fromkeys(link for folder in folders if (link := _linked(workspace, folder)))
    return [f"symbolic link, not gone through: {link}" for link in links]


def _writer(workspace: Workspace) -> tuple[dict[str, Any] | None, str | None]:
    """The process that is writing now, as a record and in words."""
    try:
        owner = locks.owner_of(workspace.lock)
    except UserError as error:
        return None, str(error)
    if owner is None:
        return None, None
    dead = locks.is_dead(owner, workspace.lock)
    words = f"{owner}{' (no longer running; the next command that writes takes over)' if dead else ''}"
    return asdict(owner) | {"dead": dead}, words


def _next_command(listing: Inventory) -> str | None:
    if listing.catalog.state != CURRENT:
        return "discover"
    if listing.problems:
        return None
    for command, names in listing.requested.items():
        if any(listing.ensembles[name].state != CURRENT for name in names):
            return command
    return None if listing.evaluation.state == CURRENT else "evaluate"


def _base_command(workspace: Workspace) -> str | None:
    """The command of the base pipeline that is needed before discovery; None if there is none."""
    program = str(base_back.locate() / "src" / "main.py")
    command = shlex.join(["python", program, "--workspace", str(workspace.base)])
    if not workspace.checkpoints.is_dir() or not any(workspace.checkpoints.glob("*.pth")):
        return f"train networks: make demo, or {command}"
    return None if all((workspace.split_dir / name).is_dir() for name in SPLITS) else f"{command} --stages split"


def _catalog_words(listing: Inventory) -> str:
    if listing.content is None:
        return str(listing.catalog)
    usable = sum(member.usable for member in listing.content.members.values())
    counts = {kind: sum(p.severity == kind for p in listing.content.problems) for kind in ("error", "warning")}
    words = first_names(listing.catalog.reasons, MOST_REASONS, "; ")
    words += "; " if words else ""
    return (
        f"{listing.catalog.state}: {words}{usable} of {len(listing.content.members)} members usable, "
        f"{counts['error']} error(s), {counts['warning']} warning(s)"
    )


def _configuration_words(config: Config, workspace: Workspace) -> str:
    """The configuration file and, for a stored configuration, its origin."""
    origin = remembered.origin_of(workspace.config) if config.is_remembered else None
    return f"{config.source}{f', from {origin[0]}' if origin else ''}"


def _ensemble_lines(listing: Inventory) -> list[str]:
    lines = [f"{name}  {state}" for name, state in listing.ensembles.items() if name not in listing.unlisted]
    apart = [ensemble_listing.note(listing.unlisted)] if listing.unlisted else []
    return [*lines, *apart] or ["none"]


def _prediction_lines(listing: Inventory) -> list[str]:
    if not listing.predictions:
        return []
    states = [(name, split, state) for name, splits in listing.predictions.items() for split, state in splits.items()]
    current = sum(state.state == CURRENT for _, _, state in states)
    missing = sum(state.state == MISSING for _, _, state in states)
    lines = [f"{current} of {len(states)} current (members on val and test), {missing} missing"]
    return _lines(
        "predictions", lines + [f"{n} on {s}  {t}" for n, s, t in states if t.state not in (CURRENT, MISSING)]
    )


def _size_words(sizes: dict[str, int], config: Config) -> list[str]:
    quota = config.cache.quota_gb
    limit = "no limit" if quota is None else f"at most {quota:g} GB kept"
    words = [f"{format_bytes(size):>8}  {name.replace('_', ' ')}" for name, size in sizes.items()]
    return [f"{words[0]} ({limit}: cache.quota_gb)", *words[1:]]


def _lines(title: str, lines: list[str]) -> list[str]:
    return [f"{title if number == 0 else '':12} {line}" for number, line in enumerate(lines)]
