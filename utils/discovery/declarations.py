"""Declarations of timm networks by the user: `--add`, `--add-from` and `--preprocess` of `discover`.

A declaration is complete before anything is written: architecture, weights, class order and preprocessing are known,
and the network has been built with the weights and run on a blank image.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from utils.core.display_text import first_names
from utils.core.errors import UserError, did_you_mean, nearest_first
from utils.core.workspace import Workspace
from utils.discovery import (
    candidates,
    declaration_checks,
    hubs,
    identification,
    model_folders,
    preprocessing_sources,
)
from utils.discovery.class_lists import require_match
from utils.discovery.declaration_checks import ASSUMED_CLASSES
from utils.discovery.identification import MemberCandidate, Scan
from utils.discovery.preprocessing_sources import Requests
from utils.networks.construction import NetworkSpec
from utils.networks.preprocessing import Preprocessing
from utils.predictions.catalog import TIMM, Catalog, Member, Problem, is_declared

ADDED = re.compile(r"(?P<name>[^=]+)=(?P<scheme>[^:=]+):(?P<target>.+)")
SCHEMES = ("timm", "local-dir", "hf-hub")
FORMS = "NAME=timm:ARCH@FILE, NAME=local-dir:FOLDER, NAME=hf-hub:ORG/NAME or NAME=timm:ARCH"
EXAMPLE = "--add leaf=timm:resnet18@weights/leaf.safetensors"
CONFLICT = "preprocessing_conflict"


@dataclass(frozen=True)
class Declaration:
    """A checked declaration of a timm network."""

    name: str
    architecture: str
    """timm's name, without the prefix `timm:`"""
    weights: Path
    classes: tuple[str, ...]
    """Class names in the order of the network's outputs."""
    preprocessing: Preprocessing
    problems: tuple[Problem, ...] = ()

    def network(self) -> NetworkSpec:
        """The specification of the network."""
        return NetworkSpec(self.architecture, self.weights, "full", self.preprocessing, self.classes, source="timm")


@dataclass(frozen=True)
class Options:
    """Options of `discover` about declared networks."""

    add: Sequence[str] = ()
    """`NAME=timm:ARCH@FILE`, `NAME=local-dir:FOLDER`, `NAME=hf-hub:ORG/NAME` or `NAME=timm:ARCH`"""
    add_from: Sequence[str] = ()
    """Folders that contain one folder per network."""
    preprocess: Sequence[str] = ()
    """`KEY=VALUE` for all added networks, `NAME:KEY=VALUE` for one network."""


@dataclass(frozen=True)
class Request:
    """One network requested by the user."""

    name: str
    scheme: str
    target: str
    where: str
    """The option as typed; messages start with it."""


@dataclass(frozen=True)
class Declared:
    """Declarations of the options of one command."""

    declarations: tuple[Declaration, ...] = ()
    changed: Mapping[str, Preprocessing] = field(default_factory=dict)
    """{existing member: its new preprocessing}"""
    failures: tuple[str, ...] = ()
    """Folders of --add-from that were skipped, with reasons."""
    messages: tuple[str, ...] = ()


def declared(scan: Scan, options: Options, earlier: Catalog | None) -> Declared:
    """Resolve and check the declarations of the options.

    Raises UserError for an invalid option and for a network of `add` that cannot be a member; such folders of
    `add_from` are failures.
    """
    requests = preprocessing_sources.parse_requests(options.preprocess)
    remembered = remembered_members(scan, earlier)
    single = [_parsed(text) for text in options.add]
    folders, messages, failures = _folders(options.add_from)
    _require_targets(requests, remembered, [*single, *folders])
    _require_distinct(single, folders)
    declarations: dict[str, Declaration] = {}
    for request in [*single, *folders]:
        try:
            _require_name(scan, earlier, request, remembered, declarations)
            declarations[request.name] = _declaration(scan, request, requests.of(request.name))
        except UserError as error:
            if request in single:
                raise
            failures.append(str(error))
    changed = {
        name: _changed(scan, remembered[name], values)
        for name, values in requests.by_name.items()
        if name in remembered and name not in declarations
    }
    if options.add_from:
        messages.insert(0, f"declared from folders: {', '.join(r.name for r in folders if r.name in declarations)}")
    return Declared(tuple(declarations.values()), changed, tuple(failures), tuple(messages))


def remembered_members(scan: Scan, earlier: Catalog | None) -> dict[str, Member]:
    """{name: member} of the networks that earlier commands declared."""
    members = earlier.members if earlier else {}
    return {name: member for name, member in members.items() if is_declared(scan.workspace, member)}


def member_candidates(scan: Scan, requested: Declared, earlier: Catalog | None) -> list[MemberCandidate]:
    """Candidates of all declared networks, sorted by name; those of this command replace earlier ones by name."""
    by_name: dict[str, MemberCandidate] = {}
    for name, member in remembered_members(scan, earlier).items():
        record = requested.changed.get(name) or (member.image_preprocessing if member.preprocessing else None)
        by_name[name] = MemberCandidate(
            name,
            scan.workspace.base / member.checkpoints[0]["path"],
            "final",
            member.architecture,
            img_size=member.img_size,
            others=candidates.folds(scan.workspace, name),
            remembered=member,
            preprocessing=record,
            classes=member.classes,
        )
    for declaration in requested.declarations:
        by_name[declaration.name] = MemberCandidate(
            declaration.name,
            declaration.weights,
            "final",
            f"{TIMM}{declaration.architecture}",
            others=candidates.folds(scan.workspace, declaration.name),
            preprocessing=declaration.preprocessing,
            classes=declaration.classes,
        )
    return [by_name[name] for name in sorted(by_name)]


def problems_of(
    workspace: Workspace, requested: Declared, listed: Mapping[str, Member], earlier: Catalog | None
) -> list[Problem]:
    """Problems of the declarations of this command, and of earlier declarations in the catalog."""
    new = {declaration.name: declaration.problems for declaration in requested.declarations}
    problems = [problem for name in new for problem in new[name]]
    for problem in earlier.problems if earlier else ():
        # These problems come from the files of a declaration, which are not read again.
        member = listed.get(problem.member or "") if problem.member not in new else None
        if member is not None and problem.code == ASSUMED_CLASSES:
            problems.append(declaration_checks.classes_problem(member.name, member.classes))
        elif member is not None and problem.code == CONFLICT and member.name not in requested.changed:
            problems.append(problem)
    for name, member in listed.items():
        if name not in new and member.preprocessing is not None and is_declared(workspace, member):
            problems += declaration_checks.preprocessing_problems(name, member.image_preprocessing)
    return problems


# parsing and resolving ------------------------------------------------------------------------------------------------


def _parsed(text: str) -> Request:
    match, where = ADDED.fullmatch(text), f"--add {text}"
    if match is None:
        raise UserError(f"{where}: expected {FORMS}, such as {EXAMPLE}")
    if match["scheme"] not in SCHEMES:
        near = did_you_mean(match["scheme"], SCHEMES, ";")
        raise UserError(f"{where}: no such source: {match['scheme']!r}{near} expected {FORMS}, such as {EXAMPLE}")
    return Request(match["name"], match["scheme"], match["target"], where)


def _folders(roots: Sequence[str]) -> tuple[list[Request], list[str], list[str]]:
    """Requests of the network folders below `roots`, messages about skipped entries, and failures.

    Raises UserError for a root that is not a folder or has no network below it.
    """
    folders: list[Path] = []
    messages = []
    for text in roots:
        root = Path(text).expanduser().absolute()
        if not root.is_dir():
            near = did_you_mean(root.name, [path.name for path in root.parent.glob("*") if path.is_dir()], ";")
            problem = "a file, not a folder" if root.exists() else "no such folder"
            raise UserError(f"--add-from {text}: {problem}{near} expected a folder with a folder for each network")
        below = _model_folders(root)
        if not below:
            hint = f" (a single network is declared with --add NAME=local-dir:{text})"
            hint = hint if model_folders.is_model_folder(root) else ""
            raise UserError(f"--add-from {text}: no folder of a network below it; {model_folders.EXPECTED}{hint}")
        folders += below
        other_entries = [path for path in sorted(root.iterdir()) if path.is_symlink() or not path.is_dir()]
        names = [path.name for path in other_entries if not path.name.startswith(".")]
        if names:
            messages.append(f"passed over in {root}, since they are files or links: {first_names(names, 5)}")
    folders = list(dict.fromkeys(folders))
    by_name: dict[str, list[Path]] = {}
    for folder in folders:
        by_name.setdefault(folder.name.casefold(), []).append(folder)
    failures = [
        f"--add-from: {' and '.join(map(str, same))} have the same name. Rename one, or give names: --add "
        f"NAME=local-dir:{same[0]}"
        for same in by_name.values()
        if len(same) > 1
    ]
    unique = [same[0] for same in by_name.values() if len(same) == 1]
    return (
        [Request(f.name, "local-dir", str(f), f"--add-from {f.parent}: {f.name}") for f in unique],
        messages,
        failures,
    )


def _model_folders(root: Path) -> list[Path]:
    """The network folders below `root`, sorted; hidden folders and symbolic links are not followed."""
    folders = []
    for path in sorted(root.iterdir()):
        if path.is_dir() and not path.is_symlink() and not path.name.startswith("."):
            folders += [path] if model_folders.is_model_folder(path) else _model_folders(path)
    return folders


def _require_targets(requests: Requests, remembered: Mapping[str, Member], new: Sequence[Request]) -> None:
    """Raise UserError for a request of --preprocess that applies to no network."""
    if requests.general and not new:
        key, value = next(iter(requests.general.items()))
        raise UserError(
            f"--preprocess {key}={value}: for which network? Give --add or --add-from with it, or name a declared "
            f"network: --preprocess NAME:{key}=..., where NAME is one of {', '.join(remembered) or '(none yet)'}"
        )
    names = [*remembered, *(request.name for request in new)]
    for name in requests.by_name:
        if name not in names:
            raise UserError(
                f"--preprocess {name}:...: {name} is no network that was declared with --add"
                f"{nearest_first(name, names, 'These were')}"
            )


def _require_distinct(single: Sequence[Request], folders: Sequence[Request]) -> None:
    for index, request in enumerate(single):
        if request.name in [other.name for other in [*single[:index], *folders]]:
            raise UserError(
                f"{request.where}: the name {request.name} occurs twice in this command. Choose another name"
            )


def _require_name(
    scan: Scan,
    earlier: Catalog | None,
    request: Request,
    remembered: Mapping[str, Member],
    new: Iterable[str],
) -> None:
    if request.name in {candidate.name for candidate in candidates.trained(scan.workspace)}:
        raise UserError(
            f"{request.where}: a checkpoint of {request.name} is in {scan.workspace.checkpoints} already. Choose "
            "another name"
        )
    if request.name not in remembered:
        candidates.require_new_name(scan.workspace, earlier, request.name, request.where, new)


def _declaration(scan: Scan, request: Request, values: Mapping[str, Any]) -> Declaration:
    where = request.where
    if request.scheme == "local-dir":
        return _of_folder(scan, request, Path(request.target).expanduser().absolute(), values)
    if request.scheme == "hf-hub":
        folder = hubs.download(request.target, scan.workspace.pretrained_weights, where)
        return _of_folder(scan, request, folder, values)
    architecture, separator, file = request.target.partition("@")
    declaration_checks.require_architecture(architecture, where)
    if separator:
        return _of_file(scan, request, architecture, Path(file).expanduser().absolute(), values)
    repository, count = hubs.repository_of(architecture, where)
    _require_number(scan, request, count, f"the pretrained weights of {architecture}", architecture, "hub")
    return _of_folder(scan, request, hubs.download(repository, scan.workspace.pretrained_weights, where), values)


def _of_file(scan: Scan, request: Request, architecture: str, path: Path, values: Mapping[str, Any]) -> Declaration:
    """A declaration of a weights file, which may record classes and preprocessing."""
    if path.is_dir():
        raise UserError(f"{request.where}: {path} is a folder; declare it as {request.name}=local-dir:{path}")
    if not path.is_file():
        near = did_you_mean(path.name, [entry.name for entry in path.parent.glob("*")])
        raise UserError(f"{request.where}: {path}: no such file{near}")
    return _resolved(scan, request, architecture, path, values, folder=None)


def _of_folder(scan: Scan, request: Request, path: Path, values: Mapping[str, Any]) -> Declaration:
    try:
        folder = model_folders.read_model_folder(path, preprocessing_is_given=bool(values))
    except UserError as error:
        raise UserError(f"{request.where}: {error}") from error
    declaration_checks.require_architecture(folder.architecture, f"{request.where}: {path / model_folders.CONFIG}")
    if folder.num_classes is not None:
        what = str(path / model_folders.CONFIG)
        _require_number(scan, request, folder.num_classes, what, folder.architecture, str(folder.weights))
    return _resolved(scan, request, folder.architecture, folder.weights, values, folder=folder)


def _require_number(scan: Scan, request: Request, count: int, what: str, architecture: str, weights: str) -> None:
    declaration_checks.require_number(
        scan.workspace,
        scan.classes,
        count,
        where=request.where,
        what=what,
        architecture=architecture,
        weights=weights,
    )


def _resolved(
    scan: Scan,
    request: Request,
    architecture: str,
    path: Path,
    values: Mapping[str, Any],
    *,
    folder: model_folders.ModelFolder | None,
) -> Declaration:
    """The declaration, with classes and preprocessing from their most specific sources, checked by running it."""
    where = request.where
    try:
        facts = identification.checkpoint_facts(path, scan.digests)
    except UserError as error:
        raise declaration_checks.in_declaration(where, error) from error
    problems = []
    recorded_classes = tuple(facts["classes"] or ())
    classes = (folder.classes if folder else None) or recorded_classes
    if recorded_classes not in ((), classes):
        raise UserError(
            f"{where}: {path.name} and {model_folders.CONFIG} name different classes. {model_folders.CORRECT}"
        )
    if classes:
        require_match(classes, scan.classes, f"{where}: the class names of {path.parent if folder else path}")
    else:
        problems.append(declaration_checks.classes_problem(request.name, scan.classes))
    if folder is not None and folder.preprocessing is not None:
        base = folder.preprocessing
    else:
        recorded = identification.recorded_preprocessing(path, facts, f"{TIMM}{architecture}")
        fallback_size = scan.config.dataset.img_size
        base = recorded or preprocessing_sources.of_architecture(architecture, fallback_size, facts["img_size"])
    preprocessing = preprocessing_sources.with_requests(base, values, f"{where}: --preprocess")
    problems += declaration_checks.preprocessing_problems(request.name, preprocessing)
    if folder is not None and folder.conflict and not values:
        message = f"{preprocessing.describe()} is used; another file of its folder has {folder.conflict}"
        remedy = (
            f"state which is right: python ensemble_orchestrator.py discover --preprocess {request.name}:KEY=VALUE ..."
        )
        problems.append(Problem(CONFLICT, "warning", request.name, message, remedy))
    declaration = Declaration(request.name, architecture, path, classes or scan.classes, preprocessing, tuple(problems))
    outputs = declaration_checks.run_on_blank(declaration.network(), folder.global_pool if folder else None, where)
    if folder is not None and folder.num_classes not in (None, outputs):
        config = path.parent / model_folders.CONFIG
        raise UserError(
            f"{where}: {config} has {folder.num_classes} classes; the weights in {path.name} "
            f"have {outputs} outputs. {model_folders.CORRECT}"
        )
    _require_number(scan, request, outputs, str(path), architecture, str(path))
    return declaration


def _changed(scan: Scan, member: Member, values: Mapping[str, Any]) -> Preprocessing:
    """A declared member's preprocessing with the user's changes, checked by running the network."""
    where = f"--preprocess {member.name}"
    preprocessing = preprocessing_sources.with_requests(member.image_preprocessing, values, where)
    spec = replace(member.network(scan.workspace), preprocessing=preprocessing)
    declaration_checks.run_on_blank(spec, None, where)
    return preprocessing
