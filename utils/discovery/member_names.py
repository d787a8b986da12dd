"""The rule for new members' names: one place for import, declaration and renaming. Members of before stay readable.

A member shares the ranking, the scores and `--model-name` with ensembles and with what is made of other members, so a
name that a method may take is reserved; both kinds are derived from the tables of methods.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterable, Mapping

from utils import ensemble_methods, fusion_methods, meta_methods, moe_methods, stacking_methods
from utils.combiners import pruning
from utils.core.errors import UserError
from utils.predictions.catalog import DERIVED, IMPORTED, TIMM, Catalog, Member, Problem

FORM = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,99}")
WORDS = "a letter or a digit, then at most 99 letters, digits, `_`, `.` and `-`"
SUFFIXES = (
    *(".npz", ".npy", ".pth", ".pt", ".pt2", ".ckpt", ".bin", ".safetensors", ".json", ".jsonl", ".csv", ".yaml"),
    *(".onnx", ".tflite", ".engine", ".md", ".tex", ".html", ".png", ".log", ".lock", ".partial", ".previous"),
)
"""Of files that this project reads or writes: a folder or a file of a member must not look like one."""
FOLDERS = ("members",)
"""Beside ensembles' folders in `metrics_output/ensembles`."""
_METHODS = {
    *ensemble_methods.COMBINERS,
    *pruning.COMBINERS,
    *stacking_methods.COMBINERS,
    *fusion_methods.COMBINERS,
    *moe_methods.COMBINERS,
    *meta_methods.COMBINERS,
}
_FAMILIES = {
    *(name.partition("_")[0] for name in (*pruning.COMBINERS, *stacking_methods.COMBINERS)),
    *(name.partition("_")[0] for name in fusion_methods.COMBINERS),
    *ensemble_methods.SAVED_AS,
}
"""How names begin that end in a learner, a way of pruning, a backbone or a student."""
RESERVED = re.compile(
    rf"(?:{'|'.join(sorted(_METHODS))})(?:_ensemble)?|(?:{'|'.join(sorted(_FAMILIES))})(?:_.*)?|.+_(?:{DERIVED})"
    rf"|{'|'.join(FOLDERS)}",
    re.IGNORECASE | re.DOTALL,
)
PROBLEM = "member_name"
"""Code of what discovery says of a member that has broken the rule since before there was one."""


def invalid_reason(name: str) -> str | None:
    """What is wrong with a name, whoever else has it; None where nothing is."""
    if RESERVED.fullmatch(name):
        return "the name is reserved for ensembles and for what is made of other members"
    if not FORM.fullmatch(name):
        return f"expected a name of {WORDS}"
    suffix = next((suffix for suffix in SUFFIXES if name.lower().endswith(suffix)), None)
    return None if suffix is None else f"expected a name that does not end in {suffix}, as files do"


def require_new(name: str, taken: Mapping[str, str], *, where: str, remedy: str) -> None:
    """Raise UserError for a name that no new member may have.

    `taken` {name: what has it}, compared without regard to case, since a file system may know no difference. `where`
    begins the message, and `remedy` ends it.
    """
    reason = invalid_reason(name)
    if reason is None:
        equal = next((other for other in taken if other.casefold() == name.casefold()), None)
        if equal is None:
            return
        reason = f"{taken[equal]} of this workspace has that name"
        reason += "" if equal == name else f" but for upper and lower case ({equal})"
    raise UserError(f"{where}: {reason}. {remedy}")


def taken_names(members: Iterable[Member]) -> dict[str, str]:
    """{name: what has it} of members."""
    return {one.name: "an imported member" if one.source == IMPORTED else "a network" for one in members}


def name_problems(found: Catalog) -> list[Problem]:
    """A warning on each member of the catalog whose name would be refused today."""
    told = []
    for name, member in sorted(found.members.items()):
        given = member.source == IMPORTED or member.architecture.startswith(TIMM)
        reason = invalid_reason(name) if given or RESERVED.fullmatch(name) else None
        if reason is not None and member.source != "derived":
            command = f"rename it: {shlex.join(['discover', '--rename', f'{name}=NEW'])}"
            remedy = command if given else "rename its checkpoints, then run discover"
            told.append(Problem(PROBLEM, "warning", name, f"the name breaks the rule: {reason}", remedy))
    return told
