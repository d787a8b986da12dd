"""Discovery: which trained members a workspace holds, what is known of each, and what is wrong."""

from __future__ import annotations

import logging
import re
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from utils import base_back, streaming
from utils.artifacts import FileDigests, digest_of, read_arrays, read_json, write_json
from utils.config import Config
from utils.errors import UserError, did_you_mean
from utils.results import Result
from utils.streaming import ImageSplit, NetworkSpec
from utils.workspace import SPLITS, Workspace

logger = logging.getLogger("disease_pipeline")

SCHEMA = 1
STAGES = ("final", "finetune_best", "head_best")  # the first that exists is the member
CHECKPOINT_NAME = re.compile(r"(?P<name>.+)_(?P<role>final|finetune_best|head_best|fold\d+|snapshot\d+)\.pth")
RUN_DISCOVER = "Run `python ensemble_orchestrator.py discover` first"


@dataclass(frozen=True)
class Problem:
    """Something a user should know about a member or a split."""

    code: str
    severity: str
    """error: the member cannot be used; warning: it can; info."""
    member: str | None
    message: str
    remedy: str


@dataclass(frozen=True)
class Member:
    """One trained model that can be ensembled."""

    name: str
    architecture: str
    size: str
    img_size: int
    classes: tuple[str, ...]
    """In the order of the network's outputs."""
    checkpoints: tuple[dict[str, str], ...]
    """{path, stage, sha256}, the member's own first."""
    exports: tuple[str, ...]
    metrics: str | None
    oof: dict[str, Any] | None
    """{path, rows, folds, sha256}"""
    recorded_accuracy: float | None
    digest: str
    """Of the weights and of what is needed to run them."""
    usable: bool = True
    source: str = "trained"
    parents: tuple[str, ...] = ()

    def network(self, workspace: Workspace) -> NetworkSpec:
        """How to build and run it."""
        path = workspace.base / self.checkpoints[0]["path"]
        return NetworkSpec(self.architecture, path, self.size, self.img_size, self.classes)


@dataclass(frozen=True)
class Catalog:
    """What discovery found, as `ensemble_catalog.json` holds it."""

    base_back: dict[str, str]
    classes: tuple[str, ...]
    splits: dict[str, dict[str, Any]]
    members: dict[str, Member]
    problems: tuple[Problem, ...] = field(default=())

    def as_record(self) -> dict[str, Any]:
        """JSON-ready."""
        record = asdict(self) | {"schema": SCHEMA}
        for member in record["members"].values():
            del member["name"]
        return record


def discover(config: Config, workspace: Workspace, *, verify: bool = False, force: bool = False) -> Result:
    """Find trained models, check them and write the catalog.

    `verify` also loads every member and runs one batch, once for the same weights and images unless `force`; a scan is
    cheap, so it is always made. Raises UserError when there is no member.
    """
    digests = FileDigests(workspace.digests)
    splits = {split: streaming.list_images(workspace.split_dir, split, digests) for split in SPLITS}
    problems = _split_problems(splits)
    members: dict[str, Member] = {}
    classes = splits["train"].classes
    for name, roles in sorted(_checkpoints(workspace).items()):
        try:
            members[name] = _member(workspace, name, roles, classes, digests)
        except UserError as error:
            problems.append(Problem("checkpoint_refused", "error", name, str(error), "See the message"))
            continue
        try:
            members[name] = replace(members[name], oof=_oof_facts(workspace, name, digests))
        except UserError as error:
            problems.append(Problem("oof_refused", "warning", name, str(error), "It is used without them"))
        found = _member_problems(workspace, members[name], splits["train"])
        if any(problem.severity == "error" for problem in found):
            members[name] = replace(members[name], usable=False)
        problems += found
    if verify:
        members, found = _verify(config, workspace, members, splits["val"], digests, force=force)
        problems += found
    digests.save()
    if not members:
        refused = "".join(f"; {problem.message}" for problem in problems if problem.severity == "error")
        raise UserError(
            f"{workspace.checkpoints}: no trained model (expected files such as CustomConvNeXt_final.pth{refused}). "
            "Train some first: make demo, or python BASE-BACK/src/main.py"
        )
    path = base_back.locate()
    catalog = Catalog(
        base_back={"path": str(path), "kind": base_back.kind(path), "digest": base_back.source_digest(path)},
        classes=classes,
        splits={name: {"n": len(split.sample_ids), "digest": split.digest} for name, split in splits.items()},
        members=members,
        problems=tuple(problems),
    )
    write_json(workspace.catalog, catalog.as_record())
    failures = [f"{p.member}: {p.message}" for p in problems if p.severity == "error"]
    return Result(_table(workspace, catalog, verify=verify), catalog.as_record(), failures)


def load(workspace: Workspace) -> Catalog:
    """The catalog on disk. Raises UserError, with the specification's words, when there is none."""
    record = read_json(workspace.catalog, remedy=RUN_DISCOVER)
    if record is None:
        raise UserError(f"Catalog not found: {workspace.catalog}. {RUN_DISCOVER}")
    if record.get("schema") != SCHEMA:
        raise UserError(f"{workspace.catalog}: schema {record.get('schema')!r}; expected {SCHEMA}. {RUN_DISCOVER}")
    try:
        members = {name: _member_of_record(name, entry) for name, entry in record["members"].items()}
        return Catalog(
            base_back=record["base_back"],
            classes=tuple(record["classes"]),
            splits=record["splits"],
            members=members,
            problems=tuple(Problem(**problem) for problem in record["problems"]),
        )
    except (KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{workspace.catalog}: not the form of a catalog ({error}). {RUN_DISCOVER}") from error


def _member_of_record(name: str, entry: dict[str, Any]) -> Member:
    values: dict[str, Any] = {key: tuple(value) if isinstance(value, list) else value for key, value in entry.items()}
    return Member(name=name, **values)


def select(catalog: Catalog, config: Config) -> list[Member]:
    """The members that the configuration asks for, by name. Raises UserError when fewer than one is left.

    A named backbone that was never trained is left out with a warning; one that no backbone is called is an error.
    """
    named = [*config.backbones.include, *config.backbones.exclude]
    settings = base_back.settings()
    known = {*getattr(settings, "ALL_BACKBONES", settings.BACKBONES), *catalog.members}
    unknown = [f"{name!r}{did_you_mean(name, known)}" for name in named if name not in known]
    if unknown:
        raise UserError(
            f"{config.source}: backbones.include or backbones.exclude names no backbone; "
            f"known: {', '.join(sorted(known))}; found: {', '.join(unknown)}"
        )
    wanted = config.backbones.selected
    missing = [name for name in wanted if name not in catalog.members]
    if missing:
        logger.warning("Model %s not found, skipping (train it, then run discover)", ", ".join(missing))
    found = sorted(name for name in wanted if name in catalog.members and catalog.members[name].usable)
    if not found:
        raise UserError(
            f"{config.source}: none of {', '.join(wanted) or 'an empty list'} is in the catalog, which holds "
            f"{', '.join(sorted(catalog.members))}. Train one of them, or name others in backbones.include"
        )
    return [catalog.members[name] for name in found]


def check_current(workspace: Workspace, member: Member, digests: FileDigests) -> None:
    """Raise UserError when a member's checkpoint is not the one that discovery saw."""
    entry = member.checkpoints[0]
    path = workspace.base / entry["path"]
    try:
        found = digests.of(path)
    except FileNotFoundError:
        raise UserError(f"{path}: the checkpoint of {member.name} is gone. Train it again or run discover") from None
    if found != entry["sha256"]:
        raise UserError(f"{path}: changed since discovery. Run `python ensemble_orchestrator.py discover` again")


def _checkpoints(workspace: Workspace) -> dict[str, dict[str, Path]]:
    """{backbone: {role: file}} for every backbone with at least one checkpoint that can be a member."""
    found: dict[str, dict[str, Path]] = {}
    if workspace.checkpoints.is_dir():
        for path in sorted(workspace.checkpoints.iterdir()):
            match = CHECKPOINT_NAME.fullmatch(path.name)
            if match and path.is_file():
                found.setdefault(match["name"], {})[match["role"]] = path
    return {name: roles for name, roles in found.items() if any(stage in roles for stage in STAGES)}


def _member(
    workspace: Workspace, name: str, roles: dict[str, Path], classes: tuple[str, ...], digests: FileDigests
) -> Member:
    main = next(stage for stage in STAGES if stage in roles)
    facts = _checkpoint_facts(roles[main], name, classes, digests)
    others = sorted(role for role in roles if role != main)
    checkpoints = tuple(
        {"path": workspace.relative(roles[role]), "stage": role, "sha256": digests.of(roles[role])}
        for role in [main, *others]
    )
    metrics = read_json(workspace.training_metrics(name), remedy="Train the backbone again")
    recorded = (metrics or {}).get("final_accuracy") if main == "final" else facts["accuracy"]
    status = workspace.deployment / name / "export_status.json"
    exports = read_json(status, remedy="Export again") or {}
    identity = {key: facts[key] for key in ("architecture", "size", "img_size", "classes")}
    return Member(
        name=name,
        architecture=facts["architecture"],
        size=facts["size"],
        img_size=facts["img_size"],
        classes=tuple(facts["classes"]),
        checkpoints=checkpoints,
        exports=tuple(sorted(form for form, entry in exports.items() if _is_ok(entry))),
        metrics=workspace.relative(workspace.training_metrics(name)) if metrics else None,
        oof=None,
        recorded_accuracy=recorded,
        digest=digest_of([checkpoints[0]["sha256"], identity]),
    )


def _is_ok(entry: object) -> bool:
    return isinstance(entry, dict) and entry.get("status") == "ok"


def _checkpoint_facts(path: Path, name: str, classes: tuple[str, ...], digests: FileDigests) -> dict[str, Any]:
    """What a checkpoint says of itself, remembered by content; where it says nothing, the settings speak."""
    digest = digests.of(path)
    known = digests.facts(digest)
    if known is None:
        record = streaming.read_checkpoint(path)
        extra = record.get("extra") if isinstance(record.get("extra"), dict) else {}
        accuracy = extra.get("final_accuracy", extra.get("accuracy"))
        known = {
            "architecture": extra.get("backbone_name"),
            "size": extra.get("model_size"),
            "img_size": extra.get("img_size"),
            "classes": list(extra["classes"]) if "classes" in extra else None,
            "accuracy": None if accuracy is None else float(accuracy),
        }
        digests.keep(digest, known)
    return {
        "architecture": known["architecture"] or name,
        "size": known["size"] or "full",
        "img_size": known["img_size"] or int(base_back.settings().IMG_SIZE),
        "classes": known["classes"] or list(classes),
        "accuracy": known["accuracy"],
    }


def _oof_facts(workspace: Workspace, name: str, digests: FileDigests) -> dict[str, Any] | None:
    path = workspace.base_oof(name)
    if not path.is_file():
        return None
    arrays = read_arrays(path, remedy="Run K-fold again: python BASE-BACK/src/main.py --stages kfold")
    fold = arrays.get("fold")
    return {
        "path": workspace.relative(path),
        "rows": len(arrays["sample_ids"]) if "sample_ids" in arrays else 0,
        "folds": 0 if fold is None else len(set(fold.tolist())),
        "sha256": digests.of(path),
    }


def _split_problems(splits: dict[str, ImageSplit]) -> list[Problem]:
    problems = []
    where: dict[str, tuple[str, str]] = {}
    for name, split in splits.items():
        if split.classes != splits["train"].classes:
            message = (
                f"{name} has the classes {', '.join(split.classes)}, train has {', '.join(splits['train'].classes)}"
            )
            problems.append(Problem("split_classes", "error", None, message, "split the images anew"))
        for sample_id, content in zip(split.sample_ids, split.contents, strict=True):
            seen = where.setdefault(content, (name, sample_id))
            if seen[0] != name:
                message = f"the same image in two splits: {seen[0]}/{seen[1]} and {name}/{sample_id}"
                problems.append(Problem("duplicate_across_splits", "warning", None, message, "evaluate leaves it out"))
    return problems


def _member_problems(workspace: Workspace, member: Member, train: ImageSplit) -> list[Problem]:
    problems = []
    if member.oof is None:
        problems.append(
            Problem(
                "no_oof",
                "warning",
                member.name,
                f"No K-fold results for backbone {member.name}",
                "Retrain with ENABLE_KFOLD_CV=True (python BASE-BACK/src/main.py --stages kfold), or exclude it from "
                "stacking: backbones.exclude",
            )
        )
    elif member.oof["rows"] != len(train.sample_ids):
        message = f"out-of-fold predictions for {member.oof['rows']} of {len(train.sample_ids)} train images"
        problems.append(Problem("oof_rows", "warning", member.name, message, "run K-fold on this split again"))
    if set(member.classes) != set(train.classes):
        message = f"trained on the classes {', '.join(member.classes)}; the split has {', '.join(train.classes)}"
        problems.append(Problem("classes", "error", member.name, message, "train it on this split"))
    elif member.classes != train.classes:
        message = "its classes stand in another order; they are matched by name"
        problems.append(Problem("class_order", "warning", member.name, message, "nothing to do"))
    if member.metrics is None:
        message = f"no {workspace.training_metrics(member.name).name}, so its recorded accuracy is unknown"
        problems.append(Problem("no_metrics", "info", member.name, message, "nothing to do"))
    return problems


def _verify(
    config: Config,
    workspace: Workspace,
    members: dict[str, Member],
    val: ImageSplit,
    digests: FileDigests,
    *,
    force: bool,
) -> tuple[dict[str, Member], list[Problem]]:
    """Load every member that has not run yet and run one batch of val images."""
    keys = {name: digest_of(["verified", member.digest, val.digest]) for name, member in members.items()}
    waiting = {name: member for name, member in members.items() if force or not digests.facts(keys[name])}
    if not waiting:
        return members, []
    device = streaming.resolve_device(config.device)
    count = min(config.dataset.batch_size, len(val.sample_ids))
    few = replace(
        val,
        sample_ids=val.sample_ids[:count],
        labels=val.labels[:count],
        paths=val.paths[:count],
        contents=val.contents[:count],
    )
    checked, problems = dict(members), []
    for name, member in waiting.items():
        try:
            for batch in streaming.stream(
                member.network(workspace), [few], batch_size=count, device=device, image_cache=workspace.image_cache
            ):
                logger.info("verify %s: logits %s, embeddings %s", name, batch.logits.shape, batch.embeddings.shape)
            digests.keep(keys[name], True)
        except UserError as error:
            checked[name] = replace(member, usable=False)
            problems.append(Problem("does_not_run", "error", name, str(error), "See the message"))
    return checked, problems


def _table(workspace: Workspace, catalog: Catalog, *, verify: bool) -> str:
    width = max(len(name) for name in catalog.members)
    lines = [f"{'member':{width}}  size  px   recorded  out-of-fold rows  checkpoints"]
    for name, member in sorted(catalog.members.items()):
        recorded = "-" if member.recorded_accuracy is None else f"{member.recorded_accuracy:.4f}"
        oof = "-" if member.oof is None else f"{member.oof['rows']} in {member.oof['folds']} folds"
        lines.append(
            f"{name:{width}}  {member.size:4}  {member.img_size:<3}  {recorded:8}  {oof:16}  {len(member.checkpoints)}"
            f"{'' if member.usable else '  cannot be used'}"
        )
    sizes = ", ".join(f"{split} {facts['n']}" for split, facts in catalog.splits.items())
    lines.append(f"{len(catalog.members)} members, {len(catalog.classes)} classes, images: {sizes}")
    lines += [f"{p.severity}: {p.member + ': ' if p.member else ''}{p.message}. {p.remedy}" for p in catalog.problems]
    lines.append(f"{'verified, ' if verify else ''}written: {workspace.catalog}")
    return "\n".join(lines)
