"""Inspection of members by running them: is the recorded accuracy true, do out-of-fold predictions come from folds?

What was measured is remembered by digests of weights, images and predictions, so that later scans, which run nothing,
still know it. A verdict is never forgotten by name: other weights or files are other digests.
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
from utils.predictions import catalog, out_of_fold, streaming
from utils.predictions.catalog import Catalog, Member, Problem
from utils.predictions.image_splits import ImageSplit
from utils.predictions.out_of_fold import OutOfFoldPredictions

logger = logging.getLogger("disease_pipeline")

VERSION = 1  # raised whenever the same files would be judged differently
SAMPLE = 500  # train rows per member on which out-of-fold predictions are checked
TOLERATED = 0.005  # half a point between recorded and measured accuracy
TOLERATED_ROWS = 1.5  # and always one row, which another decoder or processor may turn: on few images that is more
SWAPPED = 0.3  # accuracy that another order of the classes must add before the order is the matter
FEWEST_ROWS = 20  # on fewer rows some order of the classes fits by chance
AUTOCAST_EQUAL = 0.02  # on CUDA networks run in bfloat16, whose eight bits blur what is equal
REFOLDED = 0.02  # a fold network that is run again may differ by this share of a row's largest logit
AUTOCAST_REFOLDED = 0.1
MEASURED_CODES = ("accuracy_differs", "class_order_measured", "does_not_run", "oof_suspected")
REFUSING = ("oof_in_sample", "oof_fold_disagrees")
NOT_USED = "It is used without them"


@dataclass(frozen=True)
class Inspector:
    """What one inspection has at hand."""

    config: Config
    workspace: Workspace
    classes: tuple[str, ...]
    splits: Mapping[str, ImageSplit]
    digests: FileDigests
    base_back: str
    """Digest of the BASE-BACK that is mounted: what could not run with another may run with this one."""
    device: str = "cpu"
    threads: int = 1

    def measured(self, member: Member) -> dict[str, Any] | None:
        """What running it on val has shown, now or before; None when that is not known."""
        facts = self.digests.facts(self.measured_key(member))
        return None if facts and "error" in facts and facts.get("base_back") != self.base_back else facts

    def leakage_check(self, member: Member) -> dict[str, Any] | None:
        """What the check of out-of-fold predictions has shown, less folds that another BASE-BACK could not run."""
        facts = self.digests.facts(self.leakage_key(member)) if member.oof is not None else None
        return facts | {"unreadable": []} if facts and facts.get("base_back") != self.base_back else facts

    def measured_key(self, member: Member) -> str:
        """What a measurement on val depends on."""
        return measured_key(member, self.splits["val"].digest, self.classes)

    def leakage_key(self, member: Member) -> str:
        """What the check of out-of-fold predictions depends on."""
        folds = sorted(entry["sha256"] for entry in member.checkpoints if entry["stage"].startswith("fold"))
        oof = member.oof["sha256"] if member.oof else None
        train = self.splits["train"].digest
        return digest_of(["honesty", VERSION, member.digest, oof, folds, train, list(self.classes), self.config.seed])


def measured_key(member: Member, val_digest: str, classes: tuple[str, ...]) -> str:
    """What a measurement on val depends on: weights, images, order of the classes."""
    return digest_of(["measured", VERSION, member.digest, val_digest, list(classes)])


def verify(inspector: Inspector, member: Member, *, force: bool = False) -> None:
    """Run a member on all val images and a sample of its out-of-fold rows; remember what was found.

    What is remembered already is not measured again, unless `force`, but a network that did not run is tried again, and
    so are folds that did not run with another BASE-BACK.
    """
    measured, honesty = inspector.measured_key(member), inspector.leakage_key(member)
    known, checked = inspector.digests.facts(measured), inspector.digests.facts(honesty)
    is_measured = known is not None and "error" not in known and not force
    is_checked = member.oof is None or (
        checked is not None and checked == inspector.leakage_check(member) and not force
    )
    if is_measured and is_checked:
        return
    val, train = inspector.splits["val"], inspector.splits["train"]
    try:
        if is_checked:
            inspector.digests.keep(measured, measure(_logits(inspector, member, [val])["val"], val.labels))
            return
        path, remedy = inspector.workspace.base / member.oof["path"], catalog.kfold_remedy(inspector.workspace, member)
        predictions = out_of_fold.read(path, member.name, train, inspector.classes, remedy=remedy)
        sample = _sample(inspector.config.seed, predictions)
        found = _logits(inspector, member, [val, _rows_of(train, predictions, sample)])
        inspector.digests.keep(measured, measure(found["val"], val.labels))
        inspector.digests.keep(honesty, _honesty(inspector, member, predictions, sample, found["train"]))
    except UserError as error:
        code = "surplus_logits" if isinstance(error, streaming.ExtraOutputsError) else "does_not_run"
        inspector.digests.keep(measured, {"error": str(error), "code": code, "base_back": inspector.base_back})


def _sample(seed: int, predictions: OutOfFoldPredictions) -> np.ndarray:
    """Seeded sample of the out-of-fold rows, sorted."""
    rows = np.random.default_rng(seed).permutation(len(predictions.labels))
    return np.sort(rows[:SAMPLE])


def measure(logits: np.ndarray, labels: np.ndarray) -> dict[str, Any]:
    """Accuracy of logits (N, C) for labels (N,), and the accuracy under the best renaming of the classes.

    `{n, accuracy, matched, order}`: the network's output `order[c]` would be class c.
    """
    from scipy.optimize import linear_sum_assignment

    classes = logits.shape[1]
    predicted = np.asarray(logits).argmax(axis=1)
    counts = np.zeros((classes, classes), dtype=np.int64)
    np.add.at(counts, (labels, predicted), 1)
    rows, order = linear_sum_assignment(-counts)
    n = len(labels)
    return {
        "n": n,
        "accuracy": float(np.trace(counts) / n),
        "matched": float(counts[rows, order].sum() / n),
        "order": [int(output) for output in order],
    }


def measured_problems(classes: Sequence[str], member: Member, facts: Mapping[str, Any]) -> list[Problem]:
    """What a measurement on val says against a member: it does not run, another accuracy, another class order.

    A recorded accuracy is contradicted when it is off by more than half a point and by more than one row.
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
            f"its classes stand in another order than the workspace's: accuracy {accuracy:.4f} on {n} val rows "
            f"as it is, {facts['matched']:.4f} if {', '.join(pairs[:6])}{' ...' if len(pairs) > 6 else ''}"
        )
        remedy = "write the names into the checkpoint, extra.classes in the order of its outputs, or train it again"
        problems.append(Problem("class_order_measured", "error", name, message, remedy))
    recorded = member.recorded_accuracy
    if recorded is not None and abs(recorded - accuracy) > max(TOLERATED, TOLERATED_ROWS / n) + 1e-9:
        message = f"recorded accuracy {recorded:.4f}; measured on the {n} val images it is {accuracy:.4f}"
        remedy = "what is measured counts; was it trained on another split, or is the file from another run?"
        problems.append(Problem("accuracy_differs", "warning", name, message, remedy))
    return problems


def with_extra_outputs_checked(
    problems: Sequence[Problem], measured: Mapping[str, Mapping[str, Any] | None]
) -> list[Problem]:
    """The problems, where surplus outputs of a member that has been run are said to be dead, or are an error alone.

    `measured` is {member: facts of `measure`}; a network whose surplus is alive has no such facts, but an error.
    """
    found = []
    for problem in problems:
        facts = measured.get(problem.member or "") or {}
        is_open = problem.code == "surplus_logits" and problem.severity == "warning"
        if is_open and "n" in facts:
            message = f"{problem.message}; on the {facts['n']} val images they are dead"
            found.append(replace(problem, severity="info", message=message, remedy="nothing to do"))
        elif not is_open or facts.get("code") != problem.code:
            found.append(problem)
    return found


def oof_accuracy_problems(
    member: Member, oof_accuracy: float, facts: Mapping[str, Any], *, remedy: str
) -> list[Problem]:
    """Out-of-fold rows that are right more often than val rows beyond chance, one-sided at 0.001."""
    if "error" in facts or member.oof is None:
        return []
    rows = {"accuracy": oof_accuracy, "n": member.oof["rows"]}
    chance = out_of_fold.higher_accuracy_p_value(rows, facts)
    if chance >= out_of_fold.BEYOND_CHANCE:
        return []
    message = (
        f"out-of-fold accuracy {oof_accuracy:.4f} on {rows['n']} rows beats val accuracy {facts['accuracy']:.4f} on "
        f"{facts['n']} beyond chance (p = {chance:.1g}); its networks may have seen the rows"
    )
    remedy = f"Unless it is known how they were made, they prove nothing. {remedy}"
    return [Problem("oof_suspected", "warning", member.name, message, remedy)]


def leakage_problems(workspace: Workspace, member: Member, facts: Mapping[str, Any]) -> list[Problem]:
    """What the check on a sample of train rows says against out-of-fold predictions; any of these refuses them."""
    problems = []
    refused = f"{NOT_USED}. {catalog.kfold_remedy(workspace, member)}"
    share = out_of_fold.SAME_NETWORK_SHARE
    if facts["equal"] > share * facts["told"]:
        message = (
            f"out-of-fold predictions refused: {facts['equal']} of {facts['told']} sampled rows are what the full "
            "network gives, which was trained on them"
        )
        problems.append(Problem("oof_in_sample", "warning", member.name, message, refused))
    for fold, (differing, rows) in sorted(facts["refolded"].items()):
        if differing > share * rows:
            message = (
                f"out-of-fold predictions refused: {fold} run again differs on {differing} of {rows} sampled rows, so "
                "they are not this fold network's"
            )
            problems.append(Problem("oof_fold_disagrees", "warning", member.name, message, refused))
    for message in facts["unreadable"]:
        remedy = "Its fold was not checked; see the message"
        problems.append(Problem("fold_unreadable", "info", member.name, message, remedy))
    return problems


def _honesty(
    inspector: Inspector, member: Member, predictions: OutOfFoldPredictions, sample: np.ndarray, logits: np.ndarray
) -> dict[str, Any]:
    """Compare out-of-fold predictions with the full network's `logits` on the sample, and with their fold networks'.

    `{equal, told, refolded: {fold: [differing, rows]}, unreadable: [message], base_back}`; fold networks that are not
    there are passed over.
    """
    on_cuda = inspector.device != "cpu"
    kind, stored = predictions.kind, predictions.logits
    tolerance = AUTOCAST_EQUAL if on_cuda else out_of_fold.EQUAL
    equal, told = out_of_fold.count_equal_rows(kind, stored[sample], logits, tolerance=tolerance)
    refolded: dict[str, list[int]] = {}
    unreadable = []
    stages = {entry["stage"] for entry in member.checkpoints}
    for fold in np.unique(predictions.fold[sample]).tolist():
        stage, rows = f"fold{fold}", sample[predictions.fold[sample] == fold]
        if stage not in stages:
            continue
        try:
            again = _logits(inspector, member, [_rows_of(inspector.splits["train"], predictions, rows)], stage)
        except UserError as error:
            unreadable.append(str(error))
            continue
        tolerance = AUTOCAST_REFOLDED if on_cuda else REFOLDED
        same, judged = out_of_fold.count_equal_rows(kind, stored[rows], again["train"], tolerance=tolerance)
        refolded[stage] = [judged - same, judged]
    found = {"equal": equal, "told": told, "refolded": refolded, "unreadable": unreadable}
    return found | {"base_back": inspector.base_back}


def _rows_of(train: ImageSplit, predictions: OutOfFoldPredictions, rows: np.ndarray) -> ImageSplit:
    """The train images of some out-of-fold rows, in their order."""
    place = {sample_id: row for row, sample_id in enumerate(train.sample_ids)}
    return train.take([place[sample_id] for sample_id in predictions.sample_ids[rows].tolist()])


def _logits(
    inspector: Inspector, member: Member, splits: Sequence[ImageSplit], stage: str | None = None
) -> dict[str, np.ndarray]:
    """A member's logits, or another stage's, per split, with columns in the workspace's class order, (N, C)."""
    batches = streaming.stream(
        member.network(inspector.workspace, stage),
        splits,
        batch_size=inspector.config.dataset.batch_size,
        device=inspector.device,
        image_cache=inspector.workspace.image_cache,
        decoding_threads=inspector.threads,
    )
    order = [member.classes.index(name) for name in inspector.classes]
    parts: dict[str, list[np.ndarray]] = {images.split: [] for images in splits}
    for batch in batches:
        parts[batch.split].append(batch.logits[:, order])
    images = ", ".join(f"{len(images.paths)} of {images.split}" for images in splits)
    logger.info("verify %s%s: ran on %s", member.name, f" {stage}" if stage else "", images)
    return {split: np.concatenate(logits) for split, logits in parts.items()}


def record_val_measurements(
    workspace: Workspace,
    found: Catalog,
    digests: FileDigests,
    outputs: Mapping[str, tuple[np.ndarray, np.ndarray]],
) -> Catalog:
    """Judge members by val logits that were streamed for another purpose; writes and returns the catalog.

    `outputs` is {member: (logits (N, C) in the catalog's class order, labels (N,))} over all val rows. New problems are
    logged as warnings; those of an earlier measurement are replaced. The caller saves `digests`. Raises UserError, once
    the catalog says so, for a member that cannot be used.
    """
    problems: list[Problem] = []
    measured = {name: measure(logits, labels) for name, (logits, labels) in sorted(outputs.items())}
    for name, facts in measured.items():
        member = found.members[name]
        digests.keep(measured_key(member, found.splits["val"]["digest"], found.classes), facts)
        problems += measured_problems(found.classes, member, facts)
        if member.oof is not None and member.oof.get("accuracy") is not None:
            problems += oof_accuracy_problems(
                member, member.oof["accuracy"], facts, remedy=catalog.kfold_remedy(workspace, member)
            )
    wrong = {problem.member: problem.message for problem in problems if problem.severity == "error"}
    members = {name: replace(m, usable=m.usable and name not in wrong) for name, m in found.members.items()}
    updated = replace(found, members=members).with_problems(problems, members=set(outputs), codes=MEASURED_CODES)
    updated = replace(updated, problems=tuple(with_extra_outputs_checked(updated.problems, measured)))
    for problem in problems:
        if problem.severity != "error" and problem not in found.problems:
            logger.warning("%s: %s. %s", problem.member, problem.message, problem.remedy)
    if updated != found:
        catalog.save(workspace, updated)
    if wrong:
        digests.save()
        reasons = "; ".join(f"{name}: {message}" for name, message in wrong.items())
        raise UserError(f"{reasons}. The same command goes on without {', '.join(wrong)}")
    return updated
