"""The commands `build-ensemble` and `fusion-train`, and the table of builders that `status` and `clean` read."""

from __future__ import annotations

from utils.building import builder_protocol
from utils.building.builder_protocol import Builder, Session
from utils.building.fusion_builder import FusionBuilder
from utils.building.meta_builder import MetaBuilder
from utils.building.moe_builder import SparseBuilder
from utils.building.pruning_builder import PruningBuilder
from utils.building.snapshot_builder import SnapshotBuilder
from utils.building.soup_builder import SoupBuilder
from utils.building.stacking_builder import StackingBuilder
from utils.building.voting_builder import VotingBuilder
from utils.core.config import Config, require_enabled
from utils.core.results import Result
from utils.core.workspace import Workspace

BUILDERS: dict[str, tuple[Builder, ...]] = {
    "build-ensemble": (
        SoupBuilder(),  # first: its networks may be members of the others
        SnapshotBuilder(),
        VotingBuilder(),
        PruningBuilder(),
    ),
    "stack": (StackingBuilder(),),
    "fusion-train": (FusionBuilder(), SparseBuilder("cascade"), SparseBuilder("moe")),
    "meta-fuse": (MetaBuilder(),),
}
"""{command: what it builds, in this order}"""


def build_ensemble(config: Config, workspace: Workspace, *, pick: str | None = None, force: bool = False) -> Result:
    """Build the score-level ensembles that the configuration lists, from out-of-sample predictions.

    `pick` takes the place of `pruning.pick`. An ensemble with equal inputs is kept, unless `force`. Raises UserError
    without catalog or members, and for a `pick` where pruning is off; what could not be built is a failure of the
    result.
    """
    if pick is not None:
        require_enabled(config, PruningBuilder.config_key)
        config = config.model_copy(update={"pruning": config.pruning.model_copy(update={"pick": pick})})
    return _run("build-ensemble", config, workspace, force)


def fusion_train(config: Config, workspace: Workspace, *, force: bool = False) -> Result:
    """Train ensembles that read more than the members' votes, and those that run only some of the members.

    An ensemble with equal inputs is kept, unless `force`. Raises UserError without catalog or members.
    """
    return _run("fusion-train", config, workspace, force)


def _run(command: str, config: Config, workspace: Workspace, force: bool) -> Result:
    builders = builder_protocol.enabled(BUILDERS[command], config)
    outcome = builder_protocol.run(builders, Session.open(config, workspace), force=force)
    names = [member.name for member in outcome.session.members]
    lines = [*outcome.lines, f"{len(names)} members: {', '.join(names)}", f"written: {workspace.models}"]
    return Result("\n".join(lines), outcome.document() | {"members": names}, list(outcome.failures), "evaluate")
