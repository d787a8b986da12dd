"""The sections `runs.moe` and `runs.cascade` of `fusion-train`: what runs fewer members, beside what runs them all."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from utils.building import baselines, ensembles, fitting, latency
from utils.building.baselines import Baselines, bootstrap_interval
from utils.building.ensembles import Crossfit
from utils.building.fitting import OutOfSampleRows
from utils.building.sparse_timing import Stopwatch
from utils.combiners.protocol import Combiner, MemberFacts, fit_crossfitted
from utils.combiners.routing import routed_members
from utils.core.config import Config
from utils.core.results import Result
from utils.moe_methods import COMBINERS, CascadeCombiner, MixtureOfExperts
from utils.numeric.metrics import log_loss_per_row, softmax
from utils.predictions import catalog, extraction, streaming
from utils.predictions.catalog import Member
from utils.predictions.extraction import STREAMED_SPLITS
from utils.predictions.store import Store

logger = logging.getLogger("disease_pipeline")

MOE, CASCADE = "runs.moe", "runs.cascade"
TIMED_ROWS = 64  # images of val that the ways to answer are timed on
ONE_IMAGE = 1
ITSELF = "itself"


def mixture(store: Store, members: Sequence[Member], force: bool) -> Result:
    """Build `moe`; kept where its inputs are the same, unless `force`. One member alone is a failure of the result."""
    asked = store.config.runs.moe.num_experts
    if asked > len(members) > 1:
        logger.warning(
            "runs.moe.num_experts is %d; there are %d members, all of which are experts", asked, len(members)
        )
    return _section(store, members, "moe", force)


def cascades(store: Store, members: Sequence[Member], force: bool) -> Result:
    """Build `cascade`; kept where its inputs are the same, unless `force`. One member alone is a failure."""
    return _section(store, members, "cascade", force)


def names(config: Config) -> list[str]:
    """Ensembles that the two sections ask for."""
    return [place.removeprefix("runs.") for place in (CASCADE, MOE) if config.at(f"{place}.enable")]


def _section(store: Store, members: Sequence[Member], name: str, force: bool) -> Result:
    if len(members) < 2:
        reason = f"chooses among members, and there is only {members[0].name}. Name others in backbones.include"
        return Result("", {"built": [], "up_to_date": []}, [f"{name}: {reason}"])
    if force or not is_current(store, members, name):
        extraction.ensure(store, members, STREAMED_SPLITS)
        records = latency.measure(store, members, batches=[ONE_IMAGE])
        known = fitting.member_facts(store, members, latency.milliseconds(records))
        honest = fitting.out_of_sample_rows(store, members)
        rows = honest.rows
        simple = baselines.measure(store.config, known, rows.logits, rows.labels, honest.fold)
        recipe = COMBINERS[name].configured(store.config, known)
        beside = _Beside(store, members, known, honest, simple)
        logger.info("fitting %s on %d honest rows of %d members", name, len(honest.fold), len(members))
        extra_inputs = latency.latency_inputs(known, records)
        fitting.build(
            store,
            name,
            name,
            recipe,
            members,
            honest,
            extra_inputs=extra_inputs,
            baselines=simple,
            post_fit=beside.told_of,
        )
        state, document = "built", {"built": [name], "up_to_date": []}
    else:
        state, document = "up to date", {"built": [], "up_to_date": [name]}
    return Result("\n".join(_lines(store, name, state)), document)


def is_current(store: Store, members: Sequence[Member], name: str) -> bool:
    """Whether the saved one is what a build would make of these members; found without torch.

    Latencies are those of the device and the number of threads that it was built with.
    """
    record = ensembles.record_of(store.workspace, name) or {}
    on = record.get("depends_on")
    if on is None:
        return False
    records = latency.stored(store.workspace, members, on["device"], on["threads"])
    known = fitting.member_facts(store, members, latency.milliseconds(records))
    extra_inputs = latency.latency_inputs(known, records)
    return bool(
        record["inputs_digest"] == fitting.inputs_digest(store.config, store, members, name, extra_inputs=extra_inputs)
    )


@dataclass(frozen=True)
class _Beside:
    """What a sparse combiner stands beside: all its members run, the best single one, and for a mixture a cascade."""

    store: Store
    members: Sequence[Member]
    known: MemberFacts
    honest: OutOfSampleRows
    simple: Baselines

    def told_of(self, combiner: Combiner, crossfit: Crossfit) -> dict[str, Any]:
        """`beside` {name: losses, experts, latency} with the combiner's own under `itself`, and how it was timed."""
        assert isinstance(combiner, (MixtureOfExperts, CascadeCombiner))
        ways: dict[str, MixtureOfExperts | CascadeCombiner] = {"all_experts": combiner.dense()}
        if isinstance(combiner, MixtureOfExperts):
            ways["cascade"] = CascadeCombiner.configured(self.store.config, self.known)
        rows, fold = self.honest.rows, self.honest.fold
        probabilities = {ITSELF: crossfit.probabilities}
        for name, recipe in ways.items():
            probabilities[name] = fit_crossfitted(recipe, rows.logits, rows.labels, fold)
        best = self.known.names.index(self.simple.best_single)
        probabilities["best_single"] = softmax(rows.logits[best])
        ways = {ITSELF: combiner, **ways}
        experts = {name: routed_members(way, rows.logits) for name, way in ways.items()}
        experts["best_single"] = np.arange(len(self.members))[:, None] == np.full((1, len(fold)), best)
        took, how = self._timed(ways, best)
        return {
            "beside": {
                name: {
                    **self._compared(own, crossfit.probabilities),
                    "experts": float(experts[name].sum(axis=0).mean()),
                    "latency_ms": took.get(name),
                    "expected_latency_ms": self._expected(experts[name]),
                }
                for name, own in probabilities.items()
            },
            "timed": how,
        }

    def _compared(self, own: np.ndarray, combiner: np.ndarray) -> dict[str, Any]:
        """Scores of cross-fitted probabilities (N, C), and what the combiner's gain over them."""
        labels, seed = self.honest.rows.labels, self.store.config.seed
        losses = [log_loss_per_row(values, labels) for values in (own, combiner)]
        hits = [(values.argmax(axis=1) == labels).astype(float) for values in (own, combiner)]
        found = {"log_loss": float(losses[0].mean()), "accuracy": float(hits[0].mean())}
        for name, gain in (("log_loss_gain", losses[0] - losses[1]), ("accuracy_gain", hits[1] - hits[0])):
            found |= {name: float(gain.mean()), f"{name}_ci95": list(bootstrap_interval(gain, seed=seed))}
        return found

    def _expected(self, ran: np.ndarray) -> float | None:
        """Milliseconds for one image, one member after the other, by the latencies of members that `ran` (M, N)."""
        used = ran.any(axis=1)
        costs = self.known.latency_ms[used]
        return None if np.isnan(costs).any() else float((ran[used] * costs[:, None]).sum(axis=0).mean())

    def _timed(
        self, ways: Mapping[str, MixtureOfExperts | CascadeCombiner], best: int
    ) -> tuple[dict[str, float], dict[str, Any]]:
        """{name: milliseconds per image, really run on images of val}, and on which rows and device."""
        store = self.store
        without = [member.name for member in self.members if member.source == catalog.IMPORTED]
        if without or not store.catalog.has_images:
            return {}, {"reason": f"known by predictions alone: {', '.join(without)}" if without else "no images"}
        images = store.images("val")
        count = min(TIMED_ROWS, len(images.sample_ids))
        rows = np.linspace(0, len(images.sample_ids) - 1, count).astype(int)  # sorted by class, so spread over all
        device = streaming.resolve_device(store.config.device)
        watch = Stopwatch(store, self.members, images.take(rows), device)
        took = {name: watch.of_combiner(way) for name, way in ways.items()}
        took["best_single"] = watch.of_member(best)
        return took, {"split": "val", "rows": count, "batch": store.config.dataset.batch_size, "device": device}


def _lines(store: Store, name: str, state: str) -> list[str]:
    """The ensemble, what it is worth, and the table beside which it stands."""
    record = ensembles.record_of(store.workspace, name) or {}
    lines = [fitting.summary_line(store, name, state), f"    {record['verdict']}"]
    if name == "moe" and record["is_fixed"]:
        lines.append("    held-out rows gain nothing by a gate: the same experts serve every image")
    lines.append(
        f"    {'':12} experts per image  ms per image (measured)  ms for one image (expected)  log-loss  accuracy"
    )
    for other in (ITSELF, *(other for other in record["beside"] if other != ITSELF)):
        found = record["beside"][other]
        lines.append(
            f"    {other:12} {found['experts']:17.2f}  {_shown(found['latency_ms']):>23}  "
            f"{_shown(found['expected_latency_ms']):>27}  {found['log_loss']:8.4f}  {found['accuracy']:8.4f}"
        )
    if name == "moe":
        lines += [
            f"    {expert}{' (read by the gate)' if expert == record['gate_reads'] else ''}: runs for "
            f"{use['runs']:.1%} of the images, mean weight {use['weight']:.3f}"
            for expert, use in ((expert, record["expert_use"][expert]) for expert in record["experts"])
        ]
    else:
        shares = ", ".join(f"{member} {record['leaves'][member]:.1%}" for member in record["chain"])
        lines.append(f"    images leave after: {shares} (threshold {record['threshold']:.4f})")
    return lines


def _shown(value: float | None) -> str:
    return "-" if value is None else f"{value:.3g}"
