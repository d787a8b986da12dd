"""The section `runs.model_soup`: averages of each backbone's checkpoints, as derived members and as ensembles.

Averaging requires checkpoints that are linearly connected, which is tested first; other checkpoints are left out and
named. `ensembles/soups/<backbone>.json` records the result, by which the next build recognises it.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import Any

from utils.building import ensembles, fitting
from utils.building.builder_protocol import Build, Builder, Session, summary_line
from utils.building.ensembles import Provenance
from utils.building.soup_mixing import METHODS, Mixed, mixed_each, usable_checkpoints
from utils.core.artifacts import digest_of, write_json
from utils.core.errors import UserError
from utils.core.parsed_files import record_once
from utils.discovery import discover
from utils.numeric.paired_comparison import CANNOT_TELL
from utils.predictions.catalog import Member
from utils.predictions.store import Store

logger = logging.getLogger("disease_pipeline")

VERSION = 1  # incremented when the same checkpoints and images would give a different soup
CONFIG_KEY = "runs.model_soup"
AGAIN = "Remove it, then run build-ensemble again"


class SoupBuilder(Builder):
    """The soups of every selected backbone; an error of one backbone is a failure and does not stop the others."""

    config_key = CONFIG_KEY

    def names(self, session: Session) -> list[str]:
        """Return one name per backbone and method."""
        if not session.config.runs.model_soup.enable:
            return []
        return [
            ensemble_name(key, member) for member in backbones_of(session.plain_members) for key in _methods(session)
        ]

    def left_out(self, session: Session) -> Mapping[str, str]:
        """Return {soup: why it could not be made} of the last build with the same inputs."""
        reasons: dict[str, str] = {}
        for member in backbones_of(session.plain_members):
            try:
                record = _record(session, member)
            except UserError:  # a damaged record is reported by `stale_reason`
                continue
            if record is not None and record["inputs_digest"] == inputs_digest(session.store, member):
                parts = {key: record["soups"][key] for key in _methods(session)}
                reasons |= {
                    ensemble_name(key, member): part["reason"] for key, part in parts.items() if "reason" in part
                }
        return reasons

    def problems(self, session: Session) -> list[str]:
        """Return a problem if no backbone has any soup."""
        left_out = self.left_out(session)
        if not all(name in left_out for name in self.names(session)):
            return []
        return [
            f"{CONFIG_KEY}: no selected backbone has two different checkpoints that are linearly connected. The base "
            "pipeline keeps some with DBT_SNAPSHOTS=3; or set runs.model_soup.enable to false"
        ]

    def inputs_digest(self, session: Session, name: str) -> str:
        """Return the digest of the soup's network, a derived member."""
        key, member = self._part(session, name)
        derived = session.catalog.members[member_name(key, member)]
        return fitting.inputs_digest(session.config, session.store, [derived], METHODS[key].role)

    def stale_reason(self, session: Session, name: str, record: Mapping[str, Any]) -> str | None:
        """Return that the soup is not built, or that its inputs or files differ from the record; None if current."""
        key, member = self._part(session, name)
        soups = _record(session, member)
        if soups is None:
            return "not built yet"
        if soups["inputs_digest"] != inputs_digest(session.store, member):
            return "its checkpoints, images or settings have changed since the build"
        derived = session.catalog.members.get(member_name(key, member))
        is_intact = (
            derived is not None
            and derived.checkpoints[0]["sha256"] == soups["soups"][key]["sha256"]
            and session.store.digests.is_intact(session.workspace.derived_checkpoint(member.name, METHODS[key].role))
            and record["inputs_digest"] == self.inputs_digest(session, name)
        )
        return None if is_intact else "its files have changed since the build"

    def build(self, session: Session, names: Sequence[str], *, force: bool) -> Build:
        """Build all soups of the backbones of the named ensembles, since the soups of a backbone share most work."""
        backbones = [
            member
            for member in backbones_of(session.plain_members)
            if any(ensemble_name(key, member) in names for key in _methods(session))
        ]
        built: list[str] = []
        failed: list[str] = []
        failures = []
        damage = {} if force else _damage(session, backbones)  # so that the user decides
        results = mixed_each(session.store, _methods(session), [each for each in backbones if each.name not in damage])
        for number, member in enumerate(backbones, start=1):
            try:
                mixed = damage.get(member.name) or next(results)
                if isinstance(mixed, UserError):
                    raise mixed
                session, soups = _save(session, member, mixed)
            except UserError as error:
                failures.append(f"{CONFIG_KEY}: {member.name}: {error}")
                failed += [ensemble_name(key, member) for key in _methods(session)]
                continue
            built += soups
            if soups:
                logger.info("[%d/%d] soups of %s", number, len(backbones), member.name)
        return Build(session, tuple(built), tuple(failed), tuple(failures))

    def describe(self, session: Session, states: Mapping[str, str]) -> list[str]:
        """Return lines on the soups of every backbone, whether they help, and which checkpoints were left out."""
        lines = []
        for member in backbones_of(session.plain_members):
            requested = {key: ensemble_name(key, member) for key in _methods(session)}
            described = {key: name for key, name in requested.items() if name in states}
            if described:
                lines += _lines(session, member, {key: states[name] for key, name in described.items()})
        return lines

    def _part(self, session: Session, name: str) -> tuple[str, Member]:
        """Return the method and the backbone of an ensemble, from its name."""
        parts = ((key, member) for member in backbones_of(session.plain_members) for key in _methods(session))
        return next((key, member) for key, member in parts if ensemble_name(key, member) == name)


def backbones_of(members: Sequence[Member]) -> list[Member]:
    """Return the members that were trained in the base pipeline."""
    return [member for member in members if member.source == "trained"]


def inputs_digest(store: Store, member: Member) -> str:
    """Return the digest of everything that the soups of one backbone depend on; needs no image and no checkpoint."""
    config = store.config
    files = [[entry["stage"], entry["sha256"]] for entry in usable_checkpoints(member)]
    splits = [store.catalog.splits[split]["digest"] for split in ("train", "val")]
    settings = ("runs.score_ensemble.optimization_metric", CONFIG_KEY, "dataset.batch_size", "seed")
    return digest_of([VERSION, member.digest, files, splits, list(store.catalog.classes), config.digest(*settings)])


def _record(session: Session, member: Member) -> dict[str, Any] | None:
    """Return the record of the last build of a backbone's soups; None if there is none."""
    return record_once(session.workspace.soup(member.name), remedy=AGAIN)


def _damage(session: Session, members: Sequence[Member]) -> dict[str, UserError]:
    """Return {backbone: the error of reading its record} for damaged records."""
    errors = {}
    for member in members:
        try:
            _record(session, member)
        except UserError as error:
            errors[member.name] = error
    return errors


def _save(session: Session, member: Member, mixed: Mixed) -> tuple[Session, list[str]]:
    """Save member and ensemble of each soup; return the session with them, and the names of the ensembles."""
    store = session.store
    train = store.images("train")
    names = [member_name(key, member) for key in mixed.facts]
    content = discover.register_derived(store.config, store.workspace, store.digests, train, store.catalog, names)
    session = session.with_catalog(content)
    derived = {key: content.members[member_name(key, member)] for key in mixed.facts}
    session.ensure(list(derived.values()))
    for key, network in derived.items():
        role = METHODS[key].role
        rows = session.rows([network])
        fitting.save(
            session.store,
            ensemble_name(key, member),
            role,
            fitting.fit(
                ensembles.COMBINERS[role].configured(session.config, fitting.member_facts(session.store, [network])),
                rows,
            ),
            [network],
            rows,
            prior_provenance=[Provenance((), fitting.row_sets(rows.rows))],
            notes={"soup": mixed.facts[key] | {"ingredients": mixed.ingredients, "pairs": mixed.pairs}},
        )
    saved = {
        key: facts | {"ensemble": ensemble_name(key, member), "sha256": derived[key].checkpoints[0]["sha256"]}
        for key, facts in mixed.facts.items()
    }
    record = {
        "inputs_digest": inputs_digest(store, member),
        "backbone": member.name,
        "metric": store.config.runs.score_ensemble.optimization_metric,
        "ingredients": mixed.ingredients,
        "pairs": mixed.pairs,
        "soups": {**saved, **{key: {"reason": reason} for key, reason in mixed.reasons.items()}},
    }
    write_json(session.workspace.soup(member.name), record)
    return session, [part["ensemble"] for part in saved.values()]


def ensemble_name(key: str, member: Member) -> str:
    """Return the name of the ensemble of a method (`uniform`, `greedy`, `wise_ft`) and a backbone."""
    return f"{METHODS[key].role}_{member.name}"


def member_name(key: str, member: Member) -> str:
    """Return the name of the derived member that is the soup's network."""
    return f"{member.name}_{METHODS[key].role}"


def _methods(session: Session) -> list[str]:
    return [key for key in session.config.runs.model_soup.methods if key in METHODS]


def _lines(session: Session, member: Member, states: Mapping[str, str]) -> list[str]:
    """Return lines on one backbone: its soups, by `states` {method: state}, and the checkpoints that were left out."""
    record = _record(session, member) or {}
    lines = []
    for key, state in states.items():
        part, name = record["soups"][key], ensemble_name(key, member)
        if "ensemble" in part:
            lines.append(f"{summary_line(session.workspace, name, state)}; {_words(part, record['metric'])}")
        else:
            lines.append(f"{name:36} none        {part['reason']}")
    reasons: dict[str, list[str]] = {}
    for entry in record["ingredients"]:
        if entry["left_out"] is not None:
            reasons.setdefault(entry["left_out"], []).append(entry["stage"])
    if reasons:
        words = "; ".join(f"{', '.join(stages)}: {reason}" for reason, stages in reasons.items())
        lines.append(f"  left out of the soups of {member.name}: {words}")
    return lines


def _words(part: Mapping[str, Any], metric: str) -> str:
    best, gain = part["best_ingredient"], part["gain"]
    suffix = ", normalisation recomputed" if part["normalisation"]["kept"] == "recomputed" else ""
    if list(part["shares"]) == [best]:
        return f"{part['words']}: nothing is gained by averaging"
    figures = f"{metric} {gain['score']:+.4f}, log-loss {gain['log_loss']:+.4f}"
    harms = part.get("harms", False)  # not in records of earlier versions
    words = "is better than" if part["helps"] else "is worse than" if harms else f"{CANNOT_TELL} from"
    return f"{part['words']}{suffix}: {words} {best} on the val rows that chose it ({figures})"
