"""Identification of one trained network by its files: architecture, classes, accuracy, out-of-fold predictions.

No network is run. Metadata are cached by the file's digest, so that a second scan neither reads it nor needs torch.
"""

from __future__ import annotations

import logging
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from utils import base_back
from utils.core.artifacts import FileDigests, digest_of
from utils.core.config import Config
from utils.core.errors import UserError
from utils.core.workspace import Workspace
from utils.discovery import training_records
from utils.networks import checkpoints
from utils.networks.construction import RETRAIN, timm_model_name
from utils.networks.preprocessing import BASE_PIPELINE, LEAST_SIDE, MOST_SIDE, Preprocessing
from utils.networks.shared_trunks import trunk_of
from utils.predictions import inspection, out_of_fold
from utils.predictions.catalog import (
    BEST_ON_VAL,
    LAST_EPOCH,
    STAGES,
    TIMM,
    VERIFY,
    Member,
    Problem,
    is_declared,
    kfold_command,
    kfold_remedy,
    network_digest,
)
from utils.predictions.image_splits import ImageSplit
from utils.predictions.training_data import FILE, NONE, STATEMENTS, TRAIN, UNKNOWN, combined

logger = logging.getLogger("disease_pipeline")

WITHOUT_VAL = (LAST_EPOCH, "inner folds")  # values of `selection` in checkpoints that were not selected on val
VERSION = 7  # incremented whenever the facts of the same file change
SNAPSHOT = re.compile(r"snapshot\d+")
FOLD = re.compile(r"fold\d+")
CYCLE = "cycle"  # `stage` in the base pipeline's checkpoints of cyclic training
CHECKPOINT = "checkpoint"  # `source` of a preprocessing record
CLASSIFIERS = {"head", "heads", "head_dist", "fc", "classifier"}


@dataclass(frozen=True)
class MemberCandidate:
    """The files of a possible member."""

    name: str
    path: Path
    stage: str
    backbone: str
    """The architecture if the file does not record it; the backbone's training records describe the candidate"""
    others: dict[str, Path] = field(default_factory=dict)
    """{stage: file} of the same training."""
    parents: tuple[str, ...] = ()
    is_derived: bool = False
    img_size: int | None = None
    """Image size if the file does not record it; None means BASE-BACK's setting"""
    remembered: Member | None = None
    """Entry of a declared network in the last catalog"""
    preprocessing: Preprocessing | None = None
    """Preprocessing of a declared network; None: the one recorded in the file"""
    classes: tuple[str, ...] | None = None
    """Class names of a declared network, in the order of its outputs, if the file does not record them"""


@dataclass(frozen=True)
class Scan:
    """The inputs that all steps of one discovery share."""

    config: Config
    workspace: Workspace
    digests: FileDigests
    splits: dict[str, ImageSplit]

    @property
    def classes(self) -> tuple[str, ...]:
        """Class names in the order of the sorted class folders."""
        return self.splits["train"].classes


def identify(scan: Scan, candidate: MemberCandidate) -> tuple[Member, list[Problem]]:
    """The member described by a candidate's files, and its problems.

    Raises UserError for a checkpoint that is missing, refused or unreadable.
    """
    workspace, digests = scan.workspace, scan.digests
    facts = checkpoint_facts(candidate.path, digests)
    checkpoints = tuple(
        {"path": workspace.relative(path), "stage": stage, "sha256": digests.of(path)}
        for stage, path in [(candidate.stage, candidate.path), *candidate.others.items()]
        if not (SNAPSHOT.fullmatch(stage) and path != candidate.path and _is_of_a_cycle(path, digests))
    )
    siblings = {
        stage: checkpoint_facts(candidate.others[stage], digests)["accuracy"]
        for stage in STAGES
        if stage in candidate.others and candidate.stage == "final" and _is_readable(candidate.others[stage], digests)
    }
    recorded = None
    if not candidate.is_derived:
        recorded = training_records.read(
            workspace,
            candidate.name,
            stage=candidate.stage,
            checkpoint=candidate.path,
            checkpoint_accuracy=facts["accuracy"],
            siblings=siblings,
        )
    declared = candidate.backbone.startswith(TIMM)
    architecture = candidate.backbone if declared else facts["architecture"] or candidate.backbone
    size = facts["size"] or "full"
    # Without a list, the order is that of the sorted names, as in all loaders of class folders.
    classes = tuple(facts["classes"] or candidate.classes or sorted(scan.classes))
    preprocessing = _preprocessing(candidate, architecture, facts)
    fold = candidate.others.get("fold0") if declared else None
    is_fold = fold is not None and _is_readable(fold, digests)
    training_facts = checkpoint_facts(fold, digests) if fold is not None and is_fold else facts
    pretrained_on = training_facts["pretrained_on"] or NONE
    member = Member(
        name=candidate.name,
        architecture=architecture,
        size=size,
        img_size=preprocessing.input_size,
        classes=classes,
        checkpoints=checkpoints,
        exports=recorded.exports if recorded else (),
        metrics=workspace.relative(recorded.path) if recorded and recorded.path else None,
        oof=None,
        recorded_accuracy=recorded.accuracy if recorded else facts["accuracy"],
        digest=network_digest(checkpoints[0]["sha256"], architecture, size, classes, preprocessing),
        source="derived" if candidate.is_derived else "trained",
        parents=candidate.parents or tuple(facts["parents"]),
        recorded_test_accuracy=recorded.test_accuracy if recorded else None,
        preprocessing=None if preprocessing.source == BASE_PIPELINE else preprocessing.as_record(),
        trained_on=UNKNOWN if declared else combined([TRAIN, pretrained_on]),
        pretrained_on=pretrained_on,
        selection=_selection(candidate, digests),
        trunk=_trunk(candidate, digests) if facts["is_frozen"] else None,
    )
    problems = list(recorded.problems) if recorded else []
    if declared and recorded and recorded.path is None:  # only the base pipeline writes metrics files
        problems = [problem for problem in problems if problem.code != training_records.NO_METRICS]
    is_other = member.architecture != candidate.backbone and not member.architecture.startswith(TIMM)
    if not declared and not candidate.is_derived and is_other:
        message = f"{candidate.path.name} holds {member.architecture}, as it records itself; that network is built"
        remedy = f"name the file after it, or put {candidate.backbone}'s own there"
        problems.append(Problem("architecture", "warning", member.name, message, remedy))
    problems += _class_problems(scan, member, facts)
    if member.img_size != scan.config.dataset.img_size:
        message = f"made for {member.img_size} px; dataset.img_size is {scan.config.dataset.img_size}"
        problems.append(Problem("image_size", "info", member.name, message, "its own size is used"))
    oof, oof_problems = _oof(scan, member)
    problems += oof_problems
    usable = not any(problem.severity == "error" for problem in problems)
    return replace(member, oof=oof, usable=usable), problems


def _preprocessing(candidate: MemberCandidate, architecture: str, facts: Mapping[str, Any]) -> Preprocessing:
    """The declared preprocessing; else the file's; else timm's for a timm architecture, or the base pipeline's."""
    preprocessing = candidate.preprocessing or recorded_preprocessing(candidate.path, facts, architecture)
    if preprocessing is not None:
        return preprocessing
    img_size = facts["img_size"] or candidate.img_size or int(base_back.settings().IMG_SIZE)
    if not architecture.startswith(TIMM):
        return Preprocessing.of_base_pipeline(img_size)
    name = timm_model_name(architecture.removeprefix(TIMM))
    try:
        record = base_back.load_bundled("resizing").timm_record(name, img_size)
    except ValueError as error:
        raise UserError(f"{candidate.path}: its preprocessing is not known: {error}. {RETRAIN}") from error
    return Preprocessing.from_record(record, f"{candidate.path}: timm's preprocessing of {name}")


def recorded_preprocessing(path: Path, facts: Mapping[str, Any], architecture: str) -> Preprocessing | None:
    """The preprocessing recorded in a checkpoint, by its `checkpoint_facts`; None if there is none.

    Checkpoints of the base pipeline and of this project that record only their image size were trained with the base
    pipeline's transform. For a timm network from elsewhere, the image size implies nothing else.
    """
    if facts["preprocessing"] is not None:
        return Preprocessing.from_record(facts["preprocessing"], f"{path}: extra.preprocessing")
    is_own = None not in (facts["architecture"], facts["size"])  # both are in all checkpoints of this project
    is_foreign = architecture.startswith(TIMM) and not is_own
    return Preprocessing.of_base_pipeline(facts["img_size"]) if facts["img_size"] and not is_foreign else None


def _trunk(candidate: MemberCandidate, digests: FileDigests) -> dict[str, str] | None:
    """The trunk that all fold networks of a frozen training share with the full network; None without such networks."""
    folds = [
        path for stage, path in candidate.others.items() if stage.startswith("fold") and _is_readable(path, digests)
    ]
    trunks: list[dict[str, str] | None] = [checkpoint_facts(path, digests)["trunk"] for path in folds]
    shared = trunks[0] if trunks and all(trunk == trunks[0] for trunk in trunks) else None
    return shared if shared is not None and shared["checkpoint"] == candidate.path.name else None


def _is_of_a_cycle(path: Path, digests: FileDigests) -> bool:
    """Whether a snapshot comes from cyclic training, which starts from random weights."""
    return _is_readable(path, digests) and checkpoint_facts(path, digests)["stage"] == CYCLE


def _selection(candidate: MemberCandidate, digests: FileDigests) -> str:
    """`Member.selection`: `last` if the candidate's file and those of its fold networks record it."""
    folds = [path for stage, path in candidate.others.items() if FOLD.fullmatch(stage)]
    is_last = all(
        _is_readable(path, digests) and checkpoint_facts(path, digests)["selection"] == LAST_EPOCH
        for path in (candidate.path, *folds)
    )
    return LAST_EPOCH if is_last else BEST_ON_VAL


def _is_readable(path: Path, digests: FileDigests) -> bool:
    try:
        checkpoint_facts(path, digests)
    except UserError as error:
        logger.warning("%s", error)
        return False
    return True


def checkpoint_facts(path: Path, digests: FileDigests) -> dict[str, Any]:
    """The metadata in a checkpoint, cached by content; None for missing entries."""
    try:
        digest = digests.of(path)
    except FileNotFoundError:
        raise UserError(f"{path}: the checkpoint is gone. Put it back, or declare another with --add") from None
    facts = digests.facts(digest)
    if facts is None or facts.get("version") != VERSION:
        record = checkpoints.read_checkpoint(path)
        extra = record.get("extra")
        metadata = _metadata(path, extra if isinstance(extra, dict) else {})
        metadata["trunk"] = trunk_of(path, record)
        facts = {"version": VERSION, **metadata, "outputs": _outputs(checkpoints.state_dict_of(record))}
        digests.keep(digest, facts)
    return facts


def _metadata(path: Path, extra: Mapping[str, Any]) -> dict[str, Any]:
    """The entries of a checkpoint's `extra`, which may be of any origin. Raises UserError for values of wrong types."""
    kinds: dict[str, tuple[type, ...]] = {
        **dict.fromkeys(("backbone_name", "model_size", "stage", "selection"), (str,)),
        **dict.fromkeys(("final_accuracy", "accuracy"), (int, float)),
        **dict.fromkeys(("classes", "parents"), (list, tuple)),
        "img_size": (int,),
    }
    for key, kind in kinds.items():
        value = extra.get(key)
        # NumPy scalars, which other pipelines save, count as the Python type that they convert to.
        is_scalar = value is not None and hasattr(value, "item") and key not in ("classes", "parents")
        plain = value.item() if is_scalar else value  # type: ignore[union-attr]  # `hasattr` does not narrow None
        if plain is not None and not isinstance(plain, kind):
            expected = " or ".join(accepted.__name__ for accepted in kind)
            raise UserError(f"{path}: extra.{key} is {str(value)[:40]!r}; expected {expected}. {RETRAIN}")
    side = extra.get("img_size")
    if side is not None and not LEAST_SIDE <= int(side) <= MOST_SIDE:
        raise UserError(f"{path}: extra.img_size is {side}; expected {LEAST_SIDE} to {MOST_SIDE} px. {RETRAIN}")
    accuracy = extra.get("final_accuracy", extra.get("accuracy"))
    preprocessing = _recorded_preprocessing(path, extra)
    if preprocessing is not None and side not in (None, preprocessing["input_size"]):
        raise UserError(
            f"{path}: extra.img_size is {side}, extra.preprocessing has input_size {preprocessing['input_size']}; "
            f"expected the same size. {RETRAIN}"
        )
    return {
        "architecture": extra.get("backbone_name"),
        "size": extra.get("model_size"),
        "img_size": None if side is None else int(side),
        "classes": [str(name) for name in extra["classes"]] if extra.get("classes") else None,
        "accuracy": None if accuracy is None or not math.isfinite(accuracy) else float(accuracy),
        "stage": extra.get("stage"),
        "selection": LAST_EPOCH if extra.get("selection") in WITHOUT_VAL else BEST_ON_VAL,
        "parents": [str(name) for name in extra.get("parents") or ()],
        "preprocessing": preprocessing,
        "pretrained_on": _pretrained_on(path, extra.get("weights")),
        "is_frozen": extra.get("mode") == "frozen",
    }


def _recorded_preprocessing(path: Path, extra: Mapping[str, Any]) -> dict[str, Any] | None:
    """The validated preprocessing record in a checkpoint's `extra`; None without one."""
    if extra.get("preprocessing") is None:
        return None
    preprocessing = Preprocessing.from_record(extra["preprocessing"], f"{path}: extra.preprocessing", remedy=RETRAIN)
    is_default = preprocessing.is_base_pipeline and preprocessing.source == BASE_PIPELINE
    return preprocessing.with_source(BASE_PIPELINE if is_default else CHECKPOINT).as_record()


def _pretrained_on(path: Path, weights: Any) -> str | None:
    """The statement in a checkpoint on the training data of its initial weights."""
    if weights is None:
        return None
    statement = weights.get("trained_on") if isinstance(weights, dict) else None
    if statement not in STATEMENTS:
        raise UserError(
            f"{path}: extra.weights.trained_on is {str(statement)[:40]!r}; expected {', '.join(STATEMENTS)}. {RETRAIN}"
        )
    return UNKNOWN if statement == FILE else str(statement)  # the list is not in the checkpoint


def _outputs(weights: Mapping[str, Any]) -> int | None:
    """Number of a network's logits: the rows of the last matrix of its classifier."""
    matrices = [name for name, value in weights.items() if name.endswith("weight") and getattr(value, "ndim", 0) == 2]
    last = [name for name in matrices if CLASSIFIERS & set(name.split("."))] or matrices
    return int(weights[last[-1]].shape[0]) if last else None


def _class_problems(scan: Scan, member: Member, facts: Mapping[str, Any]) -> list[Problem]:
    """Problems with the classes, compared with the class folders, the export's record and the classifier's width."""
    problems = []
    folders = scan.classes
    if set(member.classes) != set(folders):
        message = f"trained on the classes {', '.join(member.classes)}; the split has {', '.join(folders)}"
        problems.append(Problem("classes", "error", member.name, message, "train it on this split"))
    elif member.classes != folders:
        message = "its classes are in another order; they are matched by name"
        problems.append(Problem("class_order", "warning", member.name, message, "nothing to do"))
    if facts["classes"] is None and facts["outputs"] is not None:
        outputs, count = facts["outputs"], len(folders)
        if outputs < count:
            message = f"the network has {outputs} outputs; the split has {count} classes"
            problems.append(Problem("classes", "error", member.name, message, "train it on this split"))
        elif outputs > count:
            message = f"the network has {outputs} outputs for {count} classes; the last {outputs - count} are cut off"
            remedy = f"nothing to do; {VERIFY} checks whether they are ever predicted"
            problems.append(Problem("surplus_logits", "warning", member.name, message, remedy))
    mapping = None if member.source == "derived" else training_records.class_mapping(scan.workspace, member.name)
    if mapping is not None and mapping[: len(member.classes)] != member.classes:
        file = scan.workspace.relative(scan.workspace.class_mapping(member.name))
        message = f"{file} names the outputs {', '.join(mapping)}; they are taken to be {', '.join(member.classes)}"
        remedy = f"{VERIFY} measures which order is right"
        problems.append(Problem("class_mapping", "warning", member.name, message, remedy))
    return problems


def _oof(scan: Scan, member: Member) -> tuple[dict[str, Any] | None, list[Problem]]:
    """The catalog's entry of a member's out-of-fold predictions, and the problems with them or their absence."""
    name, train = member.name, scan.splits["train"]
    path = scan.workspace.base_oof(name)
    remedy_again = kfold_remedy(scan.workspace, member)
    if not path.is_file():
        if member.source == "derived":
            return None, []
        remedy = f"{remedy_again}, or exclude it from stacking: backbones.exclude"
        if not is_declared(scan.workspace, member):
            command = kfold_command(scan.workspace, [member])
            remedy = f"Retrain with ENABLE_KFOLD_CV=True ({command}), or exclude it from stacking: backbones.exclude"
        return None, [Problem("no_oof", "warning", name, f"No K-fold results for backbone {name}", remedy)]
    digest = scan.digests.of(path)
    key = digest_of(["oof", VERSION, digest, train.digest, list(scan.classes)])
    facts = scan.digests.facts(key)
    if facts is None:
        facts = _oof_facts(path, name, train, scan.classes)
        scan.digests.keep(key, facts)
    if "refused" in facts:
        return None, [Problem("oof_refused", "warning", name, facts["refused"], remedy_again)]
    problems = []
    total, rows, duplicates = len(train.sample_ids), facts["rows"], facts["twins"]
    if rows != total:
        message = f"out-of-fold predictions for {rows} of {total} train images; {total - rows} rows are missing"
        problems.append(Problem("oof_rows", "warning", name, message, remedy_again))
    if duplicates:
        message = f"{len(duplicates)} out-of-fold rows have an equal image in another fold, first {duplicates[0]}"
        problems.append(Problem("oof_twins", "warning", name, message, remedy_again))
    if facts["kind"] == "half-precision probabilities":
        message = "its out-of-fold probabilities have half precision, as training on CUDA gives them"
        problems.append(Problem("half_precision", "info", name, message, "run K-fold again for exact ones"))
    listed = {key: facts[key] for key in ("rows", "folds", "accuracy")}
    return {"path": scan.workspace.relative(path), "sha256": digest} | listed, problems


def _oof_facts(path: Path, name: str, train: ImageSplit, classes: tuple[str, ...]) -> dict[str, Any]:
    try:
        oof = out_of_fold.read(path, name, train, classes, remedy=inspection.NOT_USED)
    except UserError as error:
        return {"refused": str(error)}
    return {
        "rows": len(oof.labels),
        "folds": len(np.unique(oof.fold)),
        "accuracy": oof.accuracy,
        "kind": oof.kind,
        "twins": out_of_fold.duplicates_across_folds(oof, train),
    }
