"""`import-predictions`: adds members without networks from their predictions; the catalog is written last."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence, Set
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from utils.core.artifacts import FileDigests
from utils.core.config import Config
from utils.core.errors import UserError
from utils.core.results import Result
from utils.core.workspace import SPLITS, Workspace
from utils.discovery import import_checks, imported_members, member_names
from utils.discovery.import_checks import CheckedMember
from utils.discovery.imported_members import SPLIT_OF, ImportedPart, apply_to_each
from utils.predictions import catalog, image_splits
from utils.predictions.catalog import IMPORTED, Catalog, Problem
from utils.predictions.image_splits import ImageSplit
from utils.predictions.prediction_files import Predictions
from utils.predictions.rows import MemberRows, collect_samples
from utils.predictions.store import Store, split_facts, with_imported

logger = logging.getLogger("disease_pipeline")

UP_TO_DATE, REPLACED, NEW = "up to date", "replaced", "imported"


@dataclass(frozen=True)
class ImportContext:
    """The samples, classes and members that imported files are matched with."""

    images: dict[str, ImageSplit] | None
    """{split: images}; None if the samples come only from imported members"""
    staying: Catalog | None
    """The catalog without the members to import; None if there is no catalog"""
    existing_rows: dict[str, dict[str, list[MemberRows]]]
    """{split: {member: rows}} of the other imported members; empty if there are images"""


def import_predictions(config: Config, workspace: Workspace, *, folder: str, force: bool = False) -> Result:
    """Read `folder/<member>/{oof,val,test,train}.npz`, check them together and import all members or none.

    With images, rows are those of the splits and labels those of the class folders; without, both come from the files.
    A member with unchanged content is kept unless `force`; other members of the same name are replaced. All rows are in
    memory at once, as in `build-ensemble`. Raises UserError for invalid files.
    """
    source = Path(folder).expanduser().absolute()
    predictions = imported_members.read_folder(source)
    earlier = _earlier(workspace)
    _require_free_names(workspace, earlier, sorted(predictions))
    context = _import_context(config, workspace, earlier, predictions.keys())
    arrivals, listed = _matched(workspace, context, predictions)
    if context.staying is not None:
        listed = with_imported(config, workspace, listed, context.staying)
    store = Store(config, workspace, listed)
    states = {name: _state(store, earlier, arrival, force=force) for name, arrival in arrivals.items()}
    written = [name for name, state in states.items() if state != UP_TO_DATE]
    for name in written:
        store.require_own_files(name)  # checked before the catalog is written without them
    if earlier is not None and earlier.imported().keys() & set(written):
        _save_without(config, workspace, context)
    for name in written:
        _store(store, arrivals[name])
    if earlier != listed or written:
        catalog.save(workspace, listed)
    return _result(workspace, listed, arrivals, states)


# the workspace ------------------------------------------------------------------------------------------------------


def _earlier(workspace: Workspace) -> Catalog | None:
    """Read the catalog; None, with a warning, if it is damaged and cannot be restored from images."""
    if not workspace.catalog.is_file():
        return None
    try:
        return catalog.read(workspace)
    except UserError as error:
        if workspace.has_images:
            raise
        logger.warning("%s; what was imported before must be imported again", error)
        return None


def _require_free_names(workspace: Workspace, earlier: Catalog | None, names: Sequence[str]) -> None:
    """Raise UserError for invalid names of new members, and for names that other members have too."""
    imported = earlier.imported() if earlier is not None else {}
    existing_members = earlier.members.values() if earlier is not None else ()
    taken_names = dict.fromkeys(catalog.checkpoint_files(workspace), "a network")
    taken_names |= member_names.taken_names(member for member in existing_members if member.name not in imported)
    taken_names |= {path.name: "an ensemble" for path in workspace.models.glob("*")}

    def check(name: str) -> None:
        if name not in imported:
            folders = dict.fromkeys((other for other in names if other != name), "another folder")
            all_taken = taken_names | member_names.taken_names(imported.values()) | folders
            member_names.require_new(name, all_taken, where=f"member {name!r}", remedy="Rename the folder")
        elif name in taken_names:
            raise UserError(f"member {name}: {taken_names[name]} of this workspace has that name. Rename the folder")

    apply_to_each(names, check)


def _import_context(config: Config, workspace: Workspace, earlier: Catalog | None, arriving: Set[str]) -> ImportContext:
    staying = None
    if earlier is not None:
        members = {name: member for name, member in earlier.members.items() if name not in arriving}
        problems = tuple(problem for problem in earlier.problems if problem.member not in arriving)
        staying = replace(earlier, members=members, problems=problems)
        if earlier.has_images:
            store = Store(config, workspace, earlier)
            images = {split: store.images(split) for split in SPLITS}
            store.digests.save()
            return ImportContext(images, staying, {})
    if workspace.has_images:
        digests = FileDigests(workspace.digests)
        images = {split: image_splits.list_images(workspace.split_dir, split, digests) for split in SPLITS}
        digests.save()
        return ImportContext(images, staying, {})
    read_rows = Store(config, workspace, staying).imported_rows if staying is not None else lambda _: {}
    return ImportContext(None, staying, {split: read_rows(split) for split in SPLITS})


# the files -------------------------------------------------------------------------------------------------------


def _matched(
    workspace: Workspace, context: ImportContext, predictions: Mapping[str, Mapping[str, Predictions]]
) -> tuple[dict[str, CheckedMember], Catalog]:
    """The imported members, matched and checked, and a catalog of them and of the remaining members."""
    images, staying = context.images, context.staying
    classes_of_workspace = staying.classes if staying and staying.members else None
    classes_of_workspace = images["train"].classes if images else classes_of_workspace
    classes, problems = imported_members.agree_on_classes(
        predictions, classes_of_workspace, has_images=images is not None
    )
    parts = {
        name: {stem: imported_members.to_workspace_order(part, stem, classes) for stem, part in files.items()}
        for name, files in predictions.items()
    }
    if images:
        fitted = apply_to_each(parts, lambda name: imported_members.match_images(name, parts[name], images))
    else:
        samples = apply_to_each(SPLITS, lambda split: collect_samples(split, classes, _rows(context, parts, split)))
        fitted = apply_to_each(parts, lambda name: imported_members.match_samples(name, parts[name], samples))
    oof_paths = {name: workspace.relative(workspace.oof(name)) for name in fitted}
    arrivals = apply_to_each(fitted, lambda name: import_checks.check_member(name, fitted[name][0], oof_paths[name]))
    problems += [problem for name in arrivals for problem in (*fitted[name][1], *arrivals[name].problems)]
    members = {name: arrival.member for name, arrival in arrivals.items()}
    if images:
        splits = {split: {"n": len(listed.sample_ids), "digest": listed.digest} for split, listed in images.items()}
        if staying is not None and staying.has_images:
            members |= {name: member for name, member in staying.members.items() if member.source != IMPORTED}
            problems = [*(p for p in staying.problems if p.member not in staying.imported()), *problems]
    else:
        kept = {name: arrival.parts for name, arrival in arrivals.items()}
        splits, found_in_rows = _splits_of_rows(context, classes, kept)
        problems += found_in_rows
    return arrivals, Catalog(
        catalog.mounted_base_back(), classes, splits, dict(sorted(members.items())), tuple(problems)
    )


def _splits_of_rows(
    context: ImportContext, classes: tuple[str, ...], parts: Mapping[str, Mapping[str, ImportedPart]]
) -> tuple[dict[str, dict[str, Any]], list[Problem]]:
    """The splits from the rows of all imported members, and the problems with rows that are not shared."""
    rows_of_splits = {split: _rows(context, parts, split) for split in SPLITS}
    for split in SPLITS:
        imported_members.require_rows_in_common(split, rows_of_splits[split])
    samples = {split: collect_samples(split, classes, rows) for split, rows in rows_of_splits.items()}
    splits = {split: split_facts(classes, split_samples) for split, split_samples in samples.items()}
    return splits, imported_members.sharing_problems(rows_of_splits, samples)


def _rows(
    context: ImportContext, parts: Mapping[str, Mapping[str, ImportedPart]], split: str
) -> dict[str, list[MemberRows]]:
    """{member: its rows of a split} for existing and new members."""
    arriving = {
        name: [part.rows for stem, part in files.items() if SPLIT_OF[stem] == split] for name, files in parts.items()
    }
    return context.existing_rows[split] | arriving


# writing ----------------------------------------------------------------------------------------------------


def _state(store: Store, earlier: Catalog | None, arrival: CheckedMember, *, force: bool) -> str:
    member = arrival.member
    existing = earlier.imported().get(member.name) if earlier is not None else None
    if existing is None:
        return NEW
    is_complete = all(store.is_stored(member, SPLIT_OF[stem]) for stem in arrival.parts if stem != "oof")
    is_current = existing == member and is_complete and not store.outdated_parts(member)
    return UP_TO_DATE if is_current and not force else REPLACED


def _save_without(config: Config, workspace: Workspace, context: ImportContext) -> None:
    """Write the catalog without the members to replace, so that it never lists a partially written member."""
    staying = context.staying
    if staying is None or not staying.members:
        workspace.catalog.unlink()
        return
    if context.images is None:
        staying = replace(staying, splits=Store(config, workspace, staying).splits())
    catalog.save(workspace, staying)


def _store(store: Store, arrival: CheckedMember) -> None:
    member = arrival.member
    store.remove_member(member.name)
    for stem, part in arrival.parts.items():
        if stem == "oof" and member.oof is not None:
            rows = part.rows
            arrays = {"logits": rows.logits, "labels": rows.labels, "sample_ids": rows.sample_ids}
            optional = {"fold": part.fold, "embeddings": part.embeddings}
            arrays |= {key: array for key, array in optional.items() if array is not None}
            store.write_imported_oof(member.name, member.oof, arrays)
        else:
            store.write_imported(member, part.rows, part.embeddings)


def _result(
    workspace: Workspace, listed: Catalog, arrivals: Mapping[str, CheckedMember], states: Mapping[str, str]
) -> Result:
    width = max(6, *map(len, arrivals))
    lines = [f"{'member':{width}}  state       out-of-fold rows  val     test    accuracy on val"]
    members = {}
    for name, arrival in arrivals.items():
        rows = {stem: len(part.rows.labels) for stem, part in arrival.parts.items()}
        oof, accuracy = arrival.member.oof, arrival.member.recorded_accuracy
        shown = "-" if oof is None else f"{oof['rows']} in {oof['folds']} folds"
        lines.append(
            f"{name:{width}}  {states[name]:10}  {shown:16}  "
            f"{rows.get('val', '-'):<6}  {rows.get('test', '-'):<6}  {'-' if accuracy is None else f'{accuracy:.4f}'}"
        )
        members[name] = {"state": states[name], "rows": rows, "accuracy": accuracy, "digest": arrival.member.digest}
    lines += catalog.problem_lines([p for p in listed.problems if p.member is None or p.member in arrivals])
    count = sum(member.source != "derived" for member in listed.members.values())
    if count == 1:
        lines.append("one member alone: an ensemble of it answers as it does. Import more")
    lines.append(f"{count} members, {len(listed.classes)} classes")
    lines.append(f"{UP_TO_DATE if set(states.values()) == {UP_TO_DATE} else 'written'}: {workspace.catalog}")
    document = {
        "members": members,
        "classes": list(listed.classes),
        "splits": listed.splits,
        "problems": [asdict(problem) for problem in listed.problems],
        "catalog": str(workspace.catalog),
    }
    return Result("\n".join(lines), document, next="build-ensemble")
