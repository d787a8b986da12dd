"""The contents of a workspace, and what is stale and why; read from names, times and records, without torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from utils import base_back
from utils.building import builder_protocol, ensembles, listing
from utils.building.build_commands import BUILDERS
from utils.building.builder_protocol import CURRENT, DAMAGED, MISSING, STALE, Session, State
from utils.building.ensembles import Ensemble
from utils.core.artifacts import FileDigests
from utils.core.config import Config
from utils.core.errors import LeakageError, UserError
from utils.core.parsed_files import record_once
from utils.core.workspace import SPLITS, Workspace
from utils.distillation.student_builder import StudentBuilder
from utils.evaluation import scoring
from utils.evaluation.evaluation_records import RANKING
from utils.predictions import catalog, member_selection
from utils.predictions.catalog import Catalog, Member
from utils.predictions.store import Store

SCORED_SPLITS = ("val", "test")
ALL_BUILDERS = BUILDERS | {"distill": (StudentBuilder(),)}


@dataclass(frozen=True)
class Inventory:
    """The contents of a workspace, and the state of each part."""

    catalog: State
    content: Catalog | None
    """The catalog; None if there is no readable one."""
    predictions: dict[str, dict[str, State]] = field(default_factory=dict)
    """{member: {split: state}} for the members in use."""
    ensembles: dict[str, State] = field(default_factory=dict)
    """States of saved ensembles and of those that the configuration requests."""
    requested: dict[str, tuple[str, ...]] = field(default_factory=dict)
    """{command: ensembles that it keeps up to date}"""
    unlisted: tuple[str, ...] = ()
    """Saved ensembles that the configuration does not request"""
    evaluation: State = field(default_factory=lambda: State(MISSING))
    problems: tuple[str, ...] = ()

    def stale_ensembles(self) -> dict[str, State]:
        """Saved ensembles that a build would change."""
        return {name: state for name, state in self.ensembles.items() if state.state in (STALE, DAMAGED)}


def take(config: Config, workspace: Workspace) -> Inventory:
    """Take the inventory. Writes nothing, and raises nothing for missing or damaged parts: these have that state."""
    try:
        content = catalog.load(workspace) if workspace.catalog.is_file() else None
    except UserError as error:
        return Inventory(State(DAMAGED, (str(error),)), None)
    if content is None:
        return Inventory(State(MISSING), None)
    store = Store(config, workspace, content)
    outdated = _since_discovery(workspace, content, store.digests)
    of_catalog = State(STALE if outdated else CURRENT, tuple(outdated))
    saved, states = _saved(workspace)
    try:
        session = Session(store, tuple(member_selection.select(content, config)))
        states |= _saved_states(session, saved)
        requested = _requested(session, states)
        unlisted = tuple(listing.unlisted(workspace, config))
    except (UserError, LeakageError) as error:
        return Inventory(of_catalog, content, ensembles=states, problems=(str(error),))
    for name in (name for names in requested.values() for name in names):
        states.setdefault(name, State(MISSING))
    ranked = {name: ensemble for name, ensemble in saved.items() if name not in unlisted}
    in_use = scoring.members_to_score(content, session.members, ranked)
    return Inventory(
        catalog=of_catalog,
        content=content,
        predictions={
            name: {split: _predictions_state(store, member, split) for split in SCORED_SPLITS}
            for name, member in in_use.items()
        },
        ensembles=dict(sorted(states.items())),
        requested=requested,
        unlisted=unlisted,
        evaluation=_evaluation_state(store, ranked, in_use),
    )


def _saved_states(session: Session, saved: Mapping[str, Ensemble]) -> dict[str, State]:
    """States of saved ensembles, by their builder if there is one."""
    builders = [builder for group in ALL_BUILDERS.values() for builder in group]
    states = {}
    for name in saved:
        try:
            recorded_session = session.as_recorded(ensembles.record_of(session.workspace, name) or {})
        except UserError as error:
            states[name] = State(DAMAGED, (str(error),))
            continue
        builder = next((builder for builder in builders if builder.covers(recorded_session, name)), None)
        states[name] = builder_protocol.state_of(session, name, builder)
    return states


def _requested(session: Session, states: dict[str, State]) -> dict[str, tuple[str, ...]]:
    """{command: ensembles that it keeps up to date}; a saved ensemble that its last build omitted becomes stale."""
    requested = {}
    for command, builders in ALL_BUILDERS.items():
        names: list[str] = []
        for builder in builders:
            left_out = builder.left_out(session)
            names += [name for name in builder.names(session) if name not in left_out]
            for name in (name for name in left_out if name in states):
                states[name] = State(STALE, (f"the last build left it out: {left_out[name]}",))
        requested[command] = tuple(names)
    return requested


def _since_discovery(workspace: Workspace, content: Catalog, digests: FileDigests) -> list[str]:
    """Changes since the catalog was written, by sizes and times only; reads no checkpoint."""
    written = workspace.catalog.stat().st_mtime
    reasons = []
    for member in content.members.values():
        files = [entry["path"] for entry in member.checkpoints] + ([member.oof["path"]] if member.oof else [])
        for file in files:
            path = workspace.base / file
            if not path.exists():
                reasons.append(f"{file} is gone")
            elif not _is_unchanged(path, digests, written):
                reasons.append(f"{file} has changed")
    reasons += [f"{path.name} is new" for path in _unlisted(workspace, content, written)]
    if not content.has_images and workspace.has_images:
        reasons.append("there are images now")
    for split in SPLITS if content.has_images else ():
        folder = workspace.split_dir / split
        folders = [folder, *(path for path in folder.iterdir() if path.is_dir())] if folder.is_dir() else []
        if not folders:
            reasons.append(f"{folder} is gone")
        elif any(path.stat().st_mtime > written for path in folders):
            reasons.append(f"images of {split} were added or removed")
        else:
            reasons += _edited(folder, digests, written)
    if base_back.source_digest(base_back.locate()) != content.base_back["digest"]:
        reasons.append("the code of BASE-BACK has changed")
    return reasons


def _edited(folder: Path, digests: FileDigests, written: float) -> list[str]:
    """A line on the images of a split that were changed in place, which folder times do not show; reads no images."""
    try:
        _, samples = base_back.load_bundled("samples").scan(folder)
    except ValueError as error:  # a class folder without images
        return [str(error)]
    edited = [sample.sample_id for sample in samples if not _is_unchanged(sample.path, digests, written)]
    if len(edited) < 2:
        return [f"{folder.name}/{sample_id} has changed" for sample_id in edited]
    return [f"{len(edited)} images of {folder.name} have changed, first {edited[0]}"]


def _is_unchanged(path: Path, digests: FileDigests, written: float) -> bool:
    is_unchanged = digests.is_unchanged(path)
    return path.stat().st_mtime <= written if is_unchanged is None else is_unchanged


def _unlisted(workspace: Workspace, content: Catalog, written: float) -> list[Path]:
    """Checkpoints added after the last discovery, including copies that kept their modification time."""
    if not workspace.checkpoints.is_dir():
        return []
    listed = {workspace.base / entry["path"] for member in content.members.values() for entry in member.checkpoints}
    named = {path for path in workspace.checkpoints.iterdir() if catalog.CHECKPOINT_NAME.fullmatch(path.name)}
    statuses = {path: path.stat() for path in sorted(named - listed) if path.is_file()}
    return [path for path, status in statuses.items() if max(status.st_mtime, status.st_ctime) > written]


def _saved(workspace: Workspace) -> tuple[dict[str, Ensemble], dict[str, State]]:
    saved, states = {}, {}
    for name in ensembles.names(workspace):
        try:
            saved[name] = ensembles.load(workspace, name)
        except UserError as error:
            states[name] = State(DAMAGED, (str(error),))
    return saved, states


def _predictions_state(store: Store, member: Member, split: str) -> State:
    try:
        record = record_once(store.workspace.predictions(member.name, split) / "record.json", remedy="Remove it")
    except UserError as error:
        return State(DAMAGED, (str(error),))
    if record is None:
        return State(MISSING)
    if record.get("key") == store.key(member, split):
        return State(CURRENT)
    of_old = record.get("member_digest") != member.digest
    return State(STALE, ("of an old checkpoint" if of_old else "of other images",))


def _evaluation_state(store: Store, saved: Mapping[str, Ensemble], in_use: Mapping[str, Member]) -> State:
    try:
        ranking = record_once(store.workspace.ranking("test"), remedy="Evaluate again", form=RANKING)
    except UserError as error:
        return State(DAMAGED, (str(error),))
    if ranking is None:
        return State(MISSING)
    if ranking.get("inputs_digest") != scoring.inputs_digest(store, saved, in_use, "test"):
        return State(STALE, ("members or ensembles have changed since",))
    if names := scoring.without_predictions(store.workspace, ranking, "test"):
        return State(STALE, (f"built again since: {', '.join(names)}",))
    return State(CURRENT)
