"""Discovery: scan a workspace for trained members, check what they say against each other, write the catalog.

The scan reads files and runs no network; `verify` has `utils.predictions.inspection` run them.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from utils.core.artifacts import FileDigests
from utils.core.config import Config
from utils.core.errors import UserError, did_you_mean
from utils.core.results import Result
from utils.core.workspace import SPLITS, Workspace
from utils.discovery import imported_members, member_names, renaming
from utils.discovery.identification import MemberCandidate, Scan, identify
from utils.predictions import catalog, image_splits, inspection, streaming
from utils.predictions.catalog import DERIVED, IMPORTED, MADE, STAGES, TIMM, Catalog, Member, Problem
from utils.predictions.image_splits import ImageSplit
from utils.predictions.inspection import Inspector
from utils.predictions.store import Store, with_imported

logger = logging.getLogger("disease_pipeline")

ADDED = re.compile(r"(?P<name>[^=]+)=timm:(?P<model>[^@\s]+)@(?P<file>.+)")
NAMED_PAIRS = 20  # pairs of equal images that are named one by one


def discover(
    config: Config,
    workspace: Workspace,
    *,
    verify: bool = False,
    add: Sequence[str] = (),
    remove: Sequence[str] = (),
    rename: Sequence[str] = (),
    force: bool = False,
) -> Result:
    """Find trained models, check them and write the catalog.

    `verify` also runs every trained member, and derived ones that the configuration includes, on all val images, and
    out-of-fold predictions' networks on a sample of train images. `add` declares networks of timm,
    `NAME=timm:MODEL@FILE`; later discoveries keep them, and imported members, until `remove` names them. `rename` gives
    such members other names, `OLD=NEW`, with everything stored of them. What was measured once is known by digest and
    measured again only with `force`; a scan is cheap, so it is always made. Raises UserError when there is no member,
    or for a declaration or a renaming that cannot be followed or taken back.
    """
    earlier = _less(workspace, _earlier(workspace), remove)
    earlier, names = renaming.begin(workspace, earlier, rename, partial(_require_new, workspace, earlier))
    result = _discovered(config, workspace, earlier, verify=verify, add=add, remove=remove, force=force)
    renaming.remove_old_names(workspace, names)
    return replace(result, text="\n".join([*renaming.rename_messages(workspace, names), result.text]))


def _require_new(
    workspace: Workspace, earlier: Catalog | None, name: str, where: str, beside: Iterable[str] = ()
) -> None:
    """Raise UserError for a name that a member or an ensemble has, or that no new member may have.

    `beside` are names that arrive with it.
    """
    taken = {path.name: "an ensemble" for path in workspace.models.glob("*")}
    taken |= member_names.taken_names(earlier.members.values() if earlier else ())
    taken |= dict.fromkeys([*(candidate.name for candidate in _trained(workspace)), *beside], "a network")
    member_names.require_new(name, taken, where=where, remedy="Choose another name")


def _discovered(
    config: Config,
    workspace: Workspace,
    earlier: Catalog | None,
    *,
    verify: bool,
    add: Sequence[str],
    remove: Sequence[str],
    force: bool,
) -> Result:
    """What a scan finds, with the declared and imported members of an `earlier` catalog."""
    if earlier and not earlier.has_images and not workspace.has_images and not add:
        return _without_images(config, workspace, earlier)
    digests = FileDigests(workspace.digests)
    scan = Scan(config, workspace, digests, _list_splits(workspace, digests))
    problems = _split_problems(scan.splits)
    members: dict[str, Member] = {}
    for candidate in [*_trained(workspace), *_declared(scan, add, earlier)]:
        try:
            members[candidate.name], found = identify(scan, candidate)
            problems += found
        except UserError as error:
            problems.append(Problem("checkpoint_refused", "error", candidate.name, str(error), "See the message"))
            if candidate.remembered is not None:  # a declaration outlives its file
                members[candidate.name] = replace(candidate.remembered, usable=False, oof=None)
    mounted = catalog.mounted_base_back()
    inspector = Inspector(config, workspace, scan.classes, scan.splits, digests, mounted["digest"])
    if verify:
        threads = image_splits.decoding_threads(config.dataset.num_workers)
        inspector = replace(inspector, device=streaming.resolve_device(config.device), threads=threads)
    for name, member in members.items():
        if verify and _is_verified(config, member):
            inspection.verify(inspector, member, force=force)
        if member.usable:
            members[name], found = _judged(inspector, member)
            problems += found
    digests.save()
    listed = Catalog(
        base_back=mounted,
        classes=scan.classes,
        splits={name: {"n": len(split.sample_ids), "digest": split.digest} for name, split in scan.splits.items()},
        members=members,
        problems=tuple(problems),
    )
    if earlier:
        listed = with_imported(config, workspace, listed, earlier)
    if remove and not listed.members:
        workspace.catalog.unlink(missing_ok=True)  # it would go on listing what was taken back
    _require_members(workspace, listed)
    measured = {name: inspector.measured(member) or {} for name, member in listed.members.items()}
    listed = replace(listed, problems=tuple(inspection.with_extra_outputs_checked(listed.problems, measured)))
    return _written(workspace, listed, measured, verify=verify)


def verified_catalog(config: Config, workspace: Workspace) -> Catalog:
    """The catalog, in which every selected member's out-of-fold predictions have been held against its networks.

    What a plain scan has not checked is checked now, once: nothing is fitted on rows that a network has seen. Imported
    members were checked when they came. Raises UserError where there is no catalog.
    """
    found = catalog.load(workspace)
    unchecked = [
        member.name
        for member in catalog.select(found, config)
        if member.source != IMPORTED and member.oof is not None and not member.oof.get("checked")
    ]
    if not unchecked:
        return found
    logger.info(
        "the out-of-fold predictions of %s were not checked yet: discover --verify runs first", ", ".join(unchecked)
    )
    discover(config, workspace, verify=True)
    return catalog.load(workspace)


def _without_images(config: Config, workspace: Workspace, earlier: Catalog) -> Result:
    """The catalog of imported members alone, who say themselves which samples there are."""
    if not earlier.members:
        workspace.catalog.unlink(missing_ok=True)  # it would go on listing what was taken back
    _require_members(workspace, earlier)
    if catalog.checkpoint_files(workspace):
        logger.warning("%s: checkpoints are left out, since there are no images to run them on", workspace.checkpoints)
    store = Store(config, workspace, earlier)
    samples = {split: store.samples(split) for split in SPLITS}
    problems = [problem for problem in earlier.problems if problem.code not in imported_members.SHARING_CODES]
    problems += imported_members.sharing_problems({split: store.imported_rows(split) for split in SPLITS}, samples)
    listed = replace(earlier, base_back=catalog.mounted_base_back(), splits=store.splits(), problems=tuple(problems))
    return _written(workspace, listed, {}, verify=False)


def _written(
    workspace: Workspace, found: Catalog, measured: Mapping[str, Mapping[str, Any]], *, verify: bool
) -> Result:
    own = member_names.name_problems(found)
    found = found.with_problems(own, members=found.members, codes={member_names.PROBLEM})
    catalog.save(workspace, found)
    failures = [f"{p.member or 'split'}: {p.message}" for p in found.problems if p.severity == "error"]
    return Result(_table(workspace, found, measured, verify=verify), found.as_record(), failures)


def register_derived(
    config: Config, workspace: Workspace, digests: FileDigests, train: ImageSplit, found: Catalog, names: Sequence[str]
) -> Catalog:
    """The catalog with the named derived members as their checkpoints lie on disk now; it is saved.

    The rest stays as it was found, and a named one whose checkpoint is gone leaves. Raises UserError for a checkpoint
    that cannot be read.
    """
    scan = Scan(config, workspace, digests, {"train": train})
    members = {name: member for name, member in found.members.items() if name not in names}
    problems: list[Problem] = []
    for candidate in _trained(workspace):
        if candidate.is_derived and candidate.name in names:
            members[candidate.name], own = identify(scan, candidate)
            problems += own
    codes = {problem.code for problem in found.problems}
    updated = replace(found, members=members).with_problems(problems, members=set(names), codes=codes)
    catalog.save(workspace, updated)
    return updated


def _is_verified(config: Config, member: Member) -> bool:
    return member.usable and (member.source != "derived" or member.name in config.backbones.selected)


# which files there are --------------------------------------------------------------------------------------------


def _list_splits(workspace: Workspace, digests: FileDigests) -> dict[str, ImageSplit]:
    try:
        return {split: image_splits.list_images(workspace.split_dir, split, digests) for split in SPLITS}
    except UserError as error:
        raise UserError(f"{error}{_windows_folder(workspace)}") from error


def _windows_folder(workspace: Workspace) -> str:
    """A hint at a workspace under a Windows drive's name, which a BASE-BACK makes when its own folder is renamed."""
    places = (Path.cwd(), workspace.base)
    names = [entry for place in places if place.is_dir() for entry in place.iterdir() if entry.name[1:3] == ":\\"]
    found = sorted(str(entry) for entry in names if (entry / "checkpoints").is_dir())
    if not found:
        return ""
    return f". A BASE-BACK that was not told its workspace has written to {found[0]!r}; give it with --workspace"


def _trained(workspace: Workspace) -> list[MemberCandidate]:
    """A backbone's final, else fine-tuned, else head checkpoint is a member; so is each derived file and network."""
    found = []
    for backbone, roles in catalog.checkpoint_files(workspace).items():
        stage = next((stage for stage in STAGES if stage in roles), None)
        derived = {role: path for role, path in roles.items() if re.fullmatch(DERIVED, role)}
        if stage is not None:
            others = _others(roles, stage)
            found.append(MemberCandidate(backbone, roles[stage], stage, backbone, others))
        for role, path in derived.items():
            parents = () if role == "distilled" else (backbone,)
            found.append(MemberCandidate(f"{backbone}_{role}", path, role, backbone, {}, parents, is_derived=True))
    for path in sorted(workspace.models.glob("*/*.pth")):
        name = catalog.end_to_end_member_name(path.parent.name, path.stem)
        found.append(MemberCandidate(name, path, catalog.END_TO_END, path.stem, {}, (path.stem,), is_derived=True))
    return sorted(found, key=lambda candidate: candidate.name)


def _declared(scan: Scan, add: Sequence[str], earlier: Catalog | None) -> list[MemberCandidate]:
    """Networks of timm: those of the earlier catalog and those declared now, which replace them by name.

    Raises UserError for a declaration that cannot be followed.
    """
    found: dict[str, MemberCandidate] = {}
    remembered = earlier.members.values() if earlier else ()
    for member in (member for member in remembered if renaming.is_declared(member)):
        path = scan.workspace.base / member.checkpoints[0]["path"]
        found[member.name] = MemberCandidate(
            member.name,
            path,
            "final",
            member.architecture,
            img_size=member.img_size,
            others=_folds(scan, member.name),
            remembered=member,
        )
    trained = {candidate.name for candidate in _trained(scan.workspace)}
    for declaration in add:
        match = ADDED.fullmatch(declaration)
        if match is None:
            raise UserError(
                f"--add {declaration}: expected NAME=timm:MODEL@FILE, such as --add leaf=timm:resnet18@weights/leaf.pth"
            )
        name, path = match["name"], Path(match["file"]).expanduser().absolute()
        if name in trained:
            raise UserError(f"--add {declaration}: a checkpoint of {name} is in {scan.workspace.checkpoints} already")
        if name not in found:
            _require_new(scan.workspace, earlier, name, f"--add {declaration}", found)
        if not path.is_file():
            near = did_you_mean(path.name, [entry.name for entry in path.parent.glob("*")])
            raise UserError(f"--add {declaration}: {path}: no such file{near}")
        _require_timm_model(declaration, match["model"])
        found[name] = MemberCandidate(
            name,
            path,
            "final",
            f"{TIMM}{match['model']}",
            img_size=scan.config.dataset.img_size,
            others=_folds(scan, name),
        )
    return [found[name] for name in sorted(found)]


def _folds(scan: Scan, name: str) -> dict[str, Path]:
    return _others(catalog.checkpoint_files(scan.workspace).get(name, {}), None)


def _others(roles: Mapping[str, Path], own: str | None) -> dict[str, Path]:
    """Files of the same training beside the member's own: what was made of it later is not listed with it."""
    return {role: path for role, path in sorted(roles.items()) if role != own and not re.fullmatch(MADE, role)}


def _earlier(workspace: Workspace) -> Catalog | None:
    """The catalog on disk; None, said in words, where it cannot be read."""
    if not workspace.catalog.is_file():
        return None
    try:
        return catalog.read(workspace)
    except UserError as error:
        logger.warning("%s; what was declared with --add or imported must be given again", error)
        return None


def _less(workspace: Workspace, earlier: Catalog | None, remove: Sequence[str]) -> Catalog | None:
    """The earlier catalog without the members to remove. Raises UserError where one was never given by the user."""
    members = earlier.members if earlier else {}
    given = renaming.user_named_members(earlier)
    for name in remove:
        if name not in given:
            raise UserError(
                f"--remove {name}: no network that was declared with --add, nor imported; these were: "
                f"{', '.join(given) or 'none'}{did_you_mean(name, given)}. What is in {workspace.checkpoints} is left "
                "out with backbones.exclude"
            )
    if earlier is None or not remove:
        return earlier
    kept = {name: member for name, member in members.items() if name not in remove}
    problems = tuple(problem for problem in earlier.problems if problem.member not in remove)
    return replace(earlier, members=kept, problems=problems)


def _require_timm_model(declaration: str, model: str) -> None:
    import timm

    if not timm.is_model(model):
        near = did_you_mean(model, timm.list_models())
        raise UserError(f"--add {declaration}: timm {timm.__version__} has no model {model!r}{near}")


# what was found, for a catalog and for a person ----------------------------------------------------------------------


def _judged(inspector: Inspector, member: Member) -> tuple[Member, list[Problem]]:
    """A member after what running it has shown, now or at any time before."""
    measured, honesty = inspector.measured(member), inspector.leakage_check(member)
    problems = inspection.measured_problems(inspector.classes, member, measured) if measured else []
    usable = member.usable and not any(problem.severity == "error" for problem in problems)
    found = inspection.leakage_problems(inspector.workspace, member, honesty) if honesty else []
    is_refused = any(problem.code in inspection.REFUSING for problem in found)
    if measured and member.oof is not None and not is_refused:
        remedy = catalog.kfold_remedy(inspector.workspace, member)
        found += inspection.oof_accuracy_problems(member, member.oof["accuracy"], measured, remedy=remedy)
    oof = member.oof and {**member.oof, "checked": honesty is not None}
    return replace(member, usable=usable, oof=None if is_refused else oof), [*problems, *found]


def _split_problems(splits: Mapping[str, ImageSplit]) -> list[Problem]:
    problems = []
    train = splits["train"]
    for name, split in splits.items():
        if split.classes != train.classes:
            message = f"{name} has the classes {', '.join(split.classes)}, train has {', '.join(train.classes)}"
            problems.append(Problem("split_classes", "error", None, message, "split the images anew"))
    names = np.array([f"{split.split}/{sample_id}" for split in splits.values() for sample_id in split.sample_ids])
    where = np.concatenate([np.full(len(split.sample_ids), number) for number, split in enumerate(splits.values())])
    contents = np.array([content for split in splits.values() for content in split.contents])
    _, group = np.unique(contents, return_inverse=True)
    order = np.lexsort((np.arange(len(group)), group))
    starts = np.flatnonzero(np.r_[True, group[order][1:] != group[order][:-1]])
    first = order[np.repeat(starts, np.diff(np.r_[starts, len(order)]))]  # of each row's group, the earliest
    twins = np.flatnonzero(where[order] != where[first])
    for row in twins[:NAMED_PAIRS]:
        message = f"the same image in two splits: {names[first[row]]} and {names[order[row]]}"
        problems.append(Problem("duplicate_across_splits", "warning", None, message, "evaluate leaves it out"))
    if len(twins) > NAMED_PAIRS:
        message = f"{len(twins) - NAMED_PAIRS} more images stand in two splits"
        problems.append(Problem("duplicate_across_splits", "warning", None, message, "split the images anew"))
    return problems


def _require_members(workspace: Workspace, found: Catalog) -> None:
    if found.members:
        return
    refused = "".join(f"; {problem.message}" for problem in found.problems if problem.severity == "error")
    raise UserError(
        f"{workspace.checkpoints}: no trained model (expected files such as CustomConvNeXt_final.pth{refused}). "
        f"Train some first: make demo, or python BASE-BACK/src/main.py{_windows_folder(workspace)}"
    )


def _table(workspace: Workspace, found: Catalog, measured: Mapping[str, Mapping[str, Any]], *, verify: bool) -> str:
    shown = {name: member for name, member in sorted(found.members.items()) if member.source != "derived"}
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
    derived = [name for name, member in sorted(found.members.items()) if member.source == "derived"]
    if derived:
        lines.append(f"derived, used only where backbones.include names them: {', '.join(derived)}")
    sizes = ", ".join(f"{split} {facts['n']}" for split, facts in found.splits.items())
    what = "images" if found.has_images else "samples"
    lines.append(f"{len(shown)} members, {len(found.classes)} classes, {what}: {sizes}")
    lines += catalog.problem_lines(found.problems)
    lines.append(f"{'verified, ' if verify else ''}written: {workspace.catalog}")
    return "\n".join(lines)


def _figure(value: float | None) -> str:
    return "-" if value is None else f"{value:.4f}"
