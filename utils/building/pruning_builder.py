"""The section `pruning` of `build-ensemble`: the members are timed once, then each method selects a subset of them.

`ensembles/pruning.json` records the methods whose budget excludes every member, so that they are not tried again.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from utils.building import ensembles, family_fits, fitting, latency
from utils.building.builder_protocol import LEFT_OUT, Build, Builder, Session
from utils.building.fitting import Fitted, OutOfSampleRows
from utils.combiners.protocol import Combiner, MemberFacts
from utils.combiners.pruning import COMBINERS
from utils.combiners.subset_search import BudgetError
from utils.core.artifacts import write_json
from utils.core.config import Config
from utils.core.display_text import join_names
from utils.core.errors import UserError
from utils.core.parsed_files import record_once

logger = logging.getLogger("disease_pipeline")

ONE_IMAGE = 1
AGAIN = "Remove it, then run build-ensemble again"


class PruningBuilder(Builder):
    """`pruned_<method>` for each method of the section."""

    config_key = "pruning"

    def names(self, session: Session) -> list[str]:
        """Return one name per method."""
        section = session.config.pruning
        return [f"pruned_{method}" for method in section.methods] if section.enable else []

    def inputs_digest(self, session: Session, name: str) -> str:
        """Return the digest, with latencies of the device and threads that the saved ensemble was built with."""
        record = ensembles.record_of(session.workspace, name) or {}
        return latency.inputs_digest(session.store, session.members, name, record.get("depends_on"))

    def left_out(self, session: Session) -> Mapping[str, str]:
        """Return the methods for which no member was within the budget in the last build with the same inputs."""
        record = record_once(session.workspace.left_out, remedy=AGAIN) or {}
        return {
            name: record[name]["reason"]
            for name in self.names(session)
            if name in record
            and record[name]["inputs_digest"]
            == latency.inputs_digest(session.store, session.members, name, record[name]["depends_on"])
        }

    def build(self, session: Session, names: Sequence[str], *, force: bool) -> Build:
        """Measure the members once, then fit each method; record methods whose budget excludes every member."""
        config, store, members = session.config, session.store, session.members
        session.ensure(members)
        records = latency.measure(store, members, batches=[ONE_IMAGE])
        facts = fitting.member_facts(store, members, latency.milliseconds(records))
        _warn_about_budget(config, facts)
        rows = session.rows(members, kind=config.runs.score_ensemble.fit_rows)
        extra_inputs = latency.latency_inputs(facts, records)
        recipes = [COMBINERS[name].configured(config, facts) for name in names]
        results = family_fits.fit_each(
            _fit, recipes, shared=(rows,), description="prunings", n_logits=rows.rows.logits.size, are_nested=True
        )
        reasons: dict[str, str] = {}
        for name, fitted in zip(names, results, strict=True):
            if isinstance(fitted, BudgetError):
                reasons[name] = str(fitted)
            elif isinstance(fitted, UserError):
                raise fitted
            else:
                fitting.save(store, name, name, fitted, members, rows, extra_inputs=extra_inputs)
        _note(session, names, reasons, extra_inputs)
        return Build(session, tuple(name for name in names if name not in reasons))

    def describe_one(self, session: Session, name: str, state: str) -> list[str]:
        """Return the ensemble's line, and a line on the members that it keeps and their cost."""
        lines = super().describe_one(session, name, state)
        if not state.startswith(LEFT_OUT):
            record = ensembles.record_of(session.workspace, name) or {}
            members = f"keeps {len(record['members'])} of {len(record['candidates'])}: {', '.join(record['path'])}"
            costs = ((record["latency_ms"], "ms for one image"), (record["size_mb"], "MB"))
            measured = [f"{value:.4g} {unit}" for value, unit in costs if value is not None]
            lines.append(f"    {', '.join([members, *measured])}")
        return lines


def _fit(rows: OutOfSampleRows, recipe: Combiner) -> Fitted:
    return fitting.fit(recipe, rows)


def _note(
    session: Session, attempted: Sequence[str], reasons: Mapping[str, str], extra_inputs: Mapping[str, Any]
) -> None:
    """Record which of the `attempted` methods keep no member, and drop the earlier entries of all attempted ones."""
    store, path = session.store, session.workspace.left_out
    before = record_once(path, remedy=AGAIN) or {}
    record = {name: entry for name, entry in before.items() if name not in attempted}
    for name in (name for name in attempted if name in reasons):
        digest = fitting.inputs_digest(session.config, store, session.members, name, extra_inputs=extra_inputs)
        record[name] = {"inputs_digest": digest, "depends_on": extra_inputs, "reason": reasons[name]}
    if record != before:
        write_json(path, record)


def _warn_about_budget(config: Config, facts: MemberFacts) -> None:
    budget, count = config.pruning.cost_budget, len(facts.names)
    for key, values in (("max_latency_ms", facts.latency_ms), ("max_size_mb", facts.size_mb)):
        unknown = [name for name, value in zip(facts.names, values, strict=True) if np.isnan(value)]
        if unknown and getattr(budget, key) is not None:
            logger.warning("pruning.cost_budget.%s: not known of %s, which it does not bind", key, join_names(unknown))
    if config.pruning.target_size > count:
        logger.info("pruning.target_size is %d; there are %d members to keep", config.pruning.target_size, count)
