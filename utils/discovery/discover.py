"""Discovery: scan a workspace for trained members, compare their files and write the catalog.

The scan reads files and runs no network; with `verify`, `utils.predictions.verification` runs them.
"""

from __future__ import annotations

import logging
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from utils.core.artifacts import FileDigests
from utils.core.config import Config
from utils.core.errors import UserError, nearest_first
from utils.core.results import Result
from utils.core.workspace import SPLITS, Workspace
from utils.discovery import (
    candidates,
    declaration_checks,
    declarations,
    imbalance,
    imported_members,
    member_names,
    orientations,
    preprocessing_checks,
    renaming,
    split_checks,
    training_statements,
)
from utils.discovery.identification import Scan, identify
from utils.predictions import (
    catalog,
    image_splits,
    inspection,
    member_selection,
    streaming,
    training_data,
    verification,
    view_members,
)
from utils.predictions.catalog import IMPORTED, Catalog, Member, Problem
from utils.predictions.image_splits import ImageSplit
from utils.predictions.inspection import Inspector
from utils.predictions.store import Store, with_imported

logger = logging.getLogger("disease_pipeline")


def discover(
    config: Config,
    workspace: Workspace,
    *,
    verify: bool = False,
    add: Sequence[str] = (),
    add_from: Sequence[str] = (),
    preprocess: Sequence[str] = (),
    remove: Sequence[str] = (),
    rename: Sequence[str] = (),
    trained_on: Sequence[str] = (),
    force: bool = False,
    verbose: bool = False,
) -> Result:
    """Find trained models, check them and write the catalog.

    Args:
        verify: Also run every trained member, and derived ones that the configuration includes, on all val images, and
            compare out-of-fold predictions with the networks on a sample of train images.
        add: Declarations of timm networks: `NAME=timm:ARCH@FILE`, `NAME=local-dir:FOLDER`, `NAME=hf-hub:ORG/NAME` or
            `NAME=timm:ARCH`. Later discoveries keep them, like imported members, until they are removed by `remove`.
        add_from: Folders; each network folder below them is declared with the folder's name.
        preprocess: `KEY=VALUE` for the networks that `add` and `add_from` declare, `NAME:KEY=VALUE` for one of them or
            for one declared earlier.
        remove: Names of declared or imported members to remove from the catalog.
        rename: New names of such members, `OLD=NEW`; their stored files are renamed too.
        trained_on: Training data of the networks of `add`, one of `training_data.STATEMENTS` or a file that lists
            images, or `NAME=STATEMENT` for one declared network.
        force: Repeat existing measurements. A scan is cheap and always made.
        verbose: Also list each member's preprocessing.

    Raises UserError if there is no member, and for an invalid declaration, removal, renaming or statement.
    """
    earlier = _without(workspace, _earlier(workspace), remove)
    earlier, names = renaming.begin(
        workspace, earlier, rename, partial(candidates.require_new_name, workspace, earlier)
    )
    result = _discovered(
        config,
        workspace,
        earlier,
        verify=verify,
        options=declarations.Options(add, add_from, preprocess),
        remove=remove,
        trained_on=trained_on,
        force=force,
        verbose=verbose,
    )
    renaming.remove_old_names(workspace, names)
    return replace(result, text="\n".join([*renaming.rename_messages(workspace, names), result.text]))


def _discovered(
    config: Config,
    workspace: Workspace,
    earlier: Catalog | None,
    *,
    verify: bool,
    options: declarations.Options,
    remove: Sequence[str],
    trained_on: Sequence[str],
    force: bool,
    verbose: bool,
) -> Result:
    """The result of a scan, including the declared and imported members of an `earlier` catalog."""
    if earlier and not earlier.has_images and not workspace.has_images and not (options.add or options.add_from):
        training_statements.parse(trained_on, (), ())  # without images there are no networks to make a statement on
        return _without_images(config, workspace, earlier)
    digests = FileDigests(workspace.digests)
    scan = Scan(config, workspace, digests, _list_splits(workspace, digests))
    problems = split_checks.split_problems(scan.splits)
    imbalance_problem = imbalance.problem(scan.splits["train"])
    problems += [imbalance_problem] if imbalance_problem else []
    requested = declarations.declared(scan, options, earlier)
    members, candidate_problems = _identified(scan, requested, earlier)
    problems += candidate_problems
    added = [declaration.name for declaration in requested.declarations]
    listed_now = declarations.remembered_members(scan, earlier).keys() | set(added)
    statements = training_statements.parse(
        trained_on, added, [*listed_now, *training_statements.of_unknown_origin(members)]
    )
    members, messages = training_statements.with_statements(workspace, scan.splits, members, earlier, statements)
    needless = {name for name, member in members.items() if member.trained_on == training_data.NONE}
    problems = [problem for problem in problems if problem.code != "no_oof" or problem.member not in needless]
    problems += [
        *training_statements.problems(members, next(iter(scan.splits["train"].sample_ids), "class/image.png")),
        *declarations.problems_of(workspace, requested, members, earlier),
    ]
    mounted = catalog.mounted_base_back()
    scanned = Catalog(base_back=mounted, classes=scan.classes, splits={}, members=members, problems=())
    store = Store(config, workspace, scanned, digests)
    for images in scan.splits.values():
        store = store.with_images(images)
    inspector = Inspector(store, mounted["digest"])
    if verify:
        threads = image_splits.decoding_threads(config.dataset.num_workers)
        inspector = replace(inspector, device=streaming.resolve_device(config.device), threads=threads)
        _run_networks(inspector, members, force=force)
    for name, member in members.items():
        if member.usable:
            members[name], measured_problems = _with_measurements(inspector, member)
            problems += measured_problems
    problems += orientations.orientation_problems(scan.splits, digests, members.values())
    problems = preprocessing_checks.with_comparisons(inspector, problems, members)
    digests.save()
    listed = replace(store.catalog, members=members, problems=tuple(problems))
    if earlier:
        listed = with_imported(config, workspace, listed, earlier)
    listed = view_members.with_views(workspace, listed)
    if remove and not listed.members:
        workspace.catalog.unlink(missing_ok=True)  # otherwise it would still list the removed members
    _require_members(workspace, listed)
    measured = {name: inspector.measured(member) or {} for name, member in listed.members.items()}
    checked = inspection.with_extra_outputs_checked(listed.problems, measured)
    checked = declaration_checks.with_class_order_checked(checked, measured)
    listed = replace(listed, problems=tuple(checked))
    result = _written(workspace, listed, measured, verify=verify, verbose=verbose)
    text = "\n".join([*requested.messages, *messages, result.text])
    return replace(result, text=text, failures=[*requested.failures, *result.failures])


def _identified(
    scan: Scan, requested: declarations.Declared, earlier: Catalog | None
) -> tuple[dict[str, Member], list[Problem]]:
    """All members of the scan by name, and the problems of their checkpoints."""
    members: dict[str, Member] = {}
    problems: list[Problem] = []
    for candidate in [*candidates.trained(scan.workspace), *declarations.member_candidates(scan, requested, earlier)]:
        try:
            members[candidate.name], candidate_problems = identify(scan, candidate)
            problems += candidate_problems
        except UserError as error:
            remedy = "See the message"
            if candidate.remembered is not None:  # a declaration is kept even if its file is missing
                remedy = f"Remove it: {shlex.join([*catalog.DISCOVER, '--remove', candidate.name])}"
                members[candidate.name] = replace(candidate.remembered, usable=False, oof=None)
            problems.append(Problem("checkpoint_refused", "error", candidate.name, str(error), remedy))
    return members, problems


def _run_networks(inspector: Inspector, members: Mapping[str, Member], *, force: bool) -> None:
    """Run the members to be verified on images, and store the results."""
    for member in members.values():
        if not _is_verified(inspector.config, member):
            continue
        verification.verify(inspector, member, force=force)
        if catalog.is_declared(inspector.workspace, member):
            verification.verify_training_data(inspector, member, force=force)
        preprocessing_checks.compare(inspector, member, force=force)


def verified_catalog(config: Config, workspace: Workspace) -> Catalog:
    """The catalog, after comparing the out-of-fold predictions of all selected members with their networks.

    Members that have not been compared are verified now, so that nothing is fitted on rows that a network was trained
    on. Imported members are checked on import. Raises UserError if there is no catalog.
    """
    current = catalog.load(workspace)
    unchecked = [
        member.name
        for member in member_selection.select(current, config)
        if member.source != IMPORTED and member.oof is not None and not member.oof.get("checked")
    ]
    if not unchecked:
        return current
    logger.info(
        "the out-of-fold predictions of %s were not checked yet: discover --verify runs first", ", ".join(unchecked)
    )
    discover(config, workspace, verify=True)
    return catalog.load(workspace)


def _without_images(config: Config, workspace: Workspace, earlier: Catalog) -> Result:
    """The catalog of imported members only, whose rows determine the samples."""
    if not earlier.members:
        workspace.catalog.unlink(missing_ok=True)  # otherwise it would still list the removed members
    _require_members(workspace, earlier)
    if catalog.checkpoint_files(workspace):
        logger.warning("%s: checkpoints are left out, since there are no images to run them on", workspace.checkpoints)
    store = Store(config, workspace, earlier)
    samples = {split: store.samples(split) for split in SPLITS}
    problems = [problem for problem in earlier.problems if problem.code not in imported_members.SHARING_CODES]
    problems += imported_members.sharing_problems({split: store.imported_rows(split) for split in SPLITS}, samples)
    listed = replace(earlier, base_back=catalog.mounted_base_back(), splits=store.splits(), problems=tuple(problems))
    return _written(workspace, listed, {})


def _written(
    workspace: Workspace,
    listed: Catalog,
    measured: Mapping[str, Mapping[str, Any]],
    *,
    verify: bool = False,
    verbose: bool = False,
) -> Result:
    name_problems = member_names.name_problems(listed)
    listed = listed.with_problems(name_problems, members=listed.members, codes={member_names.PROBLEM})
    catalog.save(workspace, listed)
    failures = [f"{p.member or 'split'}: {p.message}" for p in listed.problems if p.severity == "error"]
    return Result(_table(workspace, listed, measured, verify=verify, verbose=verbose), listed.as_record(), failures)


def register_derived(
    config: Config,
    workspace: Workspace,
    digests: FileDigests,
    train: ImageSplit,
    current: Catalog,
    names: Sequence[str],
) -> Catalog:
    """Add the named derived members, read from their checkpoints, to the catalog; saves and returns it.

    A named member whose checkpoint is missing is removed. Raises UserError for a checkpoint that cannot be read.
    """
    scan = Scan(config, workspace, digests, {"train": train})
    members = {name: member for name, member in current.members.items() if name not in names}
    problems: list[Problem] = []
    for candidate in candidates.trained(workspace):
        if candidate.is_derived and candidate.name in names:
            members[candidate.name], candidate_problems = identify(scan, candidate)
            problems += candidate_problems
    members, _ = training_statements.with_statements(workspace, scan.splits, members, current, {})
    codes = {problem.code for problem in current.problems}
    updated = replace(current, members=members).with_problems(problems, members=set(names), codes=codes)
    catalog.save(workspace, updated)
    return updated


def _is_verified(config: Config, member: Member) -> bool:
    return member.usable and (member.source != "derived" or member.name in config.backbones.selected)


# files ------------------------------------------------------------------------------------------------------------


def _list_splits(workspace: Workspace, digests: FileDigests) -> dict[str, ImageSplit]:
    try:
        return {split: image_splits.list_images(workspace.split_dir, split, digests) for split in SPLITS}
    except UserError as error:
        raise UserError(f"{error}{_windows_folder(workspace)}") from error


def _windows_folder(workspace: Workspace) -> str:
    """A hint to a workspace named like a Windows drive, which BASE-BACK creates if its folder was renamed."""
    folders = (Path.cwd(), workspace.base)
    entries = [entry for folder in folders if folder.is_dir() for entry in folder.iterdir()]
    workspaces = sorted(str(e) for e in entries if e.name[1:3] == ":\\" and (e / "checkpoints").is_dir())
    if not workspaces:
        return ""
    return f". A BASE-BACK without a set workspace has written to {workspaces[0]!r}; pass it with --workspace"


def _earlier(workspace: Workspace) -> Catalog | None:
    """Read the catalog; None if there is none, or, with a warning, if it cannot be read."""
    if not workspace.catalog.is_file():
        return None
    try:
        return catalog.read(workspace)
    except UserError as error:
        logger.warning("%s; declare networks with --add and import predictions again", error)
        return None


def _without(workspace: Workspace, earlier: Catalog | None, remove: Sequence[str]) -> Catalog | None:
    """The earlier catalog without the members to remove. Raises UserError for one that was not added by the user."""
    members = earlier.members if earlier else {}
    removable = renaming.user_named_members(workspace, earlier)
    for name in remove:
        if name not in removable:
            raise UserError(
                f"--remove {name}: no network that was declared with --add, nor imported"
                f"{nearest_first(name, removable, 'These were')}. What is in "
                f"{workspace.checkpoints} is left out with backbones.exclude"
            )
    if earlier is None or not remove:
        return earlier
    remaining = {name: member for name, member in members.items() if name not in remove}
    problems = tuple(problem for problem in earlier.problems if problem.member not in remove)
    return replace(earlier, members=remaining, problems=problems)


# the result, as a catalog and as text ----------------------------------------------------------------------


def _with_measurements(inspector: Inspector, member: Member) -> tuple[Member, list[Problem]]:
    """A member with its stored measurements, and the problems that they show."""
    measured, comparison = inspector.measured(member), inspector.leakage_check(member)
    problems = inspection.measured_problems(inspector.classes, member, measured) if measured else []
    usable = member.usable and not any(problem.severity == "error" for problem in problems)
    leakage = inspection.leakage_problems(inspector.workspace, member, comparison) if comparison else []
    is_refused = any(problem.code in inspection.REFUSING for problem in leakage)
    if measured and member.oof is not None and not is_refused:
        remedy = catalog.kfold_remedy(inspector.workspace, member)
        groups = {split: inspector.units(split) for split in ("train", "val")}
        accuracy = member.oof["accuracy"]
        leakage += inspection.oof_accuracy_problems(member, accuracy, measured, remedy=remedy, groups=groups)
    if catalog.is_declared(inspector.workspace, member):
        leakage += inspection.training_problems(inspector, member)
    oof = member.oof and {**member.oof, "checked": comparison is not None}
    return replace(member, usable=usable, oof=None if is_refused else oof), [*problems, *leakage]


def _require_members(workspace: Workspace, listed: Catalog) -> None:
    if listed.members:
        return
    refused = "".join(f"; {problem.message}" for problem in listed.problems if problem.severity == "error")
    raise UserError(
        f"{workspace.checkpoints}: no trained model (expected files such as CustomConvNeXt_final.pth{refused}). "
        f"Train some first: make demo, or python BASE-BACK/src/main.py{_windows_folder(workspace)}"
    )


def _table(
    workspace: Workspace,
    listed: Catalog,
    measured: Mapping[str, Mapping[str, Any]],
    *,
    verify: bool,
    verbose: bool,
) -> str:
    shown = {name: member for name, member in sorted(listed.members.items()) if member.source != "derived"}
    width = max((len(name) for name in shown), default=6)
    lines = [f"{'member':{width}}  size  px   recorded  measured  out-of-fold rows  checkpoints"]
    for name, member in shown.items():
        oof = "-" if member.oof is None else f"{member.oof['rows']} in {member.oof['folds']} folds"
        is_imported = member.source == IMPORTED
        lines.append(
            f"{name:{width}}  {'-' if is_imported else member.size:4}  {member.img_size or '-':<3}  "
            f"{_figure(member.recorded_accuracy):8}  {_figure(measured.get(name, {}).get('accuracy')):8}  {oof:16}  "
            f"{'imported' if is_imported else len(member.checkpoints)}{'' if member.usable else '  cannot be used'}"
        )
    if verbose:
        networks = [member for member in shown.values() if member.source != IMPORTED]
        lines += [f"{member.name}: preprocessing {member.image_preprocessing.describe()}" for member in networks]
    derived = [name for name, member in sorted(listed.members.items()) if member.source == "derived"]
    if derived:
        lines.append(f"derived, used only where backbones.include names them: {', '.join(derived)}")
    lines += training_statements.summary_lines(shown)
    sizes = ", ".join(f"{split} {facts['n']}" for split, facts in listed.splits.items())
    unit = "images" if listed.has_images else "samples"
    lines.append(f"{len(shown)} members, {len(listed.classes)} classes, {unit}: {sizes}")
    lines += catalog.problem_lines(listed.problems)
    lines.append(f"{'verified, ' if verify else ''}written: {workspace.catalog}")
    return "\n".join(lines)


def _figure(value: float | None) -> str:
    return "-" if value is None else f"{value:.4f}"
