"""What a workspace holds, what of it is stale and why; found from names, times and records, without torch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from utils import base_back
from utils.building import (
    ensembles,
    fitting,
    fusion_builder,
    moe_builder,
    pruning_builder,
    snapshot_builder,
    soup_builder,
)
from utils.building.ensembles import Ensemble
from utils.core.artifacts import FileDigests, read_record
from utils.core.config import Config
from utils.core.errors import UserError
from utils.core.workspace import SPLITS, Workspace
from utils.distillation import student_plan
from utils.evaluation import scoring
from utils.predictions import catalog, fold_networks
from utils.predictions.catalog import IMPORTED, Catalog, Member
from utils.predictions.store import Store

CURRENT, STALE, MISSING, DAMAGED = "current", "stale", "missing", "damaged"
ANSWERED = ("val", "test")


@dataclass(frozen=True)
class State:
    """Of one thing: current, stale, missing or damaged, and why."""

    state: str
    reasons: tuple[str, ...] = ()

    def __str__(self) -> str:
        return self.state + (f": {'; '.join(self.reasons)}" if self.reasons else "")


NOT_PRODUCED = State(STALE, ("its backbone's checkpoints of today give no such soup",))


@dataclass(frozen=True)
class Inventory:
    """Everything that a later command would find out, found out before it."""

    catalog: State
    found: Catalog | None
    """None while there is no catalog that can be read."""
    predictions: dict[str, dict[str, State]] = field(default_factory=dict)
    """{member: {split: state}} for the members that are in use."""
    ensembles: dict[str, State] = field(default_factory=dict)
    """Saved ones, and those the configuration lists."""
    wanted: tuple[str, ...] = ()
    """Ensembles that `build-ensemble` would see to."""
    learned: dict[str, tuple[str, ...]] = field(default_factory=dict)
    """{later command: ensembles that it would see to}"""
    evaluation: State = field(default_factory=lambda: State(MISSING))
    problems: tuple[str, ...] = ()

    def stale_ensembles(self) -> dict[str, State]:
        """Saved ensembles that a build would no longer make as they are."""
        return {name: state for name, state in self.ensembles.items() if state.state in (STALE, DAMAGED)}


def take(config: Config, workspace: Workspace) -> Inventory:
    """Look at everything. Never writes, and raises nothing for what is missing or damaged: it is part of the answer."""
    try:
        found = catalog.load(workspace) if workspace.catalog.is_file() else None
    except UserError as error:
        return Inventory(State(DAMAGED, (str(error),)), None)
    if found is None:
        return Inventory(State(MISSING), None)
    store = Store(config, workspace, found)
    outdated = _since_discovery(workspace, found, store.digests)
    of_catalog = State(STALE if outdated else CURRENT, tuple(outdated))
    saved, states = _saved(workspace)
    try:
        selected = catalog.select(found, config)
        left_out = pruning_builder.left_out(store, selected)
    except UserError as error:
        return Inventory(of_catalog, found, ensembles=states, problems=(str(error),))
    for name, ensemble in saved.items():
        states[name] = _ensemble_state(config, store, ensemble, selected)
    wanted = [name for name in configured(config) if name not in left_out]
    if config.runs.snapshot_ensemble.enable:
        states[snapshot_builder.NAME] = _snapshot_state(store, selected, states)
    if config.runs.model_soup.enable:
        for member in (member for member in selected if member.source == "trained"):
            soups = _soup_states(store, member, states)
            states |= soups
            wanted += [name for name, state in soups.items() if state != NOT_PRODUCED]
    if config.distillation.enable:
        states |= _student_states(store, states)
    learned = _learned(config)
    for name in (*wanted, *(name for names in learned.values() for name in names)):
        states.setdefault(name, State(MISSING))
    in_use = scoring.members_to_score(found, selected, saved)
    return Inventory(
        catalog=of_catalog,
        found=found,
        predictions={
            name: {split: _predictions_state(store, member, split) for split in ANSWERED}
            for name, member in in_use.items()
        },
        ensembles=dict(sorted(states.items())),
        wanted=tuple(wanted),
        learned=learned,
        evaluation=_evaluation_state(store, saved, in_use),
    )


def configured(config: Config) -> list[str]:
    """Names of the score-level ensembles that the configuration lists and this version builds."""
    methods = config.runs.score_ensemble.methods if config.runs.score_ensemble.enable else ()
    names = [ensembles.NAMES[method] for method in methods if method in ensembles.NAMES]
    names += pruning_builder.names(config)
    return names + ([snapshot_builder.NAME] if config.runs.snapshot_ensemble.enable else [])


def _learned(config: Config) -> dict[str, tuple[str, ...]]:
    """What `stack`, `fusion-train`, `meta-fuse` and `distill` would build, by command."""
    stacking = tuple(f"stacking_{learner}" for learner in config.runs.stacking.meta_learners)
    found = {"stack": stacking} if config.runs.stacking.enable else {}
    fused = (*fusion_builder.names(config), *moe_builder.names(config))
    found |= {"fusion-train": fused} if fused else {}
    found |= {"meta-fuse": ("meta_fuser",)} if config.runs.meta_fuser.enable else {}
    return found | ({"distill": tuple(student_plan.names(config))} if config.distillation.enable else {})


def _since_discovery(workspace: Workspace, found: Catalog, digests: FileDigests) -> list[str]:
    """What has changed since the catalog was written, by sizes and times alone; no checkpoint is read."""
    written = workspace.catalog.stat().st_mtime
    reasons = []
    for member in found.members.values():
        places = [entry["path"] for entry in member.checkpoints] + ([member.oof["path"]] if member.oof else [])
        for place in places:
            path = workspace.base / place
            if not path.exists():
                reasons.append(f"{place} is gone")
            elif not _is_unchanged(path, digests, written):
                reasons.append(f"{place} has changed")
    reasons += [f"{path.name} is new" for path in _unlisted(workspace, found, written)]
    if not found.has_images and workspace.has_images:
        reasons.append("there are images now")
    for split in SPLITS if found.has_images else ():
        folder = workspace.split_dir / split
        places = [folder, *(path for path in folder.iterdir() if path.is_dir())] if folder.is_dir() else []
        if not places:
            reasons.append(f"{folder} is gone")
        elif any(path.stat().st_mtime > written for path in places):
            reasons.append(f"images of {split} were added or removed")
        else:
            reasons += _edited(folder, digests, written)
    if base_back.source_digest(base_back.locate()) != found.base_back["digest"]:
        reasons.append("the code of BASE-BACK is another")
    return reasons


def _edited(folder: Path, digests: FileDigests, written: float) -> list[str]:
    """A line on the images of a split that were changed in place, which their folders do not show; none is read."""
    try:
        _, samples = base_back.load_bundled("samples").scan(folder)
    except ValueError as error:  # a class folder that holds no image
        return [str(error)]
    edited = [sample.sample_id for sample in samples if not _is_unchanged(sample.path, digests, written)]
    if len(edited) < 2:
        return [f"{folder.name}/{sample_id} has changed" for sample_id in edited]
    return [f"{len(edited)} images of {folder.name} have changed, first {edited[0]}"]


def _is_unchanged(path: Path, digests: FileDigests, written: float) -> bool:
    known = digests.is_unchanged(path)
    return path.stat().st_mtime <= written if known is None else known


def _unlisted(workspace: Workspace, found: Catalog, written: float) -> list[Path]:
    """Checkpoints that came after the last discovery; also copies that kept their time of change."""
    if not workspace.checkpoints.is_dir():
        return []
    listed = {workspace.base / entry["path"] for member in found.members.values() for entry in member.checkpoints}
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


def _ensemble_state(config: Config, store: Store, ensemble: Ensemble, selected: Sequence[Member]) -> State:
    members = store.catalog.members
    gone = [name for name in ensemble.members if name not in members]
    other = [
        name
        for name, digest in ensemble.member_digests.items()
        if name in members and fold_networks.digest(members[name], ensemble.inference) != digest
    ]
    reasons = [f"{name} is no longer in the catalog" for name in gone]
    reasons += [
        f"{name} has {'other predictions' if members[name].source == IMPORTED else 'another checkpoint'} now"
        for name in other
    ]
    if not reasons and (ensemble.method in ensembles.NAMES or ensemble.name in _by_latency(config)):
        wanted = tuple(sorted(member.name for member in selected))
        if wanted != ensemble.candidates:
            reasons.append(
                f"built from {', '.join(ensemble.candidates)}; the configuration selects {', '.join(wanted)}"
            )
        elif not _is_as_built(config, store, ensemble, selected):
            reasons.append("its images, out-of-fold predictions, seed or settings are others now")
    return State(STALE if reasons else CURRENT, tuple(reasons))


def _by_latency(config: Config) -> list[str]:
    """Names of the ensembles that measured latencies decide."""
    return [*pruning_builder.names(config), *moe_builder.names(config)]


def _is_as_built(config: Config, store: Store, ensemble: Ensemble, selected: Sequence[Member]) -> bool:
    if ensemble.name in moe_builder.names(config):
        return moe_builder.is_current(store, selected, ensemble.name)
    if ensemble.method not in ensembles.NAMES:
        return pruning_builder.is_current(store, selected, ensemble.name)
    return fitting.inputs_digest(config, store, selected, ensemble.method) == ensemble.inputs_digest


def _snapshot_state(store: Store, selected: Sequence[Member], states: Mapping[str, State]) -> State:
    """Of the mean of all snapshots; `states` are those of the ensembles on disk by themselves."""
    known = states.get(snapshot_builder.NAME, State(MISSING))
    if known.state != CURRENT:
        return known
    try:
        reason = snapshot_builder.reason_against(store, selected)
    except UserError as error:
        return State(DAMAGED, (str(error),))
    return State(STALE, (reason,)) if reason else known


def _soup_states(store: Store, member: Member, states: Mapping[str, State]) -> dict[str, State]:
    """Of the soups that one backbone's checkpoints give; `states` are those of the ensembles on disk by themselves."""
    try:
        reasons = soup_builder.reasons_against(store, member)
    except UserError as error:
        return {store.workspace.soup(member.name).name: State(DAMAGED, (str(error),))}
    found = dict.fromkeys(soup_builder.leftovers(store, member), NOT_PRODUCED)
    for name, reason in reasons.items():
        known = states.get(name, State(MISSING))
        found[name] = State(STALE, (reason,)) if reason and known.state == CURRENT else known
    return found


def _student_states(store: Store, states: Mapping[str, State]) -> dict[str, State]:
    """Of the students that the configuration asks for; `states` are those of the ensembles by themselves."""
    try:
        reasons = student_plan.staleness_reasons(store)
    except UserError as error:
        return dict.fromkeys(student_plan.names(store.config), State(DAMAGED, (str(error),)))
    known = {name: states.get(name, State(MISSING)) for name in reasons}
    return {
        name: State(STALE, (reason,)) if reason and known[name].state == CURRENT else known[name]
        for name, reason in reasons.items()
    }


def _predictions_state(store: Store, member: Member, split: str) -> State:
    try:
        record = read_record(store.workspace.predictions(member.name, split) / "record.json", remedy="Remove it")
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
        ranking = read_record(store.workspace.ranking("test"), remedy="Evaluate again")
    except UserError as error:
        return State(DAMAGED, (str(error),))
    if ranking is None:
        return State(MISSING)
    if ranking.get("inputs_digest") == scoring.inputs_digest(store, saved, in_use, "test"):
        return State(CURRENT)
    return State(STALE, ("members or ensembles have changed since",))
