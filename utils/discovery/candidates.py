"""Candidates for membership: checkpoints of the base pipeline, derived checkpoints, declared timm networks."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from utils.core.errors import UserError, did_you_mean
from utils.core.workspace import Workspace
from utils.discovery import member_names, renaming
from utils.discovery.identification import MemberCandidate, Scan
from utils.predictions import catalog
from utils.predictions.catalog import DERIVED, MADE, STAGES, TIMM, Catalog

ADDED = re.compile(r"(?P<name>[^=]+)=timm:(?P<model>[^@\s]+)@(?P<file>.+)")


def trained(workspace: Workspace) -> list[MemberCandidate]:
    """Candidates: each backbone's final, else fine-tuned, else head checkpoint, and each derived checkpoint."""
    candidates = []
    for backbone, roles in catalog.checkpoint_files(workspace).items():
        stage = next((stage for stage in STAGES if stage in roles), None)
        derived = {role: path for role, path in roles.items() if re.fullmatch(DERIVED, role)}
        if stage is not None:
            others = _others(roles, stage)
            candidates.append(MemberCandidate(backbone, roles[stage], stage, backbone, others))
        for role, path in derived.items():
            parents = () if role == "distilled" else (backbone,)
            candidates.append(MemberCandidate(f"{backbone}_{role}", path, role, backbone, {}, parents, is_derived=True))
    for path in sorted(workspace.models.glob("*/*.pth")):
        name = catalog.end_to_end_member_name(path.parent.name, path.stem)
        candidates.append(MemberCandidate(name, path, catalog.END_TO_END, path.stem, {}, (path.stem,), is_derived=True))
    return sorted(candidates, key=lambda candidate: candidate.name)


def declared(scan: Scan, add: Sequence[str], earlier: Catalog | None) -> list[MemberCandidate]:
    """Declared timm networks: those of the earlier catalog, and those of `add`, which replace them by name.

    Raises UserError for an invalid declaration.
    """
    candidates: dict[str, MemberCandidate] = {}
    remembered = earlier.members.values() if earlier else ()
    for member in (member for member in remembered if renaming.is_declared(member)):
        path = scan.workspace.base / member.checkpoints[0]["path"]
        candidates[member.name] = MemberCandidate(
            member.name,
            path,
            "final",
            member.architecture,
            img_size=member.img_size,
            others=_folds(scan, member.name),
            remembered=member,
        )
    trained_names = {candidate.name for candidate in trained(scan.workspace)}
    for declaration in add:
        match = ADDED.fullmatch(declaration)
        if match is None:
            raise UserError(
                f"--add {declaration}: expected NAME=timm:MODEL@FILE, such as --add leaf=timm:resnet18@weights/leaf.pth"
            )
        name, path = match["name"], Path(match["file"]).expanduser().absolute()
        if name in trained_names:
            raise UserError(f"--add {declaration}: a checkpoint of {name} is in {scan.workspace.checkpoints} already")
        if name not in candidates:
            require_new_name(scan.workspace, earlier, name, f"--add {declaration}", candidates)
        if not path.is_file():
            near = did_you_mean(path.name, [entry.name for entry in path.parent.glob("*")])
            raise UserError(f"--add {declaration}: {path}: no such file{near}")
        _require_timm_model(declaration, match["model"])
        candidates[name] = MemberCandidate(
            name,
            path,
            "final",
            f"{TIMM}{match['model']}",
            img_size=scan.config.dataset.img_size,
            others=_folds(scan, name),
        )
    return [candidates[name] for name in sorted(candidates)]


def _folds(scan: Scan, name: str) -> dict[str, Path]:
    return _others(catalog.checkpoint_files(scan.workspace).get(name, {}), None)


def _others(roles: Mapping[str, Path], stage: str | None) -> dict[str, Path]:
    """The other checkpoints of the same training, without those of derived members."""
    return {role: path for role, path in sorted(roles.items()) if role != stage and not re.fullmatch(MADE, role)}


def require_new_name(
    workspace: Workspace, earlier: Catalog | None, name: str, where: str, new_names: Iterable[str] = ()
) -> None:
    """Raise UserError for a name that a member or an ensemble has, or that no new member may have.

    `new_names` are the other names that the same command adds.
    """
    taken = {path.name: "an ensemble" for path in workspace.models.glob("*")}
    taken |= member_names.taken_names(earlier.members.values() if earlier else ())
    taken |= dict.fromkeys([*(candidate.name for candidate in trained(workspace)), *new_names], "a network")
    member_names.require_new(name, taken, where=where, remedy="Choose another name")


def _require_timm_model(declaration: str, model: str) -> None:
    import timm

    if not timm.is_model(model):
        near = did_you_mean(model, timm.list_models())
        raise UserError(f"--add {declaration}: timm {timm.__version__} has no model {model!r}{near}")
