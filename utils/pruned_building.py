"""The section `pruning` of `build-ensemble`: members are measured once, then each method keeps the ones worth it."""

from __future__ import annotations

import logging
from collections.abc import Sequence

import numpy as np

from utils import fitting, latency
from utils.artifacts import read_record
from utils.catalog import Member
from utils.combiner import MemberFacts
from utils.config import Config
from utils.predictions import Store
from utils.pruning_methods import COMBINERS
from utils.results import Result
from utils.subset_search import NothingFits

logger = logging.getLogger("disease_pipeline")

PLACE = "pruning"
STREAMED = ("val", "test")
ONE_IMAGE = 1


def pruned(store: Store, members: Sequence[Member], force: bool) -> Result:
    """Build `pruned_<method>` for each method of the section; what is there with equal inputs is kept, unless `force`.

    A method whose budget no member is within is a failure of the result, with the cheapest possible; the others go on.
    """
    config = store.config
    wanted = names(config)
    fresh = [name for name in wanted if force or not is_current(store, members, name)]
    failures = []
    if fresh:
        store.ensure(members, STREAMED)
        records = latency.measure(store, members, batches=[ONE_IMAGE])
        facts = fitting.facts(store, members, latency.milliseconds(records))
        _say_what_is_odd(config, facts)
        honest = fitting.honest_rows(store, members, kind=config.runs.score_ensemble.fit_rows)
        for name in fresh:
            recipe = COMBINERS[name].configured(config, facts)
            try:
                fitting.build(store, name, name, recipe, members, honest, also=latency.as_input(facts, records))
            except NothingFits as error:
                failures.append(f"{name}: {error}")
    left_out = {failure.partition(":")[0] for failure in failures}
    built = [name for name in fresh if name not in left_out]
    kept = [name for name in wanted if name not in fresh]
    lines = [_lines(store, name, "built" if name in built else "up to date") for name in wanted if name not in left_out]
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
    on = record.get("depends_on")
    if on is None:
        return False
    records = latency.stored(store.workspace, members, on["device"], on["threads"])
    measured = latency.as_input(fitting.facts(store, members, latency.milliseconds(records)), records)
    return bool(record["inputs_digest"] == fitting.inputs_digest(store.config, store, members, name, also=measured))


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
    return f"{fitting.line(store, name, state)}\n    {', '.join([kept, *known])}"
