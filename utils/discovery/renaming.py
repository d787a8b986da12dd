"""`discover --rename OLD=NEW`: renames an imported or declared member, with all its stored files.

The files get a second name by hard links, then one write of the catalog replaces OLD by NEW, then the old names are
removed. A process killed before the write leaves OLD unchanged, one killed after it leaves NEW complete; `clean` lists
the leftovers, and the same command finishes the renaming.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from utils.core import caches
from utils.core.artifacts import link_file, read_json, write_json
from utils.core.config_values import is_name
from utils.core.errors import UserError, nearest_first
from utils.core.links import require_no_symlink
from utils.core.workspace import SPLITS, Workspace
from utils.predictions import catalog
from utils.predictions.catalog import IMPORTED, Catalog, Member, is_declared
from utils.predictions.store import AGAIN


def user_named_members(workspace: Workspace, listed: Catalog | None) -> dict[str, Member]:
    """The members named by the user: imported members and declared networks."""
    members = listed.members if listed else {}
    return {
        name: member for name, member in members.items() if member.source == IMPORTED or is_declared(workspace, member)
    }


def begin(
    workspace: Workspace,
    listed: Catalog | None,
    requests: Sequence[str],
    require_new: Callable[[str, str], None],
) -> tuple[Catalog | None, dict[str, str]]:
    """The catalog with the new names, not yet written, and {old: new} of the requests `OLD=NEW`.

    `require_new(name, where)` raises UserError for an invalid new name. Raises UserError, before anything changes, for
    a member that cannot be renamed.
    """
    names = _parse(requests)
    begun = {old: new for old, new in names.items() if not _is_finished(workspace, listed, old, new)}
    for old, new in begun.items():
        _require_can_go(workspace, listed, old, new)
        require_new(new, f"--rename {old}={new}")
    return (_renamed(workspace, listed, begun) if listed and begun else listed), names


def _parse(requests: Sequence[str]) -> dict[str, str]:
    """{old: new} of `OLD=NEW`. Raises UserError for another format, and for a duplicate name."""
    names: dict[str, str] = {}
    for text in requests:
        old, _, new = text.rpartition("=")  # an old name may contain `=`, a new one may not
        if not old or not new:
            raise UserError(f"--rename {text}: expected OLD=NEW, such as --rename a.npz=a")
        if {old, new} & {*names, *names.values()}:
            raise UserError(f"--rename {text}: one of the names occurs in another --rename. Rename them one by one")
        names[old] = new
    return names


def _require_can_go(workspace: Workspace, listed: Catalog | None, old: str, new: str) -> None:
    """Raise UserError if `old` is not a member that can be renamed."""
    members = user_named_members(workspace, listed)
    if old not in members:
        done = f"; {new} is there: if it was {old} before, nothing is left to do" if new in members else ""
        raise UserError(
            f"--rename {old}={new}: {old} is no network that was declared with --add, nor imported{done}"
            f"{nearest_first(old, members, 'These were')}. A network in {workspace.checkpoints} is renamed by its files"
        )
    base_files = [*catalog.checkpoint_files(workspace).get(old, {}).values(), workspace.base_oof(old)]
    base_files += [workspace.kfold_results(old), workspace.training_metrics(old)]
    moves = [f"mv {path} {path.with_name(new + path.name.removeprefix(old))}" for path in base_files if path.is_file()]
    if is_declared(workspace, members[old]) and moves:
        raise UserError(
            f"--rename {old}={new}: files in the base pipeline's folders bear the name {old}, which only you may "
            f"rename. Type, then rename again: {'; '.join(moves)}"
        )


def _is_finished(workspace: Workspace, listed: Catalog | None, old: str, new: str) -> bool:
    """Whether an interrupted renaming had written the catalog, so that leftovers of `old` belong to member `new`."""
    member = user_named_members(workspace, listed).get(new)
    if member is None or listed is None or old in listed.members or not is_name(old):
        return False
    records = (read_json(workspace.predictions(old, split) / "record.json", remedy=AGAIN) for split in SPLITS)
    return any(isinstance(record, dict) and record.get("member_digest") == member.digest for record in records)


def _renamed(workspace: Workspace, listed: Catalog, names: Mapping[str, str]) -> Catalog:
    """The catalog with the new names; afterwards, the files of the members have both names on disk."""
    members = {}
    for name, member in listed.members.items():
        new = names.get(name)
        if new is not None:
            _link(workspace, name, new)
            oof = member.oof
            if oof is not None and oof["path"] == workspace.relative(workspace.oof(name)):
                oof = {**oof, "path": workspace.relative(workspace.oof(new))}
            member = replace(member, name=new, oof=oof)
        members[member.name] = member
    problems = tuple(
        replace(problem, member=names.get(problem.member or "", problem.member)) for problem in listed.problems
    )
    return replace(listed, members=dict(sorted(members.items())), problems=problems)


def _folders(workspace: Workspace, name: str) -> tuple[Path, Path]:
    return workspace.all_embeddings / name, workspace.all_predictions / name


def _link(workspace: Workspace, old: str, new: str) -> None:
    """Give all stored files of a member a second name; leftovers of an interrupted renaming are replaced."""
    for source, target in zip(_folders(workspace, old), _folders(workspace, new), strict=True):
        for folder in (source, *(path for path in source.rglob("*") if path.is_dir()), target):
            require_no_symlink(folder)
        if target.is_dir():
            shutil.rmtree(target)
        for entry in caches.walk_files(source):
            path = Path(entry.path)
            link = target / path.relative_to(source)
            record = read_json(path, remedy=AGAIN) if path.suffix == ".json" else None
            if isinstance(record, dict) and record.get("member") == old:
                write_json(link, record | {"member": new})
            elif not caches.TEMPORARY.fullmatch(path.name):
                link_file(path, link)
    for file_of in (workspace.oof, workspace.training_data):
        if file_of(old).is_file():
            link_file(file_of(old), file_of(new))


def remove_old_names(workspace: Workspace, names: Mapping[str, str]) -> None:
    """Remove the old names from disk, after the catalog with the new ones was written."""
    for old in names:
        workspace.oof(old).unlink(missing_ok=True)
        workspace.training_data(old).unlink(missing_ok=True)
        for folder in _folders(workspace, old):  # predictions last, since `_is_finished` reads their records
            if folder.is_dir() and not folder.is_symlink():
                shutil.rmtree(folder)


def rename_messages(workspace: Workspace, names: Mapping[str, str]) -> list[str]:
    """One message for each renaming."""
    messages = []
    for old, new in names.items():
        ensembles = _built_with(workspace, old)
        stale = f"; built with {old}, so build again: {', '.join(ensembles)}" if ensembles else ""
        messages.append(f"renamed: {old} is {new} now{stale}")
    return messages


def _built_with(workspace: Workspace, old: str) -> list[str]:
    """Names of the saved ensembles that contain a member or had it as a candidate."""
    built = []
    for path in sorted(workspace.models.glob("*/ensemble.json")):
        try:
            record = read_json(path, remedy=AGAIN)
        except UserError:  # `status` and `evaluate` report damaged records
            continue
        listed = [record.get(key) for key in ("members", "candidates")] if isinstance(record, dict) else []
        if any(isinstance(names, list) and old in names for names in listed):
            built.append(path.parent.name)
    return built
