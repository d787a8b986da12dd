"""The section `runs.model_soup`: averages of each backbone's own checkpoints, as networks and ensembles of their own.

An average lands where its parts do only when they lie in one basin, so that is looked at first, and what lies elsewhere
is named. What became of a backbone stands in `ensembles/soups/<backbone>.json`, by which it is known the next time.
"""

from __future__ import annotations

import logging
import math
import re
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

from utils.building import ensembles, fitting
from utils.building.ensembles import Provenance
from utils.core.artifacts import digest_of, read_record, require_no_symlink, write_checkpoint, write_json
from utils.core.errors import UserError
from utils.core.results import Result
from utils.discovery import discover
from utils.networks.checkpoints import training_metadata
from utils.predictions import extraction
from utils.predictions.catalog import Member
from utils.predictions.extraction import STREAMED_SPLITS
from utils.predictions.store import Store

if TYPE_CHECKING:
    from utils.building.soup_trials import Mix, Survey, Trial

logger = logging.getLogger("disease_pipeline")

VERSION = 1  # raised whenever the same checkpoints and images would give another soup
CONFIG_KEY = "runs.model_soup"
STAGE = re.compile(r"final|finetune_best|head_best|snapshot\d+|finetune_epoch(?P<epoch>\d+)|fold\d+")
"""Checkpoints of a backbone that are looked at, of single epochs those in the later half of fine-tuning."""
HEAD = "head_best"
STEPS = 10  # of the alpha sweep
"""What the base pipeline writes into a checkpoint beside the identity that the catalog knows."""
AGAIN = "Remove it, then run build-ensemble again"


class Method(NamedTuple):
    """One way to make one network of several."""

    role: str
    """Method of the ensemble, ending of the checkpoint."""
    make: Callable[[Survey], Soup | str]
    """The soup, or why there is none."""


@dataclass(frozen=True)
class Soup:
    """One mixture that is worth a file."""

    mix: Mix
    trial: Trial
    rival: str
    """The best checkpoint that it was made from."""
    notes: dict[str, Any]
    """What else records keep of it."""
    words: str
    """How it was made, for a person."""


@dataclass(frozen=True)
class Outcome:
    """What became of one backbone."""

    built: tuple[str, ...]
    up_to_date: tuple[str, ...]
    lines: tuple[str, ...]


def model_soups(store: Store, members: Sequence[Member], force: bool) -> Result:
    """The soups of every selected backbone. A soup that does not help is told; none at all is a failure of the result.

    What goes wrong with one backbone is a failure of the result too, and the others go on.
    """
    backbones = [member for member in members if member.source == "trained"]
    outcomes, failures = [], []
    for number, member in enumerate(backbones, start=1):
        start = time.monotonic()
        try:
            outcome = _of_backbone(store, member, force)
        except UserError as error:
            failures.append(f"{CONFIG_KEY}: {member.name}: {error}")
            continue
        outcomes.append(outcome)
        if outcome.built:
            logger.info("[%d/%d] soups of %s: %.1f s", number, len(backbones), member.name, time.monotonic() - start)
    document = {
        key: [name for outcome in outcomes for name in getattr(outcome, key)] for key in ("built", "up_to_date")
    }
    if not any(document.values()) and not failures:
        failures.append(
            f"{CONFIG_KEY}: no selected backbone has two different checkpoints of one basin. The base pipeline "
            "keeps some with DBT_SNAPSHOTS=3; or set runs.model_soup.enable to false"
        )
    return Result("\n".join(line for outcome in outcomes for line in outcome.lines), document, failures)


def reasons_against(store: Store, member: Member) -> dict[str, str | None]:
    """{ensemble: why the soup on disk is not what a build would make; None: it is}, without torch.

    One that the checkpoints do not give is left out.
    """
    names = {key: _ensemble(METHODS[key].role, member) for key in _methods(store)}
    record = read_record(store.workspace.soup(member.name), remedy=AGAIN)
    if record is None:
        return dict.fromkeys(names.values(), "not built yet")
    if record["inputs_digest"] != inputs_digest(store, member):
        return dict.fromkeys(names.values(), "its checkpoints, images or settings are others now")
    reasons: dict[str, str | None] = {}
    for key, name in names.items():
        if "ensemble" in record["soups"][key]:
            is_whole = _is_whole(store, member, key, record["soups"][key])
            reasons[name] = None if is_whole else "its files are others now"
    return reasons


def leftovers(store: Store, member: Member) -> list[str]:
    """Saved soups of one backbone that its checkpoints of today do not give, by the last build."""
    record = read_record(store.workspace.soup(member.name), remedy=AGAIN) or {"soups": {}}
    none = [_ensemble(METHODS[key].role, member) for key, part in record["soups"].items() if "ensemble" not in part]
    return [name for name in none if ensembles.stored_digest(store.workspace, name) is not None]


def inputs_digest(store: Store, member: Member) -> str:
    """Everything that the soups of one backbone depend on; found without opening an image or a checkpoint."""
    config = store.config
    files = [[entry["stage"], entry["sha256"]] for entry in _entries(member)]
    splits = [store.catalog.splits[split]["digest"] for split in ("train", "val")]
    places = ("runs.score_ensemble.optimization_metric", CONFIG_KEY, "dataset.batch_size", "seed")
    return digest_of([VERSION, member.digest, files, splits, list(store.catalog.classes), config.digest(*places)])


# one backbone --------------------------------------------------------------------------------------------------------


def _of_backbone(store: Store, member: Member, force: bool) -> Outcome:
    path = store.workspace.soup(member.name)
    known = None if force else read_record(path, remedy=AGAIN)
    if known is not None and known["inputs_digest"] == inputs_digest(store, member):
        made = {key: part for key, part in known["soups"].items() if "ensemble" in part}
        if all(_is_whole(store, member, key, part) for key, part in made.items()):
            names = tuple(part["ensemble"] for part in made.values())
            return Outcome((), names, _lines(store, member, known, "up to date"))
    require_no_symlink(store.workspace.derived_checkpoints)
    from utils.building import soup_trials

    survey = soup_trials.survey_checkpoints(store, member, _entries(member))
    found = {key: METHODS[key].make(survey) for key in _methods(store)}
    made = _save(store, member, {key: soup for key, soup in found.items() if not isinstance(soup, str)}, survey)
    record = {
        "inputs_digest": inputs_digest(store, member),
        "backbone": member.name,
        "metric": store.config.runs.score_ensemble.optimization_metric,
        "ingredients": list(survey.ingredients),
        "pairs": list(survey.pairs),
        "soups": {key: made.get(key, {"reason": soup}) for key, soup in found.items()},
    }
    write_json(path, record)
    built = tuple(part["ensemble"] for part in made.values())
    return Outcome(built, (), _lines(store, member, record, "built"))


# three ways ----------------------------------------------------------------------------------------------------------


def _uniform(survey: Survey) -> Soup | str:
    """The plain mean of the basin (Wortsman et al. 2022)."""
    if len(survey.basin) < 2:
        return _nothing_to_average(survey)
    mix = _mix(dict.fromkeys(survey.basin, 1))
    return Soup(mix, survey.trials.trial(mix), survey.basin[0], {}, f"{len(mix)} checkpoints")


def _greedy(survey: Survey) -> Soup | str:
    """The best of the basin, then whatever does not make it worse on val (Wortsman et al. 2022)."""
    from utils.networks.soups import greedy_soup

    if len(survey.basin) < 2:
        return _nothing_to_average(survey)
    trials = survey.trials
    steps = greedy_soup(survey.basin, lambda names: trials.trial(_mix(dict.fromkeys(names, 1))).kept.rank)
    kept = [name for name, _, is_kept in steps if is_kept]
    path = [{"stage": name, "score": rank[0], "kept": is_kept} for name, rank, is_kept in steps]
    mix = _mix(dict.fromkeys(kept, 1))
    words = f"{len(kept)} of {len(steps)} checkpoints" if len(kept) > 1 else f"{kept[0]} alone"
    return Soup(mix, trials.trial(mix), kept[0], {"steps": path}, words)


def _wise_ft(survey: Survey) -> Soup | str:
    """The best point on the line from the trained head to the fine-tuned network (Wortsman et al. 2021, WiSE-FT)."""
    from utils.building.soup_trials import SHARED

    trials, own = survey.trials, survey.ingredients[0]["stage"]
    if HEAD not in trials.ingredients or own == HEAD:
        reason = next((entry["left_out"] for entry in survey.ingredients if entry["stage"] == HEAD), None)
        return f"it needs {HEAD} and a fine-tuned checkpoint with other weights; {reason or 'one of them is missing'}"
    pair = trials.pair(HEAD, own)
    if pair.similarity < SHARED:
        return f"{HEAD} and {own} did not begin alike (cosine {pair.similarity:.2f})"
    mixes = [_mix({HEAD: STEPS - step, own: step}) for step in range(STEPS + 1)]
    found = [trials.trial(mix) for mix in mixes]
    best = max(range(STEPS + 1), key=lambda step: (found[step].kept.rank, step))
    notes = {
        "alpha": best / STEPS,
        "sweep": [{"alpha": step / STEPS} | found[step].as_record() for step in range(STEPS + 1)],
    }
    rival = max((own, HEAD), key=lambda name: trials.single(name).rank)
    return Soup(mixes[best], found[best], rival, notes, f"alpha {best / STEPS:.1f}")


def _mix(shares: Mapping[str, int]) -> Mix:
    whole = math.gcd(*shares.values())
    return tuple((name, share // whole) for name, share in sorted(shares.items()) if share)


def _nothing_to_average(survey: Survey) -> str:
    count = len(survey.ingredients)
    return f"nothing to average: of {count} checkpoint{'s'[: count > 1]} one lies in the basin of {survey.basin[0]}"


METHODS = {
    "uniform": Method("uniform_soup", _uniform),
    "greedy": Method("greedy_soup", _greedy),
    "wise_ft": Method("wise_ft", _wise_ft),
}


# what is kept --------------------------------------------------------------------------------------------------------


def _save(store: Store, member: Member, soups: Mapping[str, Soup], survey: Survey) -> dict[str, dict[str, Any]]:
    """Checkpoint, member and ensemble of each soup; returns what the record says of them."""
    facts = {key: _facts(soup, survey) for key, soup in soups.items()}
    names = {key: f"{member.name}_{METHODS[key].role}" for key in soups}
    for key, soup in soups.items():
        write_checkpoint(
            store.workspace.derived_checkpoint(member.name, METHODS[key].role),
            survey.trials.weights(soup.mix, recompute=soup.trial.is_recomputed),
            _explanation(store, member, METHODS[key].role, facts[key], survey),
        )
    train = store.images("train")
    store.catalog = discover.register_derived(
        store.config, store.workspace, store.digests, train, store.catalog, list(names.values())
    )
    derived = {key: store.catalog.members[name] for key, name in names.items()}
    extraction.ensure(store, list(derived.values()), STREAMED_SPLITS)
    for key, own in derived.items():
        role = METHODS[key].role
        honest = fitting.out_of_sample_rows(store, [own])
        fitting.build(
            store,
            _ensemble(role, member),
            role,
            ensembles.COMBINERS[role].configured(store.config, fitting.member_facts(store, [own])),
            [own],
            honest,
            prior_provenance=[Provenance((), fitting.row_sets(honest.rows))],
            notes={"soup": facts[key] | {"ingredients": list(survey.ingredients), "pairs": list(survey.pairs)}},
        )
        facts[key] |= {"ensemble": _ensemble(role, member), "sha256": own.checkpoints[0]["sha256"]}
    return facts


def _facts(soup: Soup, survey: Survey) -> dict[str, Any]:
    kept, rival = soup.trial.kept, survey.trials.single(soup.rival)
    return {
        "shares": dict(soup.mix),
        "normalisation": soup.trial.as_record(),
        "best_ingredient": soup.rival,
        "gain": {name: kept.as_record()[name] - value for name, value in rival.as_record().items()},
        "helps": kept.rank > rival.rank,
        "words": soup.words,
        **soup.notes,
    }


def _explanation(store: Store, member: Member, role: str, facts: Mapping[str, Any], survey: Survey) -> dict[str, Any]:
    """`extra` of the checkpoint: what the base pipeline needs to open it, and what it was made of."""
    kept = training_metadata(store.workspace.base / member.checkpoints[0]["path"])
    digests = {entry["stage"]: entry["sha256"] for entry in survey.ingredients}
    return kept | {
        "backbone_name": member.architecture,
        "model_size": member.size,
        "img_size": member.img_size,
        "classes": list(member.classes),
        "accuracy": facts["normalisation"][facts["normalisation"]["kept"]]["accuracy"],
        "stage": role,
        "parents": [member.name],
        "ingredients": [
            {"stage": stage, "sha256": digests[stage], "share": share} for stage, share in facts["shares"].items()
        ],
        "normalisation": facts["normalisation"]["kept"],
        "selected_on": "val",
    }


def _entries(member: Member) -> list[dict[str, str]]:
    """The checkpoints that are looked at, the member's own first."""
    found = [(entry, match) for entry in member.checkpoints if (match := STAGE.fullmatch(entry["stage"]))]
    last = max((int(match["epoch"]) for _, match in found if match["epoch"]), default=0)
    return [entry for entry, match in found if match["epoch"] is None or 2 * int(match["epoch"]) >= last]


def _ensemble(role: str, member: Member) -> str:
    return f"{role}_{member.name}"


def _methods(store: Store) -> list[str]:
    return [key for key in store.config.runs.model_soup.methods if key in METHODS]


def _is_whole(store: Store, member: Member, key: str, part: Mapping[str, Any]) -> bool:
    """Whether checkpoint, member and ensemble of a soup are what its record says; no checkpoint is read."""
    role = METHODS[key].role
    derived = store.catalog.members.get(f"{member.name}_{role}")
    path = store.workspace.derived_checkpoint(member.name, role)
    return (
        derived is not None
        and derived.checkpoints[0]["sha256"] == part["sha256"]
        and store.digests.is_intact(path)
        and ensembles.stored_digest(store.workspace, part["ensemble"])
        == fitting.inputs_digest(store.config, store, [derived], role)
    )


def _lines(store: Store, member: Member, record: Mapping[str, Any], state: str) -> tuple[str, ...]:
    """What a person reads of one backbone: its soups, whether they help, and what was left out of them and why."""
    lines = []
    for key in _methods(store):
        part, name = record["soups"][key], _ensemble(METHODS[key].role, member)
        if "ensemble" in part:
            lines.append(f"{fitting.summary_line(store, name, state)}; {_words(part, record['metric'])}")
        else:
            lines.append(f"{name:36} none        {part['reason']}")
    reasons: dict[str, list[str]] = {}
    for entry in record["ingredients"]:
        if entry["left_out"] is not None:
            reasons.setdefault(entry["left_out"], []).append(entry["stage"])
    if reasons:
        words = "; ".join(f"{', '.join(stages)}: {reason}" for reason, stages in reasons.items())
        lines.append(f"  left out of the soups of {member.name}: {words}")
    return tuple(lines)


def _words(part: Mapping[str, Any], metric: str) -> str:
    best, gain = part["best_ingredient"], part["gain"]
    anew = ", normalisation recomputed" if part["normalisation"]["kept"] == "recomputed" else ""
    if list(part["shares"]) == [best]:
        return f"{part['words']}: nothing is gained by averaging"
    figures = f"{metric} {gain['score']:+.4f}, log-loss {gain['log_loss']:+.4f}"
    verdict = f"{figures} against {best}" if part["helps"] else f"does not beat {best} ({figures})"
    return f"{part['words']}{anew}: {verdict}"
