"""Candidates for members: checkpoints of the base pipeline and derived checkpoints; the rule for new names."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from pathlib import Path

from utils.core.workspace import Workspace
from utils.discovery import member_names
from utils.discovery.identification import MemberCandidate
from utils.predictions import catalog
from utils.predictions.catalog import DERIVED, MADE, STAGES, Catalog


def trained(workspace: Workspace) -> list[MemberCandidate]:
    """Candidates: the final, else fine-tuned, else head checkpoint of each backbone, and all derived checkpoints."""
    candidates = []
    for backbone, roles in catalog.checkpoint_files(workspace).items():
        stage = next((stage for stage in STAGES if stage in roles), None)
        derived = {role: path for role, path in roles.items() if re.fullmatch(DERIVED, role)}
        if stage is not None:
            other_checkpoints = _others(roles, stage)
            candidates.append(MemberCandidate(backbone, roles[stage], stage, backbone, other_checkpoints))
        for role, path in derived.items():
            parents = () if role == "distilled" else (backbone,)
            candidates.append(MemberCandidate(f"{backbone}_{role}", path, role, backbone, {}, parents, is_derived=True))
    for path in sorted(workspace.models.glob("*/*.pth")):
        name = catalog.end_to_end_member_name(path.parent.name, path.stem)
        candidates.append(MemberCandidate(name, path, catalog.END_TO_END, path.stem, {}, (path.stem,), is_derived=True))
    return sorted(candidates, key=lambda candidate: candidate.name)


def folds(workspace: Workspace, name: str) -> dict[str, Path]:
    """{stage: file} of the fold networks of a declared network in the base pipeline's folder."""
    return _others(catalog.checkpoint_files(workspace).get(name, {}), None)


def _others(roles: Mapping[str, Path], stage: str | None) -> dict[str, Path]:
    """The other checkpoints of the same training, except those of derived members."""
    return {role: path for role, path in sorted(roles.items()) if role != stage and not re.fullmatch(MADE, role)}


def require_new_name(
    workspace: Workspace, earlier: Catalog | None, name: str, where: str, new_names: Iterable[str] = ()
) -> None:
    """Raise UserError for a name that a member or an ensemble has, or that is invalid for a new member.

    `new_names` are the other names that the same command adds.
    """
    taken = {path.name: "an ensemble" for path in workspace.models.glob("*")}
    taken |= member_names.taken_names(earlier.members.values() if earlier else ())
    taken |= dict.fromkeys([*(candidate.name for candidate in trained(workspace)), *new_names], "a network")
    member_names.require_new(name, taken, where=where, remedy="Choose another name")
