"""The commands `build-ensemble` and `fusion-train`, and the table of builders, which `status` and `clean` read too."""

from __future__ import annotations

from contextlib import suppress

from utils.building import builder_protocol, ensembles
from utils.building.builder_protocol import Builder, Session, members_line
from utils.building.fusion_builder import FusionBuilder
from utils.building.meta_builder import MetaBuilder
from utils.building.moe_builder import SparseBuilder
from utils.building.pruning_builder import PruningBuilder
from utils.building.snapshot_builder import SnapshotBuilder
from utils.building.soup_builder import SoupBuilder
from utils.building.stacking_builder import StackingBuilder
from utils.building.view_builder import ViewBuilder
from utils.building.voting_builder import VotingBuilder
from utils.core.config import Config, require_enabled
from utils.core.errors import UserError
from utils.core.results import Result
from utils.core.workspace import Workspace
from utils.predictions import training_data

BUILDERS: dict[str, tuple[Builder, ...]] = {
    "build-ensemble": (
        SoupBuilder(),  # first: its networks may be members of the others
        SnapshotBuilder(),
        ViewBuilder(),  # before the builders that use its members
        VotingBuilder(),
        PruningBuilder(),
    ),
    "stack": (StackingBuilder(),),
    "fusion-train": (FusionBuilder(), SparseBuilder("cascade"), SparseBuilder("moe")),
    "meta-fuse": (MetaBuilder(),),
}
"""{command: its builders, in the order in which they run}"""


def build_ensemble(config: Config, workspace: Workspace, *, pick: str | None = None, force: bool = False) -> Result:
    """Build the score-level ensembles that the configuration lists, from out-of-sample predictions.

    `pick` overrides `pruning.pick`. An ensemble with unchanged inputs is kept, unless `force`. Raises UserError without
    catalog or members, and for a `pick` if pruning is off; ensembles that could not be built are failures of the
    result.
    """
    if pick is not None:
        require_enabled(config, PruningBuilder.config_key)
        config = config.model_copy(update={"pruning": config.pruning.model_copy(update={"pick": pick})})
    return _run("build-ensemble", config, workspace, force)


def fusion_train(config: Config, workspace: Workspace, *, force: bool = False) -> Result:
    """Train the ensembles that read the members' embeddings, and those that run only some of the members.

    An ensemble with unchanged inputs is kept, unless `force`. Raises UserError without catalog or members.
    """
    return _run("fusion-train", config, workspace, force)


def _run(command: str, config: Config, workspace: Workspace, force: bool) -> Result:
    builders = builder_protocol.enabled(BUILDERS[command], config)
    session = Session.open(config, workspace)
    added = _added_members(session) if command == "build-ensemble" else []
    outcome = builder_protocol.run(builders, session, force=force)
    names = [member.name for member in outcome.session.members]
    lines = [*outcome.lines, members_line(names), *added, f"written: {workspace.models}"]
    return Result("\n".join(lines), outcome.document() | {"members": names}, list(outcome.failures), "evaluate")


def _added_members(session: Session) -> list[str]:
    """Return lines on members that are candidates of no saved ensemble: that they are used now, or how to use them.

    There are none before the first build.
    """
    seen: set[str] = set()
    for name in ensembles.names(session.workspace):
        with suppress(UserError):  # the build reports or replaces a damaged record
            record = ensembles.record_of(session.workspace, name) or {}
            seen |= {*record.get("candidates", ()), *record.get("members", ())}
    if not seen:
        return []
    catalog = session.catalog
    members = [name for name, member in sorted(catalog.members.items()) if member.usable and member.source != "derived"]
    added = [name for name in members if name not in seen]
    selected = {member.name for member in session.members}
    used, unused = [n for n in added if n in selected], [n for n in added if n not in selected]
    lines = [f"new since the last build: {', '.join(used)}; used now"] if used else []
    unknown = training_data.unknown_names(catalog, unused)
    if unused and set(unknown) != set(unused):
        names = [name for name in unused if name not in unknown]
        lines.append(
            f"new since the last build: {', '.join(names)}; not in backbones.include. To use every member: python "
            "ensemble_orchestrator.py config --set backbones.include=all, then build again"
        )
    if unknown:
        lines.append(
            f"new since the last build: {', '.join(unknown)}; not used, since the training data is not stated. "
            f"{training_data.remedy(catalog, unknown)}"
        )
    return lines
