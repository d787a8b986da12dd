"""Mixes the checkpoints of one backbone to soups and writes their checkpoints, side by side for several backbones."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from utils.building import family_fits
from utils.core.artifacts import write_checkpoint
from utils.core.errors import UserError
from utils.core.links import require_no_symlink
from utils.networks.checkpoints import training_metadata
from utils.numeric.paired_comparison import compare_losses
from utils.predictions import extraction, streaming
from utils.predictions.catalog import Member, preprocessing_entry
from utils.predictions.row_groups import row_groups
from utils.predictions.store import Store

if TYPE_CHECKING:
    from utils.building.soup_trials import Mix, Survey, Trial

STAGE = re.compile(r"final|finetune_best|head_best|snapshot\d+|finetune_epoch(?P<epoch>\d+)|fold\d+")
"""Checkpoints of a backbone that are considered; of single epochs, only those in the later half of fine-tuning are."""
HEAD = "head_best"
STEPS = 10  # of the alpha sweep


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


@dataclass(frozen=True)
class Mixed:
    """The soups of one backbone, whose checkpoints are written."""

    facts: dict[str, dict[str, Any]]
    """{method: record of its soup}"""
    reasons: dict[str, str]
    """{method: why it has no soup}"""
    ingredients: list[dict[str, Any]]
    pairs: list[dict[str, Any]]


def mixed_each(store: Store, methods: Sequence[str], backbones: Sequence[Member]) -> Iterator[Mixed | UserError]:
    """Mix the checkpoints of each backbone, side by side on the CPU if every network is small enough for one thread."""
    shared = (store, tuple(methods))
    is_on_cpu = streaming.resolve_device(store.config.device) == "cpu"
    if is_on_cpu and extraction.use_one_thread(extraction.network_sizes(store, backbones)):
        return family_fits.run_each(_mixed, backbones, shared=shared, description="soups", are_long=True)
    return (family_fits.result_or_error(_mixed, shared, member) for member in backbones)


def _mixed(store: Store, methods: Sequence[str], member: Member) -> Mixed:
    """Mix the checkpoints of one backbone by each method, and write the checkpoints of the soups."""
    require_no_symlink(store.workspace.derived_checkpoints)
    from utils.building import soup_trials

    survey = soup_trials.survey_checkpoints(store, member, usable_checkpoints(member))
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


def usable_checkpoints(member: Member) -> list[dict[str, str]]:
    """Return the checkpoints that may be averaged, the member's first."""
    matched = [(entry, match) for entry in member.checkpoints if (match := STAGE.fullmatch(entry["stage"]))]
    if member.trunk is not None:  # its fold checkpoints contain only heads
        matched = [(entry, match) for entry, match in matched if not entry["stage"].startswith("fold")]
    last = max((int(match["epoch"]) for _, match in matched if match["epoch"]), default=0)
    return [entry for entry, match in matched if match["epoch"] is None or 2 * int(match["epoch"]) >= last]


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
