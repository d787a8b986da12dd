"""Comparison of a declared network's assumed preprocessing with other common rules, on val images.

The network runs with each rule; the result is a recommendation, never a change. Results are stored under digests of the
network and the images, so that later scans, which run no network, can report them too.
"""

from __future__ import annotations

import logging
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from utils.core.artifacts import digest_of
from utils.core.errors import UserError
from utils.core.workspace import Workspace
from utils.discovery import preprocessing_sources
from utils.discovery.declaration_checks import ASSUMED_PREPROCESSING
from utils.networks.preprocessing import Preprocessing
from utils.numeric import metrics
from utils.numeric.means import MIN_UNITS, count_units, standard_error
from utils.numeric.temperature import fit_temperature
from utils.predictions import image_splits, streaming
from utils.predictions.catalog import TIMM, Member, Problem, is_declared
from utils.predictions.image_splits import ImageSplit
from utils.predictions.inspection import FEWEST_ROWS, Inspector

logger = logging.getLogger("disease_pipeline")

VERSION = 2  # incremented whenever the results for the same files change
MOST_ROWS = 500
STANDARD_ERRORS = 3.0  # required difference of mean log-loss in standard errors, paired by image, for several rules
FITS_BETTER = "preprocessing_fits_better"


def candidate_rules(current: Preprocessing, architecture: str) -> list[Preprocessing]:
    """Other common rules for networks of this architecture, at the same input size; all differ from `current`."""
    size = current.input_size
    base = Preprocessing.of_base_pipeline(size)
    half = replace(base, mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5))
    timm = preprocessing_sources.of_architecture(architecture, size)
    rules = [
        base,
        preprocessing_sources.with_requests(timm, {"input_size": size}, "timm"),
        replace(base, resized=int(size / 0.875), interpolation="bicubic"),
        replace(half, resized=int(size / 0.9), interpolation="bicubic"),
        replace(current, resize="squash", resized=size),
        replace(current, channels="BGR" if current.channels == "RGB" else "RGB"),
    ]
    distinct: list[Preprocessing] = []
    for rule in rules:
        if rule not in (current, *distinct):
            distinct.append(rule)
    return distinct


def compare(inspector: Inspector, member: Member, *, force: bool = False) -> None:
    """Run a member with its preprocessing and the candidate rules on up to MOST_ROWS val images; store the results.

    A member is skipped if its preprocessing is not assumed, if it has been compared (unless `force`), or if it failed
    on val.
    """
    measured = inspector.measured(member) or {}
    if (
        not is_assumed(inspector.workspace, member)
        or "n" not in measured
        or (_facts(inspector, member) is not None and not force)
    ):
        return
    val = inspector.store.images("val")
    order = np.random.default_rng(inspector.config.seed).permutation(len(val.labels))
    images = val.take(np.sort(order[:MOST_ROWS]))
    current = member.image_preprocessing
    rules = [current, *candidate_rules(current, member.architecture.removeprefix(TIMM))]
    logger.info(
        "verify %s: compares %d rules of preprocessing on %d val images", member.name, len(rules), len(images.labels)
    )
    with tempfile.TemporaryDirectory(prefix="preprocessing-") as folder:  # keeps these rules out of the image cache
        image_splits.decode([images], rules, image_cache=Path(folder), threads=inspector.threads)
        logits = {}
        for index, rule in enumerate(rules):
            try:
                logits[index] = _logits(inspector, member, rule, images, Path(folder))
            except UserError as error:  # for example logits that are not finite
                logger.info("verify %s: %s is left out: %s", member.name, rule.describe(), error)
    if 0 not in logits:
        return
    losses = {index: _losses(values, images.labels) for index, values in logits.items()}
    groups = inspector.groups(images)
    results = [
        {
            "preprocessing": rules[index].as_record(),
            "accuracy": float((values.argmax(axis=1) == images.labels).mean()),
            "log_loss": float(losses[index].mean()),
            "standard_errors": _standard_errors(losses[0] - losses[index], groups),
        }
        for index, values in logits.items()
    ]
    inspector.digests.keep(_key(inspector, member), {"n": len(images.labels), "rules": results})


def is_assumed(workspace: Workspace, member: Member) -> bool:
    """Whether a member was declared without a preprocessing from the user or a file."""
    is_recorded = member.preprocessing is not None and is_declared(workspace, member)
    return is_recorded and preprocessing_sources.is_guess(member.image_preprocessing)


def _logits(
    inspector: Inspector, member: Member, rule: Preprocessing, images: ImageSplit, image_cache: Path
) -> np.ndarray:
    """Logits (N, C) with a rule, with columns in the workspace's class order."""
    batches = streaming.stream(
        replace(member.network(inspector.workspace), preprocessing=rule),
        [images],
        batch_size=inspector.config.dataset.batch_size,
        device=inspector.device,
        image_cache=image_cache,
        decoding_threads=inspector.threads,
    )
    order = [member.classes.index(name) for name in inspector.classes]
    return np.concatenate([batch.logits[:, order] for batch in batches])


def _losses(logits: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """Log-loss per row (N,) at the best temperature, so that the comparison does not depend on calibration."""
    scores = metrics.log_softmax(logits)
    return metrics.log_loss_per_row(metrics.softmax(scores / fit_temperature(scores, labels)), labels)


def _standard_errors(gains: np.ndarray, groups: np.ndarray | None = None) -> float:
    """Mean of paired gains (N,) in units of its standard error over rows or groups (N,).

    0 without variance, and with fewer than `MIN_UNITS` groups.
    """
    few = groups is not None and count_units(len(gains), groups) < MIN_UNITS
    error = 0.0 if few else standard_error(gains, groups)
    return float(gains.mean()) / error if error > 0 else 0.0


def with_comparisons(inspector: Inspector, problems: Sequence[Problem], members: Mapping[str, Member]) -> list[Problem]:
    """The problems, with warnings of an assumed preprocessing updated by the result of the comparison.

    A rule that fits better is an additional warning with the option that sets it; if there is none, the warning becomes
    an info.
    """
    updated = []
    for problem in problems:
        member = members.get(problem.member or "")
        facts = _facts(inspector, member) if member is not None and is_assumed(inspector.workspace, member) else None
        if problem.code != ASSUMED_PREPROCESSING or member is None or facts is None:
            updated.append(problem)
        elif (better := _better_rule(facts)) is not None:
            updated += [problem, _recommendation(member, facts, better)]
        else:
            message = (
                f"{problem.message}; none of {len(facts['rules']) - 1} other common rules fits {facts['n']} val images "
                "better"
            )
            updated.append(replace(problem, severity="info", message=message))
    return updated


def _better_rule(facts: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """The rule of lowest log-loss among those significantly better and not less accurate; None if there is none."""
    current, *others = facts["rules"]
    better = [
        rule for rule in others if rule["standard_errors"] > STANDARD_ERRORS and rule["accuracy"] >= current["accuracy"]
    ]
    if facts["n"] < FEWEST_ROWS or not better:
        return None
    best: Mapping[str, Any] = min(better, key=lambda rule: rule["log_loss"])
    return best


def _recommendation(member: Member, facts: Mapping[str, Any], better: Mapping[str, Any]) -> Problem:
    current = facts["rules"][0]
    rule = Preprocessing.from_record(better["preprocessing"], f"{member.name}: compared preprocessing")
    words = preprocessing_sources.as_requests(rule, member.image_preprocessing)
    options = " ".join(f"{member.name}:{word}" for word in words)
    message = (
        f"another preprocessing fits better on {facts['n']} val images: accuracy {better['accuracy']:.4f} instead of "
        f"{current['accuracy']:.4f}, log-loss {better['log_loss']:.4f} instead of {current['log_loss']:.4f} "
        f"(each at its best temperature) with {rule.describe()}"
    )
    remedy = f"nothing is changed; to use it: python ensemble_orchestrator.py discover --preprocess {options}"
    return Problem(FITS_BETTER, "warning", member.name, message, remedy)


def _facts(inspector: Inspector, member: Member) -> dict[str, Any] | None:
    facts: dict[str, Any] | None = inspector.digests.facts(_key(inspector, member))
    return facts


def _key(inspector: Inspector, member: Member) -> str:
    """Digest of everything that a comparison depends on."""
    val = inspector.store.images("val").digest
    return digest_of(
        [
            "preprocessings",
            VERSION,
            member.digest,
            val,
            list(inspector.classes),
            inspector.config.seed,
            inspector.config.dataset.group_regex,
        ]
    )
