"""`discover --rename OLD=NEW`: an imported or declared member under another name, with everything stored of it.

Files are given their second name first, then the catalog names NEW instead of OLD in one write, then the first names
go. A kill before that write leaves OLD as it was, a kill after it leaves NEW whole; what is over is nobody's by the
catalog, so that `clean` lists it, and the same command goes on.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from utils.core import caches
from utils.core.artifacts import link_file, read_json, require_no_symlink, write_json
from utils.core.config import is_name
from utils.core.errors import UserError, did_you_mean
from utils.core.workspace import SPLITS, Workspace
from utils.predictions import catalog
from utils.predictions.catalog import IMPORTED, TIMM, Catalog, Member
from utils.predictions.store import AGAIN


def user_named_members(found: Catalog | None) -> dict[str, Member]:
    """The members whose names the user has chosen here: imported ones and declared networks."""
    members = found.members if found else {}
    return {name: one for name, one in members.items() if one.source == IMPORTED or is_declared(one)}


def is_declared(member: Member) -> bool:
    """Whether it is a network of timm that was declared with --add."""
    return member.architecture.startswith(TIMM) and member.source == "trained"


def begin(
    workspace: Workspace,
    found: Catalog | None,
    asked: Sequence[str],
    require_new: Callable[[str, str], None],
) -> tuple[Catalog | None, dict[str, str]]:
    """The catalog with the new names, which is not written yet, and {old: new}.

    `require_new(name, where)` raises UserError for a name that cannot be given. So does this, before anything changes,
    for what cannot be renamed.
    """
    names = _parse(asked)
    begun = {old: new for old, new in names.items() if not _is_finished(workspace, found, old, new)}
    for old, new in begun.items():
        _require_can_go(workspace, found, old, new)
        require_new(new, f"--rename {old}={new}")
    return (_renamed(workspace, found, begun) if found and begun else found), names


def _parse(asked: Sequence[str]) -> dict[str, str]:
    """{old: new} of `OLD=NEW`. Raises UserError for another form, and for a name that stands there twice."""
    names: dict[str, str] = {}
    for text in asked:
        old, _, new = text.rpartition("=")  # an old name may hold anything, a new one no `=`
        if not old or not new:
            raise UserError(f"--rename {text}: expected OLD=NEW, such as --rename a.npz=a")
        if {old, new} & {*names, *names.values()}:
            raise UserError(f"--rename {text}: one of the names stands in another --rename. Rename them one by one")
        names[old] = new
    return names


def _require_can_go(workspace: Workspace, found: Catalog | None, old: str, new: str) -> None:
    """Raise UserError where `old` is no member whose name can be changed here."""
    members = user_named_members(found)
    if old not in members:
        done = f"; {new} is there: if it was {old} before, nothing is left to do" if new in members else ""
        raise UserError(
            f"--rename {old}={new}: {old} is no network that was declared with --add, nor imported{done}; these were: "
            f"{', '.join(members) or 'none'}{did_you_mean(old, members)}. A network in {workspace.checkpoints} is "
            "renamed by its files"
        )
    theirs = [*catalog.checkpoint_files(workspace).get(old, {}).values(), workspace.base_oof(old)]
    theirs += [workspace.kfold_results(old), workspace.training_metrics(old)]
    moves = [f"mv {path} {path.with_name(new + path.name.removeprefix(old))}" for path in theirs if path.is_file()]
    if is_declared(members[old]) and moves:
        raise UserError(
            f"--rename {old}={new}: files in the base pipeline's folders bear the name {old}, which only you may "
            f"rename. Type, then rename again: {'; '.join(moves)}"
        )


def _is_finished(workspace: Workspace, found: Catalog | None, old: str, new: str) -> bool:
    """Whether a renaming was stopped when the catalog named `new` already: what is left of `old` is of that member."""
    member = user_named_members(found).get(new)
    if member is None or found is None or old in found.members or not is_name(old):
        return False
    records = (read_json(workspace.predictions(old, split) / "record.json", remedy=AGAIN) for split in SPLITS)
    return any(isinstance(record, dict) and record.get("member_digest") == member.digest for record in records)


def _renamed(workspace: Workspace, found: Catalog, names: Mapping[str, str]) -> Catalog:
    """The catalog with the new names; what is stored of the members has both names on disk from now on."""
    members = {}
    for name, member in found.members.items():
        new = names.get(name)
        if new is not None:
            _link(workspace, name, new)
            oof = member.oof
            if oof is not None and oof["path"] == workspace.relative(workspace.oof(name)):
                oof = {**oof, "path": workspace.relative(workspace.oof(new))}
            member = replace(member, name=new, oof=oof)
        members[member.name] = member
    problems = tuple(replace(one, member=names[one.member]) if one.member in names else one for one in found.problems)
    return replace(found, members=dict(sorted(members.items())), problems=problems)


def _folders(workspace: Workspace, name: str) -> tuple[Path, Path]:
    return workspace.all_embeddings / name, workspace.all_predictions / name


def _link(workspace: Workspace, old: str, new: str) -> None:
    """Give everything stored of a member its second name; what a stopped renaming left there is replaced."""
    for source, target in zip(_folders(workspace, old), _folders(workspace, new), strict=True):
        for folder in (source, *(path for path in source.rglob("*") if path.is_dir()), target):
            require_no_symlink(folder)
        if target.is_dir():
            shutil.rmtree(target)
        for entry in caches.walk_files(source):
            path = Path(entry.path)
            place = target / path.relative_to(source)
            record = read_json(path, remedy=AGAIN) if path.suffix == ".json" else None
            if isinstance(record, dict) and record.get("member") == old:
                write_json(place, record | {"member": new})
            elif not caches.TEMPORARY.fullmatch(path.name):
                link_file(path, place)
    if workspace.oof(old).is_file():
        link_file(workspace.oof(old), workspace.oof(new))


def remove_old_names(workspace: Workspace, names: Mapping[str, str]) -> None:
    """Take the old names off the disk; the catalog that names the new ones must be written."""
    for old in names:
        workspace.oof(old).unlink(missing_ok=True)
        for folder in _folders(workspace, old):  # predictions last: by their records `_is_finished` knows them
            if folder.is_dir() and not folder.is_symlink():
                shutil.rmtree(folder)


def rename_messages(workspace: Workspace, names: Mapping[str, str]) -> list[str]:
    """What a person reads of each renaming."""
    found = []
    for old, new in names.items():
        ensembles = _built_with(workspace, old)
        stale = f"; built with {old}, so build again: {', '.join(ensembles)}" if ensembles else ""
        found.append(f"renamed: {old} is {new} now{stale}")
    return found


def _built_with(workspace: Workspace, old: str) -> list[str]:
    """Names of the saved ensembles that need a member, or were chosen from it."""
    found = []
    for path in sorted(workspace.models.glob("*/ensemble.json")):
        try:
            record = read_json(path, remedy=AGAIN)
        except UserError:  # `status` and `evaluate` name it
            continue
        listed = [record.get(key) for key in ("members", "candidates")] if isinstance(record, dict) else []
        if any(isinstance(names, list) and old in names for names in listed):
            found.append(path.parent.name)
    return found
