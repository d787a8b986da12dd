"""The protocol of builders, the staleness rule, and the driver of all commands that build ensembles.

A builder makes one family of ensembles, which one section of the configuration requests. It names the ensembles, gives
the digest of the inputs that each depends on, and builds them. The driver determines what is up to date, builds the
rest and collects the report of the command. `status`, `clean --stale` and `pipeline` use the same staleness rule.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

from utils.building import ensembles, fitting
from utils.building.fitting import OutOfSampleRows
from utils.core import config_file
from utils.core.config import Config, require_enabled
from utils.core.display_text import first_names
from utils.core.errors import UserError
from utils.core.workspace import Workspace
from utils.discovery import discover
from utils.predictions import extraction, fold_networks, member_selection, training_data, view_members
from utils.predictions.catalog import IMPORTED, Catalog, Member
from utils.predictions.extraction import STREAMED_SPLITS
from utils.predictions.store import Store

logger = logging.getLogger("disease_pipeline")

CURRENT, STALE, MISSING, DAMAGED = "current", "stale", "missing", "damaged"
BUILT, UP_TO_DATE, LEFT_OUT = "built", "up to date", "left out"
SHOWN_MEMBERS = 20  # listed by the terminal messages of a command
SETTINGS_CHANGED = (
    "its images, out-of-fold predictions, seed or settings, or what its members were trained on, have changed since "
    "the build"
)


@dataclass(frozen=True)
class State:
    """State of one file or ensemble (current, stale, missing or damaged) and the reasons for it."""

    state: str
    reasons: tuple[str, ...] = ()

    def __str__(self) -> str:
        return self.state + (f": {'; '.join(self.reasons)}" if self.reasons else "")


@dataclass(frozen=True)
class Session:
    """Prediction store and selected members of one command; a builder that adds members returns a new session."""

    store: Store
    members: tuple[Member, ...]
    """The members that the configuration selects, sorted by name."""
    _gathered: dict[tuple[Any, ...], OutOfSampleRows] = field(default_factory=dict, repr=False, compare=False)
    _ensured: set[tuple[str, str]] = field(default_factory=set, repr=False, compare=False)

    @classmethod
    def open(cls, config: Config, workspace: Workspace) -> Session:
        """Read the catalog and check the selected members' out-of-fold predictions if they are not checked yet.

        Raises UserError without a catalog or a selected member, and LeakageError if the training data of no selected
        member is stated.
        """
        content = discover.verified_catalog(config, workspace)
        members = tuple(member_selection.select(content, config))
        names = [member.name for member in members]
        training_data.require_some_known(content, names)
        if unknown := training_data.unknown_names(content, names):
            logger.warning(
                "the training data of %s is not stated: ensembles that are chosen from it are scored but neither "
                "ranked nor recommended. %s; or leave it out: --set backbones.exclude=[%s]",
                ", ".join(unknown),
                training_data.remedy(content, unknown),
                ",".join(unknown),
            )
        return cls(Store(config, workspace, content), members)

    @property
    def config(self) -> Config:
        """The configuration of the command."""
        return self.store.config

    @property
    def workspace(self) -> Workspace:
        """The workspace that the command reads and writes."""
        return self.store.workspace

    @property
    def catalog(self) -> Catalog:
        """The catalog, with the members that earlier builders of this command have added."""
        return self.store.catalog

    @property
    def plain_members(self) -> tuple[Member, ...]:
        """The selected members without test-time augmentation: each with views is replaced by its original."""
        return view_members.without_views(self.catalog, self.members)

    def with_catalog(self, content: Catalog) -> Session:
        """Return a session whose catalog is `content`, with the same selected members."""
        return replace(self, store=self.store.with_catalog(content))

    def as_recorded(self, record: Mapping[str, Any]) -> Session:
        """Return a session with the `--set` overrides that an ensemble was built with.

        They apply only if the configuration is the one that the workspace remembers. Raises UserError for a setting
        that the schema no longer accepts, and if the overrides select no member.
        """
        overrides = record.get("overrides") or ()
        if not overrides or not self.config.is_remembered:
            return self
        config = config_file.with_overrides(self.config, overrides)
        if config == self.config:
            return self
        members = self.members
        if config.backbones != self.config.backbones:
            members = tuple(member_selection.select(self.catalog, config))
        return Session(self.store.with_config(config), members)

    def ensure(self, members: Sequence[Member], splits: Sequence[str] = STREAMED_SPLITS) -> None:
        """Stream the missing predictions of the members; each member and split is checked once per session."""
        missing = [m for m in members if not self._ensured.issuperset((m.digest, split) for split in splits)]
        if missing:
            extraction.ensure(self.store, missing, splits)
            self._ensured.update((member.digest, split) for member in missing for split in splits)

    def rows(
        self, members: Sequence[Member], *, kind: str = "honest", inference: str = fold_networks.FULL
    ) -> OutOfSampleRows:
        """Return `fitting.out_of_sample_rows`; the arrays are opened once for all builders of a command."""
        key = (inference, *(member.digest for member in members))
        if key not in self._gathered:
            if not self.catalog.has_images:
                self.store.samples("train")  # lists the samples by the arrays that are read next
            self._gathered[key] = fitting.out_of_sample_rows(self.store, members, inference=inference)
        return fitting.rows_of_kind(self.store, members, self._gathered[key], kind)


@dataclass(frozen=True)
class Build:
    """Result of one call of `Builder.build`."""

    session: Session
    built: tuple[str, ...] = ()
    failed: tuple[str, ...] = ()
    """Ensembles that could not be built; the other ensembles of the same call are not affected."""
    failures: tuple[str, ...] = ()
    """Messages that name what failed: an ensemble, or a part of it that was left out."""


class Builder(Protocol):
    """One family of ensembles. Every builder defines `names`, `inputs_digest` and `build`.

    A subclass inherits the other methods, which suit a family that is built from the selected members.
    """

    config_key: str
    """The section of the configuration that requests the ensembles, such as `runs.stacking`."""

    def names(self, session: Session) -> list[str]:
        """Return the requested ensembles, in the order of the configuration; none if the section is off."""
        ...

    def inputs_digest(self, session: Session, name: str) -> str:
        """Return the digest of everything that an ensemble depends on; needs neither torch nor an image."""
        ...

    def build(self, session: Session, names: Sequence[str], *, force: bool) -> Build:
        """Build and save the named ensembles. A UserError that is raised ends the command."""
        ...

    def members(self, session: Session) -> Sequence[Member]:
        """Return the candidate members of the ensembles, sorted by name."""
        return session.members

    def covers(self, session: Session, name: str) -> bool:
        """Return whether the builder can decide whether a saved ensemble is stale."""
        return name in self.names(session)

    def stale_reason(self, session: Session, name: str, record: Mapping[str, Any]) -> str | None:
        """Return why a build would differ from the saved ensemble with this `ensemble.json`; None if it would not.

        Raises UserError only for a damaged record.
        """
        selected = [member.name for member in self.members(session)]
        if selected != list(record["candidates"]):
            return f"built from {', '.join(record['candidates'])}; the configuration selects {', '.join(selected)}"
        return None if record["inputs_digest"] == self.inputs_digest(session, name) else SETTINGS_CHANGED

    def left_out(self, session: Session) -> Mapping[str, str]:
        """Return {requested ensemble: why the last build with the same inputs could not make it}."""
        return {}

    def check(self, session: Session) -> None:
        """Warn about the section's settings and members. Raises UserError if none of its ensembles can be built."""
        return None

    def problems(self, session: Session) -> list[str]:
        """Return failures that are known without building, such as a method that this version does not have."""
        return [f"{name}: {reason}" for name, reason in self.left_out(session).items()]

    def describe(self, session: Session, states: Mapping[str, str]) -> list[str]:
        """Return the terminal lines on the requested ensembles {name: built, up to date or left out}."""
        return [line for name, state in states.items() for line in self.describe_one(session, name, state)]

    def describe_one(self, session: Session, name: str, state: str) -> list[str]:
        """Return the lines on one ensemble: its scores, or that it was left out."""
        if state.startswith(LEFT_OUT):
            return [f"{name:36} {state}"]
        return [summary_line(session.workspace, name, state)]


@dataclass(frozen=True)
class Outcome:
    """Result of the driver for all builders of a command."""

    session: Session
    states: dict[str, str] = field(default_factory=dict)
    """{ensemble: built, up to date or left out}"""
    lines: tuple[str, ...] = ()
    failures: tuple[str, ...] = ()

    def document(self) -> dict[str, Any]:
        """Return the entries common to the JSON documents of all building commands."""
        return {
            "built": sorted(name for name, state in self.states.items() if state == BUILT),
            "up_to_date": sorted(name for name, state in self.states.items() if state == UP_TO_DATE),
            "folder": str(self.session.workspace.models),
        }


def enabled(builders: Iterable[Builder], config: Config) -> list[Builder]:
    """Return the builders whose section is on. Raises UserError that names the sections if none is."""
    builders = list(builders)
    require_enabled(config, *(builder.config_key for builder in builders))
    return [builder for builder in builders if config.at(f"{builder.config_key}.enable")]


def run(builders: Iterable[Builder], session: Session, *, force: bool = False) -> Outcome:
    """Run the builders one after another: keep ensembles that are up to date unless `force`, build the others."""
    lines: list[str] = []
    failures: list[str] = []
    states: dict[str, str] = {}
    for builder in builders:
        builder.check(session)
        requested = builder.names(session)
        skipped = {} if force else builder.left_out(session)
        saved = {name: state_of(session, name, builder) for name in requested if name not in skipped}
        damaged = {name: f"{name}: {state.reasons[0]}" for name, state in saved.items() if state.state == DAMAGED}
        if force:
            damaged = {}
        stale = [name for name, state in saved.items() if name not in damaged and (force or state.state != CURRENT)]
        build = builder.build(session, stale, force=force) if stale else Build(session)
        session = build.session
        failed = {*damaged, *build.failed}
        left_out = builder.left_out(session)
        described: dict[str, str] = {}
        for name in (name for name in requested if name not in failed):
            if name in left_out:
                described[name] = f"{LEFT_OUT}, {UP_TO_DATE}" if name in skipped else LEFT_OUT
            else:
                described[name] = BUILT if name in build.built else UP_TO_DATE
        lines += builder.describe(session, described)
        failures += dict.fromkeys([*builder.problems(session), *damaged.values(), *build.failures])
        states |= described
    session.store.digests.save()
    return Outcome(session, states, tuple(lines), tuple(failures))


def state_of(session: Session, name: str, builder: Builder | None) -> State:
    """Return the state of a saved ensemble by the staleness rule: would a build make the same one?

    Without a builder, only its members are compared.
    """
    try:
        record = ensembles.record_of(session.workspace, name)
        if record is None:
            return State(MISSING)
        reasons = changed_members(session.catalog, record)
        if not reasons and builder is not None:
            reason = builder.stale_reason(session.as_recorded(record), name, record)
            reasons = [reason] if reason is not None else []
    except UserError as error:
        return State(DAMAGED, (str(error),))
    return State(STALE if reasons else CURRENT, tuple(reasons))


def changed_members(content: Catalog, record: Mapping[str, Any]) -> list[str]:
    """Return how an ensemble's members have changed since it was built, one line each; empty if they have not."""
    members, inference = content.members, record["inference"]
    gone = [name for name in record["members"] if name not in members]
    changed = [
        name
        for name, digest in record["member_digests"].items()
        if name in members and fold_networks.digest(members[name], inference) != digest
    ]
    return [f"{name} is no longer in the catalog" for name in gone] + [
        f"{name} has {'other predictions' if members[name].source == IMPORTED else 'another checkpoint'} now"
        for name in changed
    ]


def members_line(names: Sequence[str]) -> str:
    """Return the line that lists the members of a command."""
    return f"{len(names)} members: {first_names(names, SHOWN_MEMBERS)}"


def summary_line(workspace: Workspace, name: str, state: str) -> str:
    """Return the line of one saved ensemble: its state and its cross-fitted scores."""
    record = ensembles.record_of(workspace, name) or {}
    scores, unknown = record["crossfit"], record.get("unknown_training_data")
    rows = f"rows that {', '.join(unknown)} may have been trained on" if unknown else "out-of-sample rows"
    return (
        f"{name:36} {state:11} accuracy {scores['accuracy']:.4f}  log-loss {scores['log_loss']:.4f}  "
        f"on {scores['n']} {rows}"
    )
