"""The section `pruning` of `build-ensemble`: members are measured once, then each method keeps the ones worth it.

That a budget leaves a method nothing stands in `ensembles/pruning.json`, so that it is not tried again in vain.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from utils.building import fitting, latency
from utils.combiners.protocol import MemberFacts
from utils.combiners.pruning import COMBINERS
from utils.combiners.subset_search import BudgetError
from utils.core.artifacts import read_record, write_json
from utils.core.config import Config
from utils.core.results import Result
from utils.predictions import extraction
from utils.predictions.catalog import Member
from utils.predictions.extraction import STREAMED_SPLITS
from utils.predictions.store import Store

logger = logging.getLogger("disease_pipeline")

CONFIG_KEY = "pruning"
ONE_IMAGE = 1
AGAIN = "Remove it, then run build-ensemble again"


def pruned(store: Store, members: Sequence[Member], force: bool) -> Result:
    """Build `pruned_<method>` for each method of the section; what is there with equal inputs is kept, unless `force`.

    A method whose budget no member is within is a failure of the result, with the cheapest possible; the others go on.
    It is a failure the next time too, from the record of this one.
    """
    config = store.config
    wanted = names(config)
    known = {} if force else left_out(store, members)
    fresh = [name for name in wanted if name not in known and (force or not is_current(store, members, name))]
    reasons = dict(known)
    if fresh:
        extraction.ensure(store, members, STREAMED_SPLITS)
        records = latency.measure(store, members, batches=[ONE_IMAGE])
        facts = fitting.member_facts(store, members, latency.milliseconds(records))
        _say_what_is_odd(config, facts)
        honest = fitting.out_of_sample_rows(store, members, kind=config.runs.score_ensemble.fit_rows)
        extra_inputs = latency.latency_inputs(facts, records)
        for name in fresh:
            recipe = COMBINERS[name].configured(config, facts)
            try:
                fitting.build(store, name, name, recipe, members, honest, extra_inputs=extra_inputs)
            except BudgetError as error:
                reasons[name] = str(error)
        _note(store, members, fresh, reasons, extra_inputs)
    built = [name for name in fresh if name not in reasons]
    kept = [name for name in wanted if name not in fresh and name not in reasons]
    states = dict.fromkeys(wanted, "up to date") | dict.fromkeys(built, "built")
    states |= {name: f"left out{', up to date' if name in known else ''}" for name in reasons}
    lines = [f"{name:36} {states[name]}" if name in reasons else _lines(store, name, states[name]) for name in wanted]
    failures = [f"{name}: {reasons[name]}" for name in wanted if name in reasons]
    return Result("\n".join(lines), {"built": built, "up_to_date": kept}, failures)


def names(config: Config) -> list[str]:
    """Ensembles that the section asks for."""
    return [f"pruned_{method}" for method in config.pruning.methods] if config.pruning.enable else []


def is_current(store: Store, members: Sequence[Member], name: str) -> bool:
    """Whether a saved pruned ensemble is what a build would make of these members; found without torch.

    Latencies are those of the device and the number of threads that it was built with.
    """
    path = store.workspace.ensemble(name) / "ensemble.json"
    record = read_record(path, remedy="Build it again: python ensemble_orchestrator.py build-ensemble --force") or {}
    return _is_of_today(store, members, name, record)


def left_out(store: Store, members: Sequence[Member]) -> dict[str, str]:
    """{ensemble: why a build would make none of these members, by the last that tried}; found without torch."""
    record = read_record(store.workspace.left_out, remedy=AGAIN) or {}
    return {
        name: record[name]["reason"]
        for name in names(store.config)
        if name in record and _is_of_today(store, members, name, record[name])
    }


def _is_of_today(store: Store, members: Sequence[Member], name: str, record: Mapping[str, Any]) -> bool:
    on = record.get("depends_on")
    if on is None:
        return False
    records = latency.stored(store.workspace, members, on["device"], on["threads"])
    measured = latency.latency_inputs(fitting.member_facts(store, members, latency.milliseconds(records)), records)
    return bool(
        record["inputs_digest"] == fitting.inputs_digest(store.config, store, members, name, extra_inputs=measured)
    )


def _note(
    store: Store,
    members: Sequence[Member],
    fresh: Sequence[str],
    reasons: Mapping[str, str],
    extra_inputs: Mapping[str, Any],
) -> None:
    """Keep which of the ensembles just tried have no members, and forget it of the others."""
    path = store.workspace.left_out
    before = read_record(path, remedy=AGAIN) or {}
    record = {name: entry for name, entry in before.items() if name not in fresh}
    for name in (name for name in fresh if name in reasons):
        digest = fitting.inputs_digest(store.config, store, members, name, extra_inputs=extra_inputs)
        record[name] = {"inputs_digest": digest, "depends_on": extra_inputs, "reason": reasons[name]}
    if record != before:
        write_json(path, record)


def _say_what_is_odd(config: Config, facts: MemberFacts) -> None:
    budget, count = config.pruning.cost_budget, len(facts.names)
    for key, values in (("max_latency_ms", facts.latency_ms), ("max_size_mb", facts.size_mb)):
        unknown = [name for name, value in zip(facts.names, values, strict=True) if np.isnan(value)]
        if unknown and getattr(budget, key) is not None:
            logger.warning("pruning.cost_budget.%s: not known of %s, which it does not bind", key, ", ".join(unknown))
    if config.pruning.target_size > count:
        logger.info("pruning.target_size is %d; there are %d members to keep", config.pruning.target_size, count)


def _lines(store: Store, name: str, state: str) -> str:
    """The ensemble's line, and below it what it keeps."""
    record = read_record(store.workspace.ensemble(name) / "ensemble.json", remedy="Build it again with --force")
    kept = f"keeps {len(record['members'])} of {len(record['candidates'])}: {', '.join(record['path'])}"
    costs = ((record["latency_ms"], "ms for one image"), (record["size_mb"], "MB"))
    known = [f"{value:.4g} {unit}" for value, unit in costs if value is not None]
    return f"{fitting.summary_line(store, name, state)}\n    {', '.join([kept, *known])}"
