"""The sections `runs.moe` and `runs.cascade` of `fusion-train`: ensembles that run only some members per image."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from utils.building import ensembles, fitting, latency
from utils.building.baselines import Baselines
from utils.building.builder_protocol import Build, Builder, Session, summary_line
from utils.building.ensembles import Crossfit
from utils.building.fitting import OutOfSampleRows
from utils.building.sparse_timing import Stopwatch
from utils.combiners.calibrated_votes import calibrated_probabilities
from utils.combiners.protocol import Combiner, MemberFacts, fit_crossfitted
from utils.combiners.routing import routed_members
from utils.moe_methods import COMBINERS, CascadeCombiner, MixtureOfExperts
from utils.numeric.means import paired_interval
from utils.numeric.metrics import log_loss_per_row
from utils.predictions import catalog, streaming
from utils.predictions.catalog import Member
from utils.predictions.store import Store

logger = logging.getLogger("disease_pipeline")

MOE = "runs.moe"
TIMED_ROWS = 64  # val images on which the combiners are timed
ONE_IMAGE = 1
ITSELF = "itself"


class SparseBuilder(Builder):
    """One ensemble that runs only some of the members per image: `moe` or `cascade`."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.config_key = f"runs.{name}"

    def names(self, session: Session) -> list[str]:
        """Return the ensemble if there is more than one member."""
        is_on = session.config.at(f"{self.config_key}.enable")
        return [self.name] if is_on and len(session.members) > 1 else []

    def check(self, session: Session) -> None:
        """Warn if there are fewer members than configured experts."""
        experts = session.config.runs.moe.num_experts
        if self.config_key == MOE and experts > len(session.members) > 1:
            logger.warning(
                "runs.moe.num_experts is %d; there are %d members, all of which are experts",
                *(experts, len(session.members)),
            )

    def problems(self, session: Session) -> list[str]:
        """Return a problem if there is only one member."""
        if len(session.members) > 1:
            return []
        reason = f"chooses among members, and there is only {session.members[0].name}. Name others in backbones.include"
        return [f"{self.name}: {reason}"]

    def inputs_digest(self, session: Session, name: str) -> str:
        """Return the digest, with latencies of the device and threads that the saved ensemble was built with."""
        record = ensembles.record_of(session.workspace, name) or {}
        return latency.inputs_digest(session.store, session.members, name, record.get("depends_on"))

    def build(self, session: Session, names: Sequence[str], *, force: bool) -> Build:
        """Time the members, fit the combiner and compare it with all members, the best member and the baselines."""
        store, members = session.store, session.members
        session.ensure(members)
        records = latency.measure(store, members, batches=[ONE_IMAGE])
        facts = fitting.member_facts(store, members, latency.milliseconds(records))
        out_of_sample = session.rows(members)
        simple = fitting.measure_baselines(store, facts, out_of_sample)
        recipe = COMBINERS[self.name].configured(store.config, facts)
        comparison = _Comparison(store, members, facts, out_of_sample, simple)
        n_rows = len(out_of_sample.fold)
        logger.info("fitting %s on %d out-of-sample rows of %d members", self.name, n_rows, len(members))
        fitting.save(
            store,
            self.name,
            self.name,
            fitting.fit(recipe, out_of_sample, baselines=simple),
            members,
            out_of_sample,
            extra_inputs=latency.latency_inputs(facts, records),
            post_fit=comparison.entries,
        )
        return Build(session, (self.name,))

    def describe_one(self, session: Session, name: str, state: str) -> list[str]:
        """Return the lines on the ensemble, its verdict, and a table of it and of its comparisons."""
        record = ensembles.record_of(session.workspace, name) or {}
        lines = [summary_line(session.workspace, name, state), f"    {record['verdict']}"]
        if name == "moe" and record["is_fixed"]:
            lines.append("    held-out rows gain nothing by a gate: the same experts serve every image")
        lines.append(
            f"    {'':12} experts per image  ms per image (measured)  ms for one image (expected)  log-loss  accuracy"
        )
        for other in (ITSELF, *(other for other in record["beside"] if other != ITSELF)):
            entry = record["beside"][other]
            lines.append(
                f"    {other:12} {entry['experts']:17.2f}  {_milliseconds(entry['latency_ms']):>23}  "
                f"{_milliseconds(entry['expected_latency_ms']):>27}  {entry['log_loss']:8.4f}  {entry['accuracy']:8.4f}"
            )
        if name == "moe":
            lines += [
                f"    {expert}{' (read by the gate)' if expert == record['gate_reads'] else ''}: runs for "
                f"{use['runs']:.1%} of the images, mean weight {use['weight']:.3f}"
                for expert, use in ((expert, record["expert_use"][expert]) for expert in record["experts"])
            ]
        else:
            fractions = ", ".join(f"{member} {record['leaves'][member]:.1%}" for member in record["chain"])
            lines.append(f"    images leave after: {fractions} (threshold {record['threshold']:.4f})")
        return lines


@dataclass(frozen=True)
class _Comparison:
    """Comparison of a sparse combiner with running all its members, the best single member, and a cascade (`moe`)."""

    store: Store
    members: Sequence[Member]
    facts: MemberFacts
    out_of_sample: OutOfSampleRows
    simple: Baselines

    def entries(self, combiner: Combiner, crossfit: Crossfit) -> dict[str, Any]:
        """Return `beside` {name: scores, experts, latencies}, the combiner under `itself`, and how it was `timed`."""
        assert isinstance(combiner, (MixtureOfExperts, CascadeCombiner))
        combiners: dict[str, MixtureOfExperts | CascadeCombiner] = {"all_experts": combiner.dense()}
        if isinstance(combiner, MixtureOfExperts):
            combiners["cascade"] = CascadeCombiner.configured(self.store.config, self.facts)
        rows, fold = self.out_of_sample.rows, self.out_of_sample.fold
        probabilities = {ITSELF: crossfit.probabilities}
        for name, recipe in combiners.items():
            probabilities[name] = fit_crossfitted(recipe, rows.logits, rows.labels, fold)
        best = self.facts.names.index(self.simple.best_single)
        probabilities["best_single"] = calibrated_probabilities(rows.logits[best], rows.labels, fold)
        combiners = {ITSELF: combiner, **combiners}
        experts = {name: routed_members(recipe, rows.logits) for name, recipe in combiners.items()}
        experts["best_single"] = np.arange(len(self.members))[:, None] == np.full((1, len(fold)), best)
        latencies, conditions = self._timed(combiners, best)
        return {
            "beside": {
                name: {
                    **self._compared(values, crossfit.probabilities),
                    "experts": float(experts[name].sum(axis=0).mean()),
                    "latency_ms": latencies.get(name),
                    "expected_latency_ms": self._expected(experts[name]),
                }
                for name, values in probabilities.items()
            },
            "timed": conditions,
        }

    def _compared(self, other: np.ndarray, combiner: np.ndarray) -> dict[str, Any]:
        """Return scores of cross-fitted probabilities `other` (N, C), and the gain of `combiner` (N, C) over them."""
        labels, groups = self.out_of_sample.rows.labels, self.out_of_sample.groups
        losses = [log_loss_per_row(values, labels) for values in (other, combiner)]
        hits = [(values.argmax(axis=1) == labels).astype(float) for values in (other, combiner)]
        scores: dict[str, Any] = {"log_loss": float(losses[0].mean()), "accuracy": float(hits[0].mean())}
        for name, gain in (("log_loss_gain", losses[0] - losses[1]), ("accuracy_gain", hits[1] - hits[0])):
            interval = paired_interval(gain, groups)
            scores |= {name: float(gain.mean()), f"{name}_ci95": None if interval is None else list(interval)}
        return scores

    def _expected(self, ran: np.ndarray) -> float | None:
        """Return the expected milliseconds per image, from the latencies of the members that `ran`, bool (M, N)."""
        used = ran.any(axis=1)
        costs = self.facts.latency_ms[used]
        return None if np.isnan(costs).any() else float((ran[used] * costs[:, None]).sum(axis=0).mean())

    def _timed(
        self, combiners: Mapping[str, MixtureOfExperts | CascadeCombiner], best: int
    ) -> tuple[dict[str, float], dict[str, Any]]:
        """Return {name: milliseconds per image, measured on val images}, and the rows and device of the measurement."""
        store = self.store
        without = [member.name for member in self.members if member.source == catalog.IMPORTED]
        if without or not store.catalog.has_images:
            return {}, {"reason": f"known by predictions alone: {', '.join(without)}" if without else "no images"}
        images = store.images("val")
        count = min(TIMED_ROWS, len(images.sample_ids))
        rows = np.linspace(0, len(images.sample_ids) - 1, count).astype(int)  # sorted by class, so spread over all
        device = streaming.resolve_device(store.config.device)
        with Stopwatch(store, self.members, images.take(rows), device) as watch:
            latencies = {name: watch.of_combiner(combiner) for name, combiner in combiners.items()}
            latencies["best_single"] = watch.of_member(best)
        return latencies, {"split": "val", "rows": count, "batch": store.config.dataset.batch_size, "device": device}


def _milliseconds(value: float | None) -> str:
    return "-" if value is None else f"{value:.3g}"
