"""The rule for names of new members, for import, declaration and renaming; existing members remain readable.

Members share the ranking, the scores and `--model-name` with ensembles and derived members, so names that methods may
use are reserved; they are collected from the registries of methods.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterable, Mapping

from utils import ensemble_methods, fusion_methods, meta_methods, moe_methods, stacking_methods
from utils.combiners import pruning
from utils.core.errors import UserError
from utils.predictions.catalog import DERIVED, DISCOVER, IMPORTED, TIMM, Catalog, Member, Problem

FORM = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,99}")
WORDS = "a letter or a digit, then at most 99 letters, digits, `_`, `.` and `-`"
SUFFIXES = (
    *(".npz", ".npy", ".pth", ".pt", ".pt2", ".ckpt", ".bin", ".safetensors", ".json", ".jsonl", ".csv", ".yaml"),
    *(".onnx", ".tflite", ".engine", ".md", ".tex", ".html", ".png", ".log", ".lock", ".partial", ".previous"),
)
"""File suffixes that this project reads or writes; a member's name must not end with them."""
FOLDERS = ("members",)
"""Folders next to those of ensembles in `metrics_output/ensembles`."""
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
"""Prefixes of names that end with a learner, a pruning strategy, a backbone or a student."""
RESERVED = re.compile(
    rf"(?:{'|'.join(sorted(_METHODS))})(?:_ensemble)?|(?:{'|'.join(sorted(_FAMILIES))})(?:_.*)?|.+_(?:{DERIVED})"
    rf"|{'|'.join(FOLDERS)}",
    re.IGNORECASE | re.DOTALL,
)
PROBLEM = "member_name"
"""Code of the problem of an existing member whose name does not follow the rule."""


def invalid_reason(name: str) -> str | None:
    """The reason why a name is invalid, apart from being taken; None if it is valid."""
    if RESERVED.fullmatch(name):
        return "the name is reserved for ensembles and for what is made of other members"
    if not FORM.fullmatch(name):
        return f"expected a name of {WORDS}"
    suffix = next((suffix for suffix in SUFFIXES if name.lower().endswith(suffix)), None)
    return None if suffix is None else f"expected a name that does not end in {suffix}, as files do"


def require_new(name: str, taken: Mapping[str, str], *, where: str, remedy: str) -> None:
    """Raise UserError for an invalid or taken name of a new member.

    `taken`, {name: kind of its owner}, is compared regardless of case, since file systems may be case-insensitive. The
    message starts with `where` and ends with `remedy`.
    """
    reason = invalid_reason(name)
    if reason is None:
        equal = next((existing for existing in taken if existing.casefold() == name.casefold()), None)
        if equal is None:
            return
        reason = f"{taken[equal]} of this workspace has that name"
        reason += "" if equal == name else f" but for upper and lower case ({equal})"
    raise UserError(f"{where}: {reason}. {remedy}")


def taken_names(members: Iterable[Member]) -> dict[str, str]:
    """{name: kind of its owner} of members."""
    return {member.name: "an imported member" if member.source == IMPORTED else "a network" for member in members}


def name_problems(catalog: Catalog) -> list[Problem]:
    """A warning for each member of the catalog whose name is invalid for new members."""
    problems = []
    for name, member in sorted(catalog.members.items()):
        is_user_named = member.source == IMPORTED or member.architecture.startswith(TIMM)
        reason = invalid_reason(name) if is_user_named or RESERVED.fullmatch(name) else None
        if reason is not None and member.source != "derived":
            command = f"rename it: {shlex.join([*DISCOVER, '--rename', f'{name}=NEW'])}"
            remedy = command if is_user_named else f"rename its checkpoints, then run {shlex.join(DISCOVER)}"
            problems.append(Problem(PROBLEM, "warning", name, f"the name breaks the rule: {reason}", remedy))
    return problems
