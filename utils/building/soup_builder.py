"""The section `runs.model_soup`: averages of each backbone's checkpoints, as derived members and as ensembles.

Averaging requires checkpoints that are linearly connected, which is tested first; other checkpoints are left out and
named. `ensembles/soups/<backbone>.json` records the result, by which the next build recognises it.
"""

from __future__ import annotations

import logging
import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from utils.building import ensembles, family_fits, fitting
from utils.building.builder_protocol import Build, Builder, Session, summary_line
from utils.building.ensembles import Provenance
from utils.core.artifacts import digest_of, write_checkpoint, write_json
from utils.core.errors import UserError
from utils.core.links import require_no_symlink
from utils.core.parsed_files import record_once
from utils.discovery import discover
from utils.networks.checkpoints import training_metadata
from utils.numeric.paired_comparison import CANNOT_TELL, compare_losses
from utils.predictions import extraction, streaming
from utils.predictions.catalog import Member, preprocessing_entry
from utils.predictions.row_groups import row_groups
from utils.predictions.store import Store

if TYPE_CHECKING:
    from utils.building.soup_trials import Mix, Survey, Trial

logger = logging.getLogger("disease_pipeline")

VERSION = 1  # incremented when the same checkpoints and images would give a different soup
CONFIG_KEY = "runs.model_soup"
STAGE = re.compile(r"final|finetune_best|head_best|snapshot\d+|finetune_epoch(?P<epoch>\d+)|fold\d+")
"""Checkpoints of a backbone that are considered; of single epochs, only those in the later half of fine-tuning are."""
HEAD = "head_best"
STEPS = 10  # of the alpha sweep
AGAIN = "Remove it, then run build-ensemble again"


class Method(NamedTuple):
    """A method to mix several checkpoints into one network."""

    role: str
    """Method of the ensemble and suffix of the checkpoint's name."""
    make: Callable[[Survey], Soup | str]
    """Returns the soup, or why there is none."""


@dataclass(frozen=True)
class Soup:
    """One mixture of checkpoints, which becomes a derived member."""

    mix: Mix
    trial: Trial
    rival: str
    """The best of its checkpoints."""
    notes: dict[str, Any]
    """Further entries of its record."""
    words: str
    """Description of its ingredients for messages."""


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
        results = _mixed_each(session.store, _methods(session), [each for each in backbones if each.name not in damage])
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
    files = [[entry["stage"], entry["sha256"]] for entry in _entries(member)]
    splits = [store.catalog.splits[split]["digest"] for split in ("train", "val")]
    settings = ("runs.score_ensemble.optimization_metric", CONFIG_KEY, "dataset.batch_size", "seed")
    return digest_of([VERSION, member.digest, files, splits, list(store.catalog.classes), config.digest(*settings)])


# one backbone --------------------------------------------------------------------------------------------------------


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


@dataclass(frozen=True)
class Mixed:
    """The soups of one backbone, whose checkpoints are written."""

    facts: dict[str, dict[str, Any]]
    """{method: record of its soup}"""
    reasons: dict[str, str]
    """{method: why it has no soup}"""
    ingredients: list[dict[str, Any]]
    pairs: list[dict[str, Any]]


def _mixed_each(store: Store, methods: Sequence[str], backbones: Sequence[Member]) -> Iterator[Mixed | UserError]:
    """Mix the checkpoints of each backbone, side by side on the CPU if every network is small enough for one thread."""
    shared = (store, tuple(methods))
    if streaming.resolve_device(store.config.device) == "cpu" and extraction.job_threads(store, backbones, "cpu") == 1:
        return family_fits.run_each(_mixed, backbones, shared=shared, description="soups", are_long=True)
    return (family_fits.result_or_error(_mixed, shared, member) for member in backbones)


def _mixed(store: Store, methods: Sequence[str], member: Member) -> Mixed:
    """Mix the checkpoints of one backbone by each method, and write the checkpoints of the soups."""
    require_no_symlink(store.workspace.derived_checkpoints)
    from utils.building import soup_trials

    survey = soup_trials.survey_checkpoints(store, member, _entries(member))
    made = {key: METHODS[key].make(survey) for key in methods}
    soups = {key: soup for key, soup in made.items() if not isinstance(soup, str)}
    groups = row_groups(store, [("val", sample_id) for sample_id in store.images("val").sample_ids])
    facts = {key: _facts(soup, survey, groups) for key, soup in soups.items()}
    for key, soup in soups.items():
        write_checkpoint(
            store.workspace.derived_checkpoint(member.name, METHODS[key].role),
            survey.trials.weights(soup.mix, recompute=soup.trial.is_recomputed),
            _explanation(store, member, METHODS[key].role, facts[key], survey),
        )
    reasons = {key: soup for key, soup in made.items() if isinstance(soup, str)}
    return Mixed(facts, reasons, list(survey.ingredients), list(survey.pairs))


# methods -------------------------------------------------------------------------------------------------------------


def _uniform(survey: Survey) -> Soup | str:
    """Average all connected checkpoints (Wortsman et al. 2022)."""
    if len(survey.connected) < 2:
        return _nothing_to_average(survey)
    mix = _mix(dict.fromkeys(survey.connected, 1))
    return Soup(mix, survey.trials.trial(mix), survey.connected[0], {}, f"{len(mix)} checkpoints")


def _greedy(survey: Survey) -> Soup | str:
    """Start with the best checkpoint and add those that do not make the mean worse on val (Wortsman et al. 2022)."""
    from utils.networks.soups import greedy_soup

    if len(survey.connected) < 2:
        return _nothing_to_average(survey)
    trials = survey.trials
    steps = greedy_soup(survey.connected, lambda names: trials.trial(_mix(dict.fromkeys(names, 1))).kept.rank)
    kept = [name for name, _, is_kept in steps if is_kept]
    path = [{"stage": name, "score": rank[0], "kept": is_kept} for name, rank, is_kept in steps]
    mix = _mix(dict.fromkeys(kept, 1))
    words = f"{len(kept)} of {len(steps)} checkpoints" if len(kept) > 1 else f"{kept[0]} alone"
    return Soup(mix, trials.trial(mix), kept[0], {"steps": path}, words)


def _wise_ft(survey: Survey) -> Soup | str:
    """Select the best point on the line from `head_best` to the fine-tuned network (WiSE-FT, Wortsman et al. 2021)."""
    from utils.building.soup_trials import SHARED

    trials, tuned = survey.trials, survey.ingredients[0]["stage"]
    if HEAD not in trials.ingredients or tuned == HEAD:
        reason = next((entry["left_out"] for entry in survey.ingredients if entry["stage"] == HEAD), None)
        return f"it needs {HEAD} and a fine-tuned checkpoint with other weights; {reason or 'one of them is missing'}"
    pair = trials.pair(HEAD, tuned)
    if pair.similarity < SHARED:
        return f"{HEAD} and {tuned} did not begin alike (cosine {pair.similarity:.2f})"
    mixes = [_mix({HEAD: STEPS - step, tuned: step}) for step in range(STEPS + 1)]
    results = [trials.trial(mix) for mix in mixes]
    best = max(range(STEPS + 1), key=lambda step: (results[step].kept.rank, step))
    notes = {
        "alpha": best / STEPS,
        "sweep": [{"alpha": step / STEPS} | results[step].as_record() for step in range(STEPS + 1)],
    }
    rival = max((tuned, HEAD), key=lambda name: trials.single(name).rank)
    return Soup(mixes[best], results[best], rival, notes, f"alpha {best / STEPS:.1f}")


def _mix(shares: Mapping[str, int]) -> Mix:
    divisor = math.gcd(*shares.values())
    return tuple((name, share // divisor) for name, share in sorted(shares.items()) if share)


def _nothing_to_average(survey: Survey) -> str:
    count = len(survey.ingredients)
    return f"nothing to average: of {count} checkpoint{'s'[: count > 1]} one lies in the basin of {survey.connected[0]}"


METHODS = {
    "uniform": Method("uniform_soup", _uniform),
    "greedy": Method("greedy_soup", _greedy),
    "wise_ft": Method("wise_ft", _wise_ft),
}


# saving --------------------------------------------------------------------------------------------------------------


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
        fitting.build(
            session.store,
            ensemble_name(key, member),
            role,
            ensembles.COMBINERS[role].configured(session.config, fitting.member_facts(session.store, [network])),
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


def _facts(soup: Soup, survey: Survey, groups: np.ndarray | None) -> dict[str, Any]:
    """Return the record of a soup, compared with its best ingredient on the val rows with these groups (N,).

    Since val rows selected the soup, the number of ingredients counts as the number of comparisons.
    """
    scores, rival = soup.trial.kept, survey.trials.single(soup.rival)
    compared = compare_losses(
        (scores.hits, rival.hits), (scores.losses, rival.losses), groups, comparisons=len(survey.ingredients)
    )
    return {
        "shares": dict(soup.mix),
        "normalisation": soup.trial.as_record(),
        "threads": survey.trials.bn_threads if soup.trial.is_recomputed else None,
        "best_ingredient": soup.rival,
        "gain": {name: scores.as_record()[name] - value for name, value in rival.as_record().items()},
        "compared": compared.as_record(),
        "helps": bool(compared.better) and not compared.worse,
        "harms": bool(compared.worse) and not compared.better,
        "words": soup.words,
        **soup.notes,
    }


def _explanation(store: Store, member: Member, role: str, facts: Mapping[str, Any], survey: Survey) -> dict[str, Any]:
    """Return `extra` of the checkpoint: what the base pipeline needs to open it, and its ingredients."""
    metadata = training_metadata(store.workspace.base / member.checkpoints[0]["path"])
    digests = {entry["stage"]: entry["sha256"] for entry in survey.ingredients}
    return metadata | {
        "backbone_name": member.architecture,
        "model_size": member.size,
        "img_size": member.img_size,
        **preprocessing_entry(member.architecture, member.image_preprocessing),
        "classes": list(member.classes),
        "accuracy": facts["normalisation"][facts["normalisation"]["kept"]]["accuracy"],
        "stage": role,
        "parents": [member.name],
        "ingredients": [
            {"stage": stage, "sha256": digests[stage], "share": share} for stage, share in facts["shares"].items()
        ],
        "normalisation": facts["normalisation"]["kept"],
        "threads": facts["threads"],
        "selected_on": "val",
    }


def _entries(member: Member) -> list[dict[str, str]]:
    """Return the checkpoints that may be averaged, the member's first."""
    matched = [(entry, match) for entry in member.checkpoints if (match := STAGE.fullmatch(entry["stage"]))]
    if member.trunk is not None:  # its fold checkpoints contain only heads
        matched = [(entry, match) for entry, match in matched if not entry["stage"].startswith("fold")]
    last = max((int(match["epoch"]) for _, match in matched if match["epoch"]), default=0)
    return [entry for entry, match in matched if match["epoch"] is None or 2 * int(match["epoch"]) >= last]


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
