"""Evaluates stored results of running a member: recorded accuracy, class order, origin of predictions.

`verification` runs the members. Results are stored under digests of weights, images and predictions, so that later
scans, which run no network, can use them. A result is valid only for these digests.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from utils.core.artifacts import FileDigests, digest_of
from utils.core.config import Config
from utils.core.errors import UserError
from utils.core.workspace import Workspace
from utils.predictions import (
    catalog,
    out_of_fold,
    training_data,
    training_evidence,
)
from utils.predictions.catalog import Catalog, Member, Problem
from utils.predictions.image_splits import ImageSplit
from utils.predictions.row_groups import count_groups, row_groups_of
from utils.predictions.store import Store
from utils.predictions.training_evidence import Scores

logger = logging.getLogger("disease_pipeline")

VERSION = 1  # incremented whenever the results for the same files change
TOLERATED = 0.005  # largest difference between recorded and measured accuracy, half a percentage point
TOLERATED_ROWS = 1.5  # but at least one row, which another decoder or processor may change
SWAPPED = 0.3  # minimum gain of accuracy by a permutation of the classes for which the order is reported as wrong
MOST_MATCHED = 2_000  # classes; the assignment for 2,000 takes seconds and 32 MB
FEWEST_ROWS = 20  # with fewer rows, some permutation of the classes fits by chance
MEASURED_CODES = ("accuracy_differs", "class_order_measured", "does_not_run", "oof_suspected")
REFUSING = ("oof_in_sample", "oof_fold_disagrees")
NOT_USED = "It is used without them"


@dataclass(frozen=True)
class Inspector:
    """The inputs of one verification."""

    store: Store
    """Prediction store of the scanned members; it keeps their outputs on whole splits, which are not computed again."""
    base_back: str
    """Digest of the mounted BASE-BACK: a network that failed with another one may run with this one."""
    device: str = "cpu"
    threads: int = 1

    @property
    def config(self) -> Config:
        """The configuration."""
        return self.store.config

    @property
    def workspace(self) -> Workspace:
        """The scanned workspace."""
        return self.store.workspace

    @property
    def classes(self) -> tuple[str, ...]:
        """Names of the workspace's classes."""
        return self.store.catalog.classes

    @property
    def digests(self) -> FileDigests:
        """The file in which results are stored."""
        return self.store.digests

    def groups(self, images: ImageSplit) -> np.ndarray | None:
        """Group index (N,) of the images of one split, by `row_groups`; None if every image is a group."""
        return row_groups_of(self.workspace, self.config.dataset.group_regex, images)

    def units(self, split: str) -> int | None:
        """Number of groups of a split; None if every image is a group."""
        return count_groups(self.workspace, self.config.dataset.group_regex, self.store.images(split))

    def measured(self, member: Member) -> dict[str, Any] | None:
        """The stored measurement of a member on val; None if there is none."""
        facts = self.digests.facts(self.measured_key(member))
        return None if facts and "error" in facts and facts.get("base_back") != self.base_back else facts

    def leakage_check(self, member: Member) -> dict[str, Any] | None:
        """The stored comparison of out-of-fold predictions, without folds that failed with another BASE-BACK."""
        facts = self.digests.facts(self.leakage_key(member)) if member.oof is not None else None
        return facts | {"unreadable": []} if facts and facts.get("base_back") != self.base_back else facts

    def measured_key(self, member: Member, split: str = "val") -> str:
        """Digest of everything that a measurement on a split depends on."""
        return measured_key(member, self.store.images(split).digest, self.classes)

    def leakage_key(self, member: Member) -> str:
        """Digest of everything that the comparison of out-of-fold predictions depends on."""
        folds = sorted(entry["sha256"] for entry in member.checkpoints if entry["stage"].startswith("fold"))
        oof = member.oof["sha256"] if member.oof else None
        train = self.store.images("train").digest
        return digest_of(["honesty", VERSION, member.digest, oof, folds, train, list(self.classes), self.config.seed])


def measured_key(member: Member, split_digest: str, classes: tuple[str, ...]) -> str:
    """Digest of everything that a measurement on a split depends on: weights, images, class order."""
    return digest_of(["measured", VERSION, member.digest, split_digest, list(classes)])


def training_problems(inspector: Inspector, member: Member) -> list[Problem]:
    """Contradictions between a member's stored results and the statement on its training data."""
    unseen = {}
    for split in training_data.unseen_splits(member):
        facts = inspector.digests.facts(inspector.measured_key(member, split)) or {}
        if "n" in facts:
            hits = round(facts["accuracy"] * facts["n"])
            unseen[split] = Scores(facts["n"], hits, units=inspector.units(split))
    oof = member.oof
    out_of_fold = None
    if oof is not None:
        out_of_fold = Scores(oof["rows"], round(oof["accuracy"] * oof["rows"]), units=inspector.units("train"))
    return training_evidence.problems(member.name, unseen, out_of_fold)


def measure(logits: np.ndarray, labels: np.ndarray) -> dict[str, Any]:
    """Accuracy of logits (N, C) for labels (N,), and the accuracy under the best permutation of the classes.

    Returns `{n, accuracy, matched, order}`: in the best permutation, output `order[c]` is class c. With more than
    `MOST_MATCHED` classes, which would need gigabytes, permutations are not tried.
    """
    from scipy.optimize import linear_sum_assignment

    classes, n = logits.shape[1], len(labels)
    predicted = np.asarray(logits).argmax(axis=1)
    accuracy = float((predicted == labels).sum() / n)
    if classes > MOST_MATCHED:
        return {"n": n, "accuracy": accuracy, "matched": accuracy, "order": list(range(classes))}
    counts = np.zeros((classes, classes), dtype=np.int64)
    np.add.at(counts, (labels, predicted), 1)
    rows, order = linear_sum_assignment(-counts)
    return {
        "n": n,
        "accuracy": accuracy,
        "matched": float(counts[rows, order].sum() / n),
        "order": [int(output) for output in order],
    }


def measured_problems(classes: Sequence[str], member: Member, facts: Mapping[str, Any]) -> list[Problem]:
    """The problems in a measurement on val: a network that fails, another accuracy, another class order.

    A recorded accuracy is contradicted if it is off by more than half a percentage point and by more than one row.
    """
    name = member.name
    if "error" in facts:
        return [Problem(facts.get("code", "does_not_run"), "error", name, facts["error"], "See the message")]
    problems = []
    n, accuracy = facts["n"], facts["accuracy"]
    if n >= FEWEST_ROWS and facts["matched"] > 0.5 and facts["matched"] - accuracy > SWAPPED:
        pairs = [
            f"output {output} is {classes[label]}" for label, output in enumerate(facts["order"]) if output != label
        ]
        message = (
            f"its classes are in another order than the workspace's: accuracy {accuracy:.4f} on {n} val rows "
            f"as it is, {facts['matched']:.4f} if {', '.join(pairs[:6])}{' ...' if len(pairs) > 6 else ''}"
        )
        remedy = "write the names into the checkpoint, extra.classes in the order of its outputs, or train it again"
        problems.append(Problem("class_order_measured", "error", name, message, remedy))
    recorded = member.recorded_accuracy
    if recorded is not None and abs(recorded - accuracy) > max(TOLERATED, TOLERATED_ROWS / n) + 1e-9:
        message = f"recorded accuracy {recorded:.4f}; measured on the {n} val images it is {accuracy:.4f}"
        remedy = "the measured accuracy is used; was it trained on another split, or is the file from another run?"
        problems.append(Problem("accuracy_differs", "warning", name, message, remedy))
    return problems


def with_extra_outputs_checked(
    problems: Sequence[Problem], measured: Mapping[str, Mapping[str, Any] | None]
) -> list[Problem]:
    """The problems, updated by the check of the extra outputs of members that have been run.

    `measured` is {member: result of `measure`}. The warning becomes an info if the extra outputs are never predicted;
    otherwise the member has an error of the same code, which replaces the warning.
    """
    updated = []
    for problem in problems:
        facts = measured.get(problem.member or "") or {}
        is_open = problem.code == "surplus_logits" and problem.severity == "warning"
        if is_open and "n" in facts:
            message = f"{problem.message}; on the {facts['n']} val images they are never predicted"
            updated.append(replace(problem, severity="info", message=message, remedy="nothing to do"))
        elif not is_open or facts.get("code") != problem.code:
            updated.append(problem)
    return updated


def oof_accuracy_problems(
    member: Member, oof_accuracy: float, facts: Mapping[str, Any], *, remedy: str, groups: Mapping[str, int | None]
) -> list[Problem]:
    """A warning if out-of-fold accuracy exceeds val accuracy significantly, one-sided at 0.001.

    `groups` holds the number of groups of train and val; None if every image is a group by itself.
    """
    if "error" in facts or member.oof is None:
        return []
    rows = {"accuracy": oof_accuracy, "n": member.oof["rows"]}
    p_value = out_of_fold.higher_accuracy_p_value(
        {"accuracy": oof_accuracy, "n": groups["train"] or rows["n"]},
        {"accuracy": facts["accuracy"], "n": groups["val"] or facts["n"]},
    )
    if p_value >= out_of_fold.BEYOND_CHANCE:
        return []
    message = (
        f"out-of-fold accuracy {oof_accuracy:.4f} on {rows['n']} rows beats val accuracy {facts['accuracy']:.4f} on "
        f"{facts['n']} beyond chance (p = {p_value:.1g}); its networks may have seen the rows"
    )
    remedy = f"Unless it is known how they were made, they prove nothing. {remedy}"
    return [Problem("oof_suspected", "warning", member.name, message, remedy)]


def leakage_problems(workspace: Workspace, member: Member, facts: Mapping[str, Any]) -> list[Problem]:
    """The problems in the comparison on a sample of train rows; with a warning, the predictions are refused."""
    problems = []
    refused = f"{NOT_USED}. {catalog.kfold_remedy(workspace, member)}"
    tolerated = out_of_fold.SAME_NETWORK_FRACTION
    if facts["equal"] > tolerated * facts["told"]:
        message = (
            f"out-of-fold predictions refused: {facts['equal']} of {facts['told']} sampled rows are what the full "
            "network gives, which was trained on them"
        )
        problems.append(Problem("oof_in_sample", "warning", member.name, message, refused))
    for fold, (differing, rows) in sorted(facts["refolded"].items()):
        if differing > tolerated * rows:
            message = (
                f"out-of-fold predictions refused: {fold} run again differs on {differing} of {rows} sampled rows, so "
                "they are not this fold network's"
            )
            problems.append(Problem("oof_fold_disagrees", "warning", member.name, message, refused))
    for message in facts["unreadable"]:
        remedy = "Its fold was not checked; see the message"
        problems.append(Problem("fold_unreadable", "info", member.name, message, remedy))
    return problems


def record_val_measurements(
    workspace: Workspace,
    current: Catalog,
    digests: FileDigests,
    outputs: Mapping[str, tuple[np.ndarray, np.ndarray]],
    groups: Mapping[str, int | None],
) -> Catalog:
    """Measure members with val logits that were computed for another purpose; writes and returns the updated catalog.

    `outputs` is {member: (logits (N, C) in the catalog's class order, labels (N,))} over all val rows, `groups` the
    number of groups of train and val, or None if every image is a group by itself. New problems are logged as warnings
    and replace those of an earlier measurement. The caller saves `digests`. Raises UserError for a member that cannot
    be used, after the catalog is written.
    """
    problems: list[Problem] = []
    measured = {name: measure(logits, labels) for name, (logits, labels) in sorted(outputs.items())}
    for name, facts in measured.items():
        member = current.members[name]
        digests.keep(measured_key(member, current.splits["val"]["digest"], current.classes), facts)
        problems += measured_problems(current.classes, member, facts)
        if member.oof is not None and member.oof.get("accuracy") is not None:
            problems += oof_accuracy_problems(
                member, member.oof["accuracy"], facts, remedy=catalog.kfold_remedy(workspace, member), groups=groups
            )
    unusable = {str(problem.member): problem.message for problem in problems if problem.severity == "error"}
    members = {name: replace(m, usable=m.usable and name not in unusable) for name, m in current.members.items()}
    updated = replace(current, members=members).with_problems(problems, members=set(outputs), codes=MEASURED_CODES)
    updated = replace(updated, problems=tuple(with_extra_outputs_checked(updated.problems, measured)))
    for problem in problems:
        if problem.severity != "error" and problem not in current.problems:
            logger.warning("%s: %s. %s", problem.member, problem.message, problem.remedy)
    if updated != current:
        catalog.save(workspace, updated)
    if unusable:
        digests.save()
        reasons = "; ".join(f"{name}: {message}" for name, message in unusable.items())
        raise UserError(f"{reasons}. Run the same command again: it continues without {', '.join(unusable)}")
    return updated
