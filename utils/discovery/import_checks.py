"""Checks of imported members: origin of out-of-fold predictions, order of the columns, digest of the content."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from utils.core.artifacts import digest_of
from utils.core.errors import UserError
from utils.discovery.imported_members import ImportedPart
from utils.numeric.metrics import log_softmax
from utils.predictions import inspection, out_of_fold
from utils.predictions.catalog import IMPORTED, Member, Problem
from utils.predictions.rows import MemberRows

COARSE_FRACTION = 0.5  # limit of the fraction of equal rows for a model with few distinct outputs
COARSEST_LAST = ("logits", "probabilities", "half-precision probabilities")


@dataclass(frozen=True)
class CheckedMember:
    """A member that can be imported, and the rows to store for it."""

    member: Member
    parts: dict[str, ImportedPart]
    """{oof, val, test, train: the used rows of the file}"""
    problems: tuple[Problem, ...]


def check_member(name: str, parts: Mapping[str, ImportedPart], oof_path: str) -> CheckedMember:
    """The catalog's entry of a member, after comparing its predictions with each other and with its labels.

    Out-of-fold predictions that equal those of `train` are refused, and the member is used without them. Raises
    UserError if no out-of-sample rows remain, or if the order of the columns differs from the recorded one.
    """
    used_parts: dict[str, ImportedPart] = dict(parts)
    problems: list[Problem] = []
    member = Member(
        name=name,
        architecture="unknown",
        size="unknown",
        img_size=None,
        classes=next(iter(parts.values())).rows.classes,
        checkpoints=(),
        exports=(),
        metrics=None,
        oof=None,
        recorded_accuracy=None,
        digest=_content_digest(parts),
        source=IMPORTED,
    )
    measured = None
    if "val" in parts:
        val = parts["val"].rows
        measured = inspection.measure(val.logits, val.labels)
        problems += _single_class(name, val)
        for problem in inspection.measured_problems(member.classes, member, measured):
            raise UserError(f"member {name}: {problem.message}. Write `classes` in the order of its columns")
    if "oof" in parts and "train" in parts:
        equal, comparable = count_copied_rows(parts["oof"], parts["train"])
        if equal > equal_rows_limit(parts["train"]) * comparable:
            message = (
                f"out-of-fold predictions refused: {equal} of {comparable} comparable rows equal those of train.npz"
            )
            remedy = "write what cross-validation predicts into oof.npz"
            if "val" not in used_parts:
                raise UserError(f"member {name}: {message}, and there is no val.npz; {remedy}")
            problems.append(Problem("oof_in_sample", "warning", name, message, f"it is used without them; {remedy}"))
            del used_parts["oof"]
    oof: dict[str, Any] | None = None
    if "oof" in used_parts and used_parts["oof"].fold is not None:
        rows, fold = used_parts["oof"].rows, used_parts["oof"].fold
        oof = {
            "path": oof_path,
            "rows": len(rows.labels),
            "folds": len(np.unique(fold)),
            "accuracy": float((rows.logits.argmax(axis=1) == rows.labels).mean()),
            "sha256": _content_digest({"oof": used_parts["oof"]}),
        }
    member = replace(member, oof=oof, recorded_accuracy=None if measured is None else measured["accuracy"])
    if oof is not None and measured is not None:
        independent = {"train": None, "val": None}  # imported predictions have no information on groups
        problems += inspection.oof_accuracy_problems(
            member, oof["accuracy"], measured, remedy="Make oof.npz again", groups=independent
        )
    return CheckedMember(member, used_parts, tuple(problems))


def _single_class(name: str, val: MemberRows) -> list[Problem]:
    only = np.unique(val.labels)
    if len(only) > 1:
        return []
    message = f"all {len(val.labels)} rows of val.npz are of class {val.classes[only[0]]}"
    return [Problem("single_class", "warning", name, message, "Predictions of all classes are needed to choose by")]


def count_copied_rows(oof: ImportedPart, train: ImportedPart) -> tuple[int, int]:
    """Number of out-of-fold rows equal to the full model's outputs, and number of comparable rows."""
    ids, oof_rows, train_rows = np.intersect1d(oof.rows.sample_ids, train.rows.sample_ids, return_indices=True)
    if not len(ids):
        return 0, 0
    stored, full = oof.rows.logits[oof_rows], train.rows.logits[train_rows]
    kind = max(oof.kind, train.kind, key=COARSEST_LAST.index)
    if kind != "logits":
        stored = log_softmax(stored)
    return out_of_fold.count_equal_rows(kind, stored, full, tolerance=out_of_fold.EQUAL)


def equal_rows_limit(train: ImportedPart) -> float:
    """Fraction of equal rows above which out-of-fold predictions count as in-sample.

    It is larger for models with fewer distinct outputs than rows, such as nearest neighbours and small forests.
    """
    few = np.unique(train.rows.logits).size < len(train.rows.labels)
    return COARSE_FRACTION if few else out_of_fold.SAME_NETWORK_FRACTION


def _content_digest(parts: Mapping[str, ImportedPart]) -> str:
    """SHA-256 of the stored content, independent of the order of rows and columns in the files."""
    digest = hashlib.sha256()
    for stem, part in sorted(parts.items()):
        digest.update(digest_of([stem, list(part.rows.classes), part.rows.sample_ids.tolist()]).encode())
        for array in (part.rows.labels, part.rows.logits, part.fold, part.embeddings):
            digest.update(digest_of(None if array is None else [array.dtype.str, array.shape]).encode())
            digest.update(b"" if array is None else np.ascontiguousarray(array).tobytes())
    return digest.hexdigest()
