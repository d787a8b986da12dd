"""The catalog: the members of a workspace, their checkpoints, measurements and problems."""

from __future__ import annotations

import logging
import re
import shlex
from collections.abc import Collection, Iterable, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from utils import base_back
from utils.core import workspace_hints
from utils.core.artifacts import FileDigests, digest_of, read_json, write_json
from utils.core.display_text import first_names
from utils.core.errors import UserError
from utils.core.workspace import Workspace
from utils.networks.construction import NetworkSpec
from utils.networks.preprocessing import Preprocessing
from utils.predictions import catalog_records

logger = logging.getLogger("disease_pipeline")

SCHEMA = 1
STAGES = ("final", "finetune_best", "head_best")  # the member is the first that exists
MADE = r"uniform_soup|greedy_soup|wise_ft|distilled"  # roles of checkpoints derived from other members
END_TO_END = "end_to_end"  # stage of a network fine-tuned with a fusion
CHOSEN = re.compile(rf"{MADE}|{END_TO_END}")  # stages of networks that were selected on val rows
DERIVED = rf"snapshot\d+|{MADE}"
CHECKPOINT_NAME = re.compile(
    rf"(?P<name>.+)_(?P<role>final|finetune_best|head_best|fold\d+|(?:head|finetune)_epoch\d+|{DERIVED})\.pth"
)
IMPORTED = "imported"
LAST_EPOCH, BEST_ON_VAL = "last", "val"
"""Values of `Member.selection`."""
TIMM = "timm:"  # prefix of architectures that timm builds, not BASE-BACK
DISCOVER = ("python", "ensemble_orchestrator.py", "discover")
"""Words of the command `discover`"""
VERIFY = " ".join([*DISCOVER, "--verify"])
RUN_DISCOVER = "Run `python ensemble_orchestrator.py discover` first"


@dataclass(frozen=True)
class Problem:
    """A finding about a member or a split, with its remedy."""

    code: str
    severity: str
    """`error`: the member cannot be used; `warning`: it can, but its metrics or files need attention; or `info`."""
    member: str | None
    message: str
    remedy: str


@dataclass(frozen=True)
class Member:
    """A trained model, or an imported set of predictions, that can be ensembled."""

    name: str
    architecture: str
    size: str
    img_size: int | None
    """Image size in pixels; None for an imported member, whose architecture and size are `unknown`."""
    classes: tuple[str, ...]
    """Class names in the order of the network's outputs."""
    checkpoints: tuple[dict[str, str], ...]
    """{path, stage, sha256}, the member's own checkpoint first; empty for an imported member"""
    exports: tuple[str, ...]
    metrics: str | None
    oof: dict[str, Any] | None
    """{path, rows, folds, accuracy, sha256}"""
    recorded_accuracy: float | None
    digest: str
    """Digest of the weights and everything needed to run them; for an imported member, of its predictions"""
    usable: bool = True
    source: str = "trained"
    """`trained`; `derived` from other members' weights or outputs; `imported`: predictions without a network"""
    parents: tuple[str, ...] = ()
    recorded_test_accuracy: float | None = None
    trained_on: str = "train"
    """Images of the workspace that the weights were trained on: one of `training_data.STATEMENTS`"""
    training_list: dict[str, Any] | None = None
    """The list of a `file` statement: {digest, rows: {split: n}, unmatched, lines, unmatched_line}; catalogs of earlier
    versions lack the last two"""
    pretrained_on: str = "none"
    """The same for the initial weights of its training and of that of its fold networks; `none` for random weights"""
    trunk: dict[str, str] | None = None
    """{checkpoint, sha256} of the frozen trunk shared with its fold networks; None without one"""
    preprocessing: dict[str, Any] | None = None
    """Preprocessing record; None: the base pipeline's evaluation transform at `img_size`."""
    selection: str = BEST_ON_VAL
    """The epoch of its networks: `last`, or the best one on `val`, which is assumed if no file records it"""
    views: tuple[str, ...] = ()
    """Groups of views over which its networks' logits are averaged (test-time augmentation)"""

    @property
    def image_preprocessing(self) -> Preprocessing:
        """Its preprocessing. Raises UserError for an imported member, which takes no images."""
        if self.img_size is None:
            raise UserError(f"{self.name}: imported predictions; there is no network that takes images")
        if self.preprocessing is None:
            return Preprocessing.of_base_pipeline(self.img_size)
        return Preprocessing.from_record(self.preprocessing, f"{self.name}: preprocessing", remedy=RUN_DISCOVER)

    def network(self, workspace: Workspace, stage: str | None = None) -> NetworkSpec:
        """The specification of the member's network, or of another of its stages, such as `fold0`.

        Raises UserError for an imported member.
        """
        if self.source == IMPORTED or self.img_size is None:
            raise UserError(f"{self.name}: imported predictions; there is no network that could be run")
        entries = [entry for entry in self.checkpoints if stage in (None, entry["stage"])]
        path = workspace.base / entries[0]["path"]
        architecture = self.architecture.removeprefix(TIMM)
        options: dict[str, Any] = {"source": "timm"} if self.architecture.startswith(TIMM) else {}
        options |= {"views": self.views}
        return NetworkSpec(architecture, path, self.size, self.image_preprocessing, self.classes, **options)


def network_digest(
    sha256: str, architecture: str, size: str, classes: Sequence[str], preprocessing: Preprocessing
) -> str:
    """A member's digest: of its weights, whose file has the digest `sha256`, and of everything needed to run them.

    The base pipeline's evaluation transform enters only by the image size.
    """
    identity: dict[str, Any] = {
        "architecture": architecture,
        "size": size,
        "img_size": preprocessing.input_size,
        "classes": list(classes),
    }
    if not preprocessing.is_base_pipeline:
        identity["preprocessing"] = preprocessing.inputs_record()
    return digest_of([sha256, identity])


def preprocessing_entry(architecture: str, preprocessing: Preprocessing) -> dict[str, Any]:
    """The entry in a derived checkpoint's `extra`; empty for the default preprocessing."""
    is_default = preprocessing.is_base_pipeline and not architecture.startswith(TIMM)
    return {} if is_default else {"preprocessing": preprocessing.as_record()}


@dataclass(frozen=True)
class Catalog:
    """The result of discovery, stored in `ensemble_catalog.json`."""

    base_back: dict[str, str]
    classes: tuple[str, ...]
    splits: dict[str, dict[str, Any]]
    """{split: {n, digest}}, with `images: false` if the rows come only from imported predictions"""
    members: dict[str, Member]
    problems: tuple[Problem, ...] = field(default=())

    @property
    def has_images(self) -> bool:
        """Whether the splits are folders of images, not rows of imported predictions."""
        return all(facts.get("images", True) for facts in self.splits.values())

    def imported(self) -> dict[str, Member]:
        """{name: imported member}."""
        return {name: member for name, member in self.members.items() if member.source == IMPORTED}

    def as_record(self) -> dict[str, Any]:
        """The record of the catalog, JSON-ready."""
        # Sorted, so that the order does not depend on whether a scan or a build added a member.
        problems = sorted(self.problems, key=lambda problem: (problem.member or "", problem.code, problem.message))
        record = asdict(replace(self, problems=tuple(problems))) | {"schema": SCHEMA}
        for member in record["members"].values():
            del member["name"]
            for key in ("preprocessing", "views"):
                if not member[key]:
                    del member[key]
        return record

    def with_problems(self, new: Sequence[Problem], *, members: Collection[str], codes: Collection[str]) -> Catalog:
        """The catalog with all problems of these members and codes replaced by `new`."""
        remaining = [p for p in self.problems if p.member not in members or p.code not in codes]
        return replace(self, problems=(*remaining, *new))


def checkpoint_files(workspace: Workspace) -> dict[str, dict[str, Path]]:
    """{backbone: {role: file}} of all files in the checkpoint folders that follow the naming scheme."""
    files: dict[str, dict[str, Path]] = {}
    # Derived checkpoints come last and take precedence.
    for folder in dict.fromkeys((workspace.checkpoints, workspace.derived_checkpoints)):
        for path in sorted(folder.iterdir()) if folder.is_dir() else ():
            match = CHECKPOINT_NAME.fullmatch(path.name)
            if match and path.is_file():
                files.setdefault(match["name"], {})[match["role"]] = path
    return files


def is_declared(workspace: Workspace, member: Member) -> bool:
    """Whether it is a timm network declared with --add, not one trained by the base pipeline."""
    if not member.architecture.startswith(TIMM) or member.source != "trained":
        return False
    path = workspace.base / member.checkpoints[0]["path"]
    match = CHECKPOINT_NAME.fullmatch(path.name)
    return match is None or match["name"] != member.name or path.parent != workspace.checkpoints


def is_chosen_on_val(catalog: Catalog, names: Iterable[str]) -> bool:
    """Whether one of these members was selected on val rows: a soup, a student, or an end-to-end fine-tuned network.

    Snapshots are derived too, but are not selected.
    """
    members = [catalog.members[name] for name in names if name in catalog.members]
    return any(CHOSEN.fullmatch(entry["stage"]) for member in members for entry in member.checkpoints[:1])


def end_to_end_member_name(ensemble: str, member: str) -> str:
    """Name of the member derived from another by end-to-end training of an ensemble; names sort like the originals."""
    return f"{ensemble}_{member}"


def kfold_command(workspace: Workspace, members: Sequence[Member]) -> str:
    """The commands that make out-of-fold predictions, with the bundled BASE-BACK or an external one, joined by `; `.

    Members of the base pipeline get fold networks. The training of a declared network cannot be repeated here, so its
    architecture is trained as another member, `<name>_kfold`, from timm's pretrained weights.
    """
    script, base_back_dir = base_back.BUNDLED / "src" / "main.py", base_back.locate()
    shown_script = script.relative_to(Path.cwd()) if script.is_relative_to(Path.cwd()) else script
    external = ["--base-back", str(base_back_dir)] if base_back.kind(base_back_dir) == "external" else []
    of_base = [member.name for member in members if not is_declared(workspace, member)]
    networks = [f"{member.name}_kfold={member.architecture}" for member in members if member.name not in of_base]
    options = [["--stages", "kfold", "--backbones", *of_base, *external]] if of_base else []
    options += [["--backbones", *networks, "--weights", "hub"]] if networks else []
    commands = [["python", str(shown_script), *words, "--workspace", str(workspace.base)] for words in options]
    return "; ".join(map(shlex.join, commands))


def kfold_remedy(workspace: Workspace, member: Member) -> str:
    """A sentence, without a full stop, that tells how to make new out-of-fold predictions of a member."""
    command = kfold_command(workspace, [member])
    if is_declared(workspace, member):
        return f"Train its architecture here, as a member with out-of-fold predictions: {command}"
    return f"Run K-fold on this split again: {command}"


def mounted_base_back() -> dict[str, str]:
    """The catalog's record of the mounted BASE-BACK."""
    path = base_back.locate()
    return {"path": str(path), "kind": base_back.kind(path), "digest": base_back.source_digest(path)}


def save(workspace: Workspace, catalog: Catalog) -> None:
    """Write `ensemble_catalog.json`."""
    write_json(workspace.catalog, catalog.as_record())


def load(workspace: Workspace) -> Catalog:
    """Read the catalog, with a warning if files are newer.

    Raises UserError, with the specification's message, if there is none.
    """
    catalog = read(workspace)
    stale = stale_files(workspace, catalog)
    if stale:
        logger.warning(
            "the catalog is older than %s; run `python ensemble_orchestrator.py discover` to take in what is new",
            first_names(stale, 3),
        )
    return catalog


def read(workspace: Workspace) -> Catalog:
    """Read the catalog. Raises UserError if there is none, or it is damaged."""
    record = read_json(workspace.catalog, remedy=RUN_DISCOVER)
    if record is None:
        hint = workspace_hints.elsewhere(workspace.base)
        raise UserError(f"Catalog not found: {workspace.catalog}. {RUN_DISCOVER}{hint}")
    schema = record.get("schema") if isinstance(record, dict) else None
    if schema != SCHEMA:
        raise UserError(f"{workspace.catalog}: schema {schema!r}; expected {SCHEMA}. {RUN_DISCOVER}")
    try:
        catalog_records.check(record)
        members = {name: _member_of_record(name, entry) for name, entry in record["members"].items()}
        return Catalog(
            base_back=record["base_back"],
            classes=tuple(record["classes"]),
            splits=record["splits"],
            members=members,
            problems=tuple(Problem(**problem) for problem in record["problems"]),
        )
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(f"{workspace.catalog}: not the form of a catalog ({error}). {RUN_DISCOVER}") from error


def stale_files(workspace: Workspace, catalog: Catalog) -> list[str]:
    """Sorted names of checkpoints, out-of-fold and metrics files that are newer than the catalog or not in it.

    Compares only modification times; digests are compared when a member is used.
    """
    written = workspace.catalog.stat().st_mtime_ns
    listed = {entry["path"] for member in catalog.members.values() for entry in member.checkpoints}
    refused = {problem.member for problem in catalog.problems}
    stale = []
    for backbone, roles in checkpoint_files(workspace).items():
        for role, path in roles.items():
            is_unlisted = workspace.relative(path) not in listed and not {backbone, f"{backbone}_{role}"} & refused
            if path.stat().st_mtime_ns > written or (is_unlisted and role in STAGES):
                stale.append(path)
    records = [path(name) for name in catalog.members for path in (workspace.base_oof, workspace.training_metrics)]
    stale += [path for path in records if path.is_file() and path.stat().st_mtime_ns > written]
    return sorted(path.name for path in stale)


def _member_of_record(name: str, entry: dict[str, Any]) -> Member:
    values: dict[str, Any] = {key: tuple(value) if isinstance(value, list) else value for key, value in entry.items()}
    if entry["source"] == "trained" and entry["architecture"].startswith(TIMM):
        values.setdefault("trained_on", "unknown")  # missing in catalogs of earlier versions
    return Member(name=name, **values)


def check_current(workspace: Workspace, member: Member, digests: FileDigests, stage: str | None = None) -> None:
    """Raise UserError if a member's checkpoint, or that of the given stage, has changed since discovery."""
    entry = next(entry for entry in member.checkpoints if stage in (None, entry["stage"]))
    path = workspace.base / entry["path"]
    try:
        digest = digests.of(path)
    except FileNotFoundError:
        raise UserError(f"{path}: the checkpoint of {member.name} is gone. Train it again or run discover") from None
    if digest != entry["sha256"]:
        raise UserError(f"{path}: changed since discovery. Run `python ensemble_orchestrator.py discover` again")


def problem_lines(problems: Sequence[Problem]) -> list[str]:
    """One line per problem; members with the same problem share a line and, if it names one, a command."""
    members: dict[tuple[str, str, str], list[str]] = {}
    for problem in problems:
        remedy = re.sub(rf"(?<=--backbones ){re.escape(problem.member or '')}(?= )", "{names}", problem.remedy)
        names = members.setdefault((problem.severity, problem.message, remedy), [])
        names += [problem.member] if problem.member else []
    return [
        f"{severity}: {', '.join(names) + ': ' if names else ''}{message}. {remedy[:1].upper()}{remedy[1:]}".replace(
            "{names}", " ".join(names)
        )
        for (severity, message, remedy), names in members.items()
    ]
