"""Verification of members by running them: recorded accuracy, order of the classes, origin of out-of-fold predictions.

Results are stored under digests of weights, images and predictions, so that later scans, which run no network, can use
them. A result holds for these digests only: other weights or files have others.
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
    fold_heads,
    out_of_fold,
    output_writing,
    streaming,
    training_data,
    training_evidence,
)
from utils.predictions.catalog import Catalog, Member, Problem
from utils.predictions.image_splits import ImageSplit
from utils.predictions.out_of_fold import OutOfFoldPredictions
from utils.predictions.row_groups import count_groups, row_groups_of
from utils.predictions.store import Store
from utils.predictions.training_evidence import Scores

logger = logging.getLogger("disease_pipeline")

VERSION = 1  # raised whenever the same files would be judged differently
SAMPLE = 500  # train rows per member on which out-of-fold predictions are checked
TOLERATED = 0.005  # half a point between recorded and measured accuracy
TOLERATED_ROWS = 1.5  # and always one row, which another decoder or processor may change
SWAPPED = 0.3  # gain of accuracy by another order of the classes from which on the order is reported as wrong
MOST_MATCHED = 2_000  # classes; the assignment of 2,000 takes seconds and 32 MB
FEWEST_ROWS = 20  # on fewer rows some order of the classes fits by chance
AUTOCAST_EQUAL = 0.02  # on CUDA networks run in bfloat16, with a precision of eight bits
REFOLDED = 0.02  # a fold network that is run again may differ by this fraction of a row's largest logit
AUTOCAST_REFOLDED = 0.1
MEASURED_CODES = ("accuracy_differs", "class_order_measured", "does_not_run", "oof_suspected")
REFUSING = ("oof_in_sample", "oof_fold_disagrees")
NOT_USED = "It is used without them"


@dataclass(frozen=True)
class Inspector:
    """The inputs of one verification."""

    config: Config
    workspace: Workspace
    classes: tuple[str, ...]
    splits: Mapping[str, ImageSplit]
    digests: FileDigests
    base_back: str
    """Digest of the mounted BASE-BACK: a network that failed with another one may run with this one."""
    store: Store
    """Keeps what members give for whole splits, so that no later command runs them over these again."""
    device: str = "cpu"
    threads: int = 1

    def groups(self, images: ImageSplit) -> np.ndarray | None:
        """Group index (N,) of images of one split, by `row_groups`; None where every image is one."""
        return row_groups_of(self.workspace, self.config.dataset.group_regex, images)

    def units(self, split: str) -> int | None:
        """Number of groups of a split; None where every image is one."""
        return count_groups(self.workspace, self.config.dataset.group_regex, self.splits[split])

    def measured(self, member: Member) -> dict[str, Any] | None:
        """The stored measurement of a member on val; None if there is none."""
        facts = self.digests.facts(self.measured_key(member))
        return None if facts and "error" in facts and facts.get("base_back") != self.base_back else facts

    def leakage_check(self, member: Member) -> dict[str, Any] | None:
        """The stored comparison of out-of-fold predictions, without folds that another BASE-BACK failed to run."""
        facts = self.digests.facts(self.leakage_key(member)) if member.oof is not None else None
        return facts | {"unreadable": []} if facts and facts.get("base_back") != self.base_back else facts

    def measured_key(self, member: Member, split: str = "val") -> str:
        """Digest of everything that a measurement on a split depends on."""
        return measured_key(member, self.splits[split].digest, self.classes)

    def leakage_key(self, member: Member) -> str:
        """Digest of everything that the comparison of out-of-fold predictions depends on."""
        folds = sorted(entry["sha256"] for entry in member.checkpoints if entry["stage"].startswith("fold"))
        oof = member.oof["sha256"] if member.oof else None
        train = self.splits["train"].digest
        return digest_of(["honesty", VERSION, member.digest, oof, folds, train, list(self.classes), self.config.seed])


def measured_key(member: Member, split_digest: str, classes: tuple[str, ...]) -> str:
    """Digest of everything that a measurement on a split depends on: weights, images, order of the classes."""
    return digest_of(["measured", VERSION, member.digest, split_digest, list(classes)])


def verify(inspector: Inspector, member: Member, *, force: bool = False) -> None:
    """Run a member on all val images and on a sample of its out-of-fold rows, and store the results.

    Stored results are not computed again unless `force` is set or a network failed to run; folds that failed with
    another BASE-BACK are tried again.
    """
    digests = inspector.digests
    measured_key, leakage_key = inspector.measured_key(member), inspector.leakage_key(member)
    measured, compared = digests.facts(measured_key), digests.facts(leakage_key)
    is_measured = measured is not None and "error" not in measured and not force
    is_compared = compared is not None and compared == inspector.leakage_check(member) and not force
    if is_measured and (member.oof is None or is_compared):
        return
    val, train = inspector.splits["val"], inspector.splits["train"]
    try:
        if member.oof is None or is_compared:
            outputs = _outputs(inspector, member, {"val": None}, anew=force)
            digests.keep(measured_key, measure(outputs["val"].logits, val.labels))
            return
        path, remedy = inspector.workspace.base / member.oof["path"], catalog.kfold_remedy(inspector.workspace, member)
        predictions = out_of_fold.read(path, member.name, train, inspector.classes, remedy=remedy)
        sample = _sample(inspector.config.seed, predictions)
        rows = {"val": None, "train": _rows_of(train, predictions, sample)}
        outputs = _outputs(inspector, member, rows, anew=force)
        digests.keep(measured_key, measure(outputs["val"].logits, val.labels))
        digests.keep(leakage_key, _compare(inspector, member, predictions, sample, outputs["train"]))
    except UserError as error:
        code = "surplus_logits" if isinstance(error, streaming.ExtraOutputsError) else "does_not_run"
        digests.keep(measured_key, {"error": str(error), "code": code, "base_back": inspector.base_back})


def verify_training_data(inspector: Inspector, member: Member, *, force: bool = False) -> None:
    """Run a member on the test images too, and store the result, where it is stated not to have seen them.

    Only `training_problems` reads the result. Nothing is run for a member that does not run on val.
    """
    key, facts = inspector.measured_key(member, "test"), inspector.measured(member) or {}
    if "test" not in training_data.unseen_splits(member) or "n" not in facts:
        return
    if force or inspector.digests.facts(key) is None:
        outputs = _outputs(inspector, member, {"test": None}, anew=force)
        inspector.digests.keep(key, measure(outputs["test"].logits, inspector.splits["test"].labels))


def training_problems(inspector: Inspector, member: Member) -> list[Problem]:
    """Contradictions between the stored results of running a member and the statement on its training data."""
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


def _sample(seed: int, predictions: OutOfFoldPredictions) -> np.ndarray:
    """Indices of a seeded sample of the out-of-fold rows, sorted."""
    rows = np.random.default_rng(seed).permutation(len(predictions.labels))
    return np.sort(rows[:SAMPLE])


def measure(logits: np.ndarray, labels: np.ndarray) -> dict[str, Any]:
    """Accuracy of logits (N, C) for labels (N,), and the accuracy under the best permutation of the classes.

    `{n, accuracy, matched, order}`: in the permutation the output `order[c]` is class c. Of more than `MOST_MATCHED`
    classes, whose pairs would take gigabytes, no other order is tried.
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
    """The problems that a measurement on val shows: a network that fails, another accuracy, another class order.

    A recorded accuracy is contradicted if it is off by more than half a point and by more than one row.
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
    """The problems, after the extra outputs of members that have been run were checked.

    `measured` is {member: facts of `measure`}. The warning becomes an info if the extra outputs are never predicted;
    if they are, the member has an error of the same code, which replaces the warning.
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

    `groups` holds the number of groups of train and val; None where every image is a group of its own.
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
    """The problems that the comparison on a sample of train rows shows; a warning means that they are refused."""
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


def _compare(
    inspector: Inspector, member: Member, predictions: OutOfFoldPredictions, sample: np.ndarray, outputs: _Outputs
) -> dict[str, Any]:
    """Compare out-of-fold predictions with the full network's `outputs` on the sample, and with their fold networks'.

    `{equal, told, refolded: {fold: [differing, rows]}, unreadable: [message], base_back}`, where `told` is the number
    of rows that can be compared. Fold networks without a checkpoint are skipped; heads that share the full network's
    trunk need no pass.
    """
    on_cuda = inspector.device != "cpu"
    kind, stored = predictions.kind, predictions.logits
    tolerance = AUTOCAST_EQUAL if on_cuda else out_of_fold.EQUAL
    equal, comparable = out_of_fold.count_equal_rows(kind, stored[sample], outputs.logits, tolerance=tolerance)
    refolded: dict[str, list[int]] = {}
    unreadable = []
    stages = {entry["stage"] for entry in member.checkpoints}
    for fold in np.unique(predictions.fold[sample]).tolist():
        stage, in_fold = f"fold{fold}", predictions.fold[sample] == fold
        if stage not in stages:
            continue
        rows = sample[in_fold]
        try:
            logits = _by_head(inspector, member, stage, outputs.take(in_fold))
            if logits is None:
                in_train = _rows_of(inspector.splits["train"], predictions, rows)
                logits = _outputs(inspector, member, {"train": in_train}, stage)["train"].logits
        except UserError as error:
            unreadable.append(str(error))
            continue
        tolerance = AUTOCAST_REFOLDED if on_cuda else REFOLDED
        same, compared = out_of_fold.count_equal_rows(kind, stored[rows], logits, tolerance=tolerance)
        refolded[stage] = [compared - same, compared]
    facts = {"equal": equal, "told": comparable, "refolded": refolded, "unreadable": unreadable}
    return facts | {"base_back": inspector.base_back}


def _rows_of(train: ImageSplit, predictions: OutOfFoldPredictions, rows: np.ndarray) -> np.ndarray:
    """The rows of train that some out-of-fold rows are, in their order."""
    row_of = {sample_id: row for row, sample_id in enumerate(train.sample_ids)}
    return np.array([row_of[sample_id] for sample_id in predictions.sample_ids[rows].tolist()])


@dataclass(frozen=True)
class _Outputs:
    """What a network gives for the rows of a split."""

    logits: np.ndarray
    """float32 (N, C), columns in the workspace's class order"""
    embeddings: np.ndarray | None
    """float32 (N, D); None except for a network whose fold networks share its trunk"""

    def take(self, rows: np.ndarray) -> _Outputs:
        """Some of the rows, by a mask (N,) or by their numbers."""
        return _Outputs(self.logits[rows], None if self.embeddings is None else self.embeddings[rows])


def _by_head(inspector: Inspector, member: Member, stage: str, outputs: _Outputs) -> np.ndarray | None:
    """Logits (N, C) of a fold head on the full network's embeddings; None where these do not give its logits."""
    if outputs.embeddings is None or (heads := fold_heads.read(inspector.workspace, member, (stage,))) is None:
        return None
    full, (head,) = heads
    columns = [member.classes.index(name) for name in inspector.classes]
    if not fold_heads.explains(full, outputs.logits, outputs.embeddings, columns):
        return None
    return head.logits(outputs.embeddings)[:, columns]


def _outputs(
    inspector: Inspector,
    member: Member,
    rows: Mapping[str, np.ndarray | None],
    stage: str | None = None,
    *,
    anew: bool = False,
) -> dict[str, _Outputs]:
    """{split: outputs} of a member, or of another of its stages, for rows of each split; None stands for all.

    What the member gives for all rows of a split is kept in the prediction store. What is there is read, unless `anew`
    is set.
    """
    store = inspector.store
    outputs: dict[str, _Outputs] = {}
    runs: dict[str, ImageSplit] = {}
    whole = []
    for split, of_split in rows.items():
        images = inspector.splits[split]
        if stage is not None or (of_split is not None and len(of_split) < len(images.paths)):
            runs[split] = images if of_split is None else images.take(of_split)
            continue
        whole.append(split)
        if anew or not store.is_stored(member, split):
            runs[split] = images
        else:
            outputs[split] = _stored_outputs(store, member, split)
    if runs:
        outputs |= _run(inspector, member, runs, stage, [runs[split] for split in whole if split in runs])
    for split in whole:
        of_split = rows[split]
        if of_split is not None:
            outputs[split] = outputs[split].take(of_split)
    return outputs


def _stored_outputs(store: Store, member: Member, split: str) -> _Outputs:
    rows = store.rows(member, split, embeddings=member.trunk is not None)
    return _Outputs(rows.logits, rows.embeddings)


def _run(
    inspector: Inspector,
    member: Member,
    images_of: Mapping[str, ImageSplit],
    stage: str | None,
    kept: Sequence[ImageSplit],
) -> dict[str, _Outputs]:
    """{split: outputs} of one pass over the images; the splits `kept` are written into the prediction store."""
    batches = streaming.stream(
        member.network(inspector.workspace, stage),
        list(images_of.values()),
        batch_size=inspector.config.dataset.batch_size,
        device=inspector.device,
        image_cache=inspector.workspace.image_cache,
        decoding_threads=inspector.threads,
        val=inspector.splits["val"],
    )
    order = [member.classes.index(name) for name in inspector.classes]
    logits: dict[str, list[np.ndarray]] = {split: [] for split in images_of}
    embeddings: dict[str, list[np.ndarray]] = {split: [] for split in images_of}
    for batch in output_writing.stored(inspector.store, member, kept, batches, device=inspector.device):
        logits[batch.split].append(batch.logits[:, order])
        if member.trunk is not None:
            embeddings[batch.split].append(batch.embeddings)
    counts = ", ".join(f"{len(images.paths)} of {split}" for split, images in images_of.items())
    logger.info("verify %s%s: ran on %s", member.name, f" {stage}" if stage else "", counts)
    return {
        split: _Outputs(np.concatenate(parts), np.concatenate(embeddings[split]) if embeddings[split] else None)
        for split, parts in logits.items()
    }


def record_val_measurements(
    workspace: Workspace,
    current: Catalog,
    digests: FileDigests,
    outputs: Mapping[str, tuple[np.ndarray, np.ndarray]],
    groups: Mapping[str, int | None],
) -> Catalog:
    """Measure members by val logits that were computed for another purpose; writes and returns the updated catalog.

    `outputs` is {member: (logits (N, C) in the catalog's class order, labels (N,))} over all val rows, `groups` the
    number of groups of train and val, or None where every image is a group of its own. New problems are
    logged as warnings; those of an earlier measurement are replaced. The caller saves `digests`. Raises UserError for a
    member that cannot be used, after the catalog is written.
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
