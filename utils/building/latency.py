"""Latencies of networks and combiners, measured once per content, device and number of threads, and stored.

A stored latency is never measured again, so that selections by latency are reproducible. Remove
`ensembles/latency.json` to measure everything again.
"""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from utils.building import fitting
from utils.combiners.protocol import MemberFacts
from utils.core.artifacts import write_json
from utils.core.other_programs import OtherPrograms
from utils.core.parsed_files import record_once
from utils.core.workspace import Workspace
from utils.networks.construction import NetworkSpec
from utils.networks.memory import out_of_memory
from utils.predictions import catalog, streaming
from utils.predictions.catalog import Member
from utils.predictions.store import Store

if TYPE_CHECKING:
    from torch import Tensor, nn

logger = logging.getLogger("disease_pipeline")

BATCHES = (1, 32)
WARM_UP, WARM = 3, 0.1  # warm-up ends after 3 runs or 0.1 s, and has at least one run
FEWEST, MOST = 5, 50  # number of counted runs
ENOUGH, LONGEST = 0.15, 2.0  # seconds of counted runs: sufficient after `FEWEST` runs, and the limit in any case
AGAIN = "Remove it; latencies are then measured again"


@dataclass(frozen=True)
class Timing:
    """Milliseconds of forward passes over one batch of images that is already on the device."""

    p50: float
    p95: float
    runs: int
    """Number of counted runs."""


@dataclass(frozen=True)
class Record:
    """Latency of one network or combiner on one device."""

    device: str
    """`cpu`, or `cuda` with the name of the GPU"""
    threads: int
    """torch's number of threads on the CPU"""
    batches: dict[int, Timing]
    """{batch size: timing}; batch sizes that ran out of memory are missing."""
    busy: float | None = None
    """Cores that other programs used during the measurement, if they interfered: the times are then too high."""


def measure(store: Store, members: Sequence[Member], *, batches: Sequence[int] = BATCHES) -> dict[str, Record]:
    """Return {member: latency of its network}, measured if none is stored, with one network in memory at a time.

    Networks that differ in their weights only, such as a backbone and its soups, are measured once. A member without a
    network (predictions only) is left out. Batch sizes that run out of memory are missing. Raises UserError for a
    checkpoint that is gone, has changed since discovery, or does not run.
    """
    networks = [member for member in members if member.checkpoints]
    if not networks:
        return {}
    import torch

    device = streaming.resolve_device(store.config.device)
    hardware, threads = _named(device), torch.get_num_threads()
    records = stored(store.workspace, networks, hardware, threads)
    alike: dict[NetworkSpec, list[Member]] = {}
    for member in networks:
        alike.setdefault(_structure(member, store.workspace), []).append(member)
    missing = [group for group in alike.values() if any(_gaps(records.get(member.name), batches) for member in group)]
    for number, group in enumerate(missing, start=1):
        for member in group:
            catalog.check_current(store.workspace, member, store.digests)
        known = _merged(hardware, threads, [records[member.name] for member in group if member.name in records])
        if unknown := _gaps(known, batches):
            others = OtherPrograms()
            timings = _measured(group[0], store.workspace, device, unknown)
            busy = others.in_the_way(_working(device, threads))
            known = _merged(hardware, threads, [known, Record(hardware, threads, timings, busy)])
            logger.info(
                "[%d/%d] measured %s on %s (threads: %d): %s",
                *(number, len(missing), ", ".join(member.name for member in group), hardware, threads),
                ", ".join(f"{timing.p50:.3g} ms for {size}" for size, timing in timings.items()),
            )
        for member in group:
            before = records.get(member.name)
            if _gaps(before, batches):
                records[member.name] = _merged(hardware, threads, [known, *([before] if before else [])])
                _add(store.workspace, "networks", member.digest, records[member.name], {"member": member.name})
    _warn_when_busy(store.workspace, [records[member.name] for group in missing for member in group])
    return {member.name: records[member.name] for member in networks}


def _structure(member: Member, workspace: Workspace) -> NetworkSpec:
    """Return the specification of a member's network without its weights."""
    return replace(member.network(workspace), checkpoint=Path())


def _gaps(record: Record | None, batches: Sequence[int]) -> list[int]:
    """Return the batch sizes without a timing."""
    return [size for size in batches if record is None or size not in record.batches]


def _merged(device: str, threads: int, records: Sequence[Record]) -> Record:
    """Return all timings of records on one device; of a batch size in several, that of the last."""
    batches = {size: timing for record in records for size, timing in record.batches.items()}
    return Record(device, threads, batches, highest_busy(records))


def stored(workspace: Workspace, members: Sequence[Member], device: str, threads: int) -> dict[str, Record]:
    """Return {member: stored latency on this device}, without torch; members without a measurement are missing."""
    entries = _read(workspace, "networks")
    records = {}
    for member in members:
        entry = entries.get(member.digest, {}).get(_key(device, threads))
        if entry is not None:
            records[member.name] = _record_of(entry, device, threads)
    return records


def milliseconds(records: Mapping[str, Record], *, batch: int = 1) -> dict[str, float]:
    """Return {member: median milliseconds of its runs on a batch of this size}."""
    return {name: record.batches[batch].p50 for name, record in records.items() if batch in record.batches}


def highest_busy(records: Iterable[Record]) -> float | None:
    """Return the most cores that other programs used during any of these measurements; None if none interfered."""
    return max((record.busy for record in records if record.busy is not None), default=None)


def latency_inputs(facts: MemberFacts, records: Mapping[str, Record]) -> dict[str, Any]:
    """Return device, threads, latencies and sizes, which are part of `ensemble.json` and of its digest."""
    devices = {(record.device, record.threads) for record in records.values()}
    device, threads = next(iter(devices), (None, None))
    return {
        "device": device,
        "threads": threads,
        "latency_ms": _by_name(facts.names, facts.latency_ms),
        "size_mb": _by_name(facts.names, facts.size_mb),
    }


def inputs_digest(store: Store, members: Sequence[Member], name: str, built_with: Mapping[str, Any] | None) -> str:
    """Return `fitting.inputs_digest` of an ensemble selected by latency, for the device that it was built with.

    `built_with` is the result of `latency_inputs` at the build, or None if nothing was built.
    """
    device, threads = (built_with["device"], built_with["threads"]) if built_with else ("", 0)
    records = stored(store.workspace, members, device, threads)
    facts = fitting.member_facts(store, members, milliseconds(records))
    extra_inputs = latency_inputs(facts, records)
    return fitting.inputs_digest(store.config, store, members, name, extra_inputs=extra_inputs)


def _by_name(members: Sequence[str], values: np.ndarray) -> dict[str, float | None]:
    pairs = zip(members, values.tolist(), strict=True)
    return {name: None if np.isnan(value) else value for name, value in pairs}


def measure_combiner(
    store: Store,
    digest: str,
    name: str,
    make: Callable[[], nn.Module],
    shape: tuple[int, int],
    widths: Sequence[int] = (),
) -> Record:
    """Return the latency of a combiner over logits (B, M, C) of `shape` (M, C), measured unless stored for `digest`.

    `make` returns its module, `name` is the ensemble's name for the file, and `widths` (M,) are the widths of the
    embeddings if the combiner reads any.
    """
    import torch

    device = streaming.resolve_device(store.config.device)
    hardware, threads = _named(device), torch.get_num_threads()
    entry = _read(store.workspace, "combiners").get(digest, {}).get(_key(hardware, threads))
    if entry is not None:
        return _record_of(entry, hardware, threads)
    module, batches, others = make().to(device).eval(), {}, OtherPrograms()
    with torch.inference_mode():
        for size in BATCHES:
            random = torch.Generator().manual_seed(0)
            logits = torch.randn(size, *shape, generator=random).to(device)
            embeddings = [torch.randn(size, width, generator=random).to(device) for width in widths]
            forward = partial(_answer, module, embeddings) if widths else module
            batches[size] = timing_of(forward, logits)
    record = Record(hardware, threads, batches, others.in_the_way(_working(device, threads)))
    _add(store.workspace, "combiners", digest, record, {"ensemble": name})
    return record


def _answer(module: nn.Module, embeddings: list[Tensor], logits: Tensor) -> Tensor:
    return module(logits, embeddings)


def _read(workspace: Workspace, kind: str) -> Mapping[str, Any]:
    """Read the stored entries of a `kind`: networks or combiners."""
    return (record_once(workspace.latency, remedy=AGAIN, form={"networks": dict}) or {}).get(kind, {})


def _record_of(entry: Mapping[str, Any], device: str, threads: int) -> Record:
    batches = {int(name.removeprefix("batch_")): Timing(**timing) for name, timing in entry["batches"].items()}
    return Record(device, threads, batches, entry.get("busy"))


def _key(device: str, threads: int) -> str:
    return f"{device}, threads: {threads}"


def _add(workspace: Workspace, kind: str, digest: str, record: Record, owner: Mapping[str, str]) -> None:
    """Store one latency immediately, so that an interrupted command keeps it; `owner` names the network or ensemble."""
    before = record_once(workspace.latency, remedy=AGAIN) or {"networks": {}}
    batches = {f"batch_{size}": vars(timing) for size, timing in record.batches.items()}
    entry = {"device": record.device, "threads": record.threads, "batches": batches, **owner}
    entry |= {} if record.busy is None else {"busy": record.busy}
    table = before.get(kind, {})
    entries = table.get(digest, {}) | {_key(record.device, record.threads): entry}
    write_json(workspace.latency, {**before, kind: {**table, digest: entries}})


def _working(device: str, threads: int) -> int:
    """Return the number of this process's busy CPU threads: on a GPU one, which launches the kernels."""
    return threads if device == "cpu" else 1


def _warn_when_busy(workspace: Workspace, measured: Sequence[Record]) -> None:
    busy = highest_busy(measured)
    if busy is not None:
        logger.warning(
            "this machine is busy (other programs use %.1f of %d cores): latencies come out too high, and are stored; "
            "remove %s to measure them again when it is idle",
            busy,
            os.cpu_count() or 1,
            workspace.latency,
        )


def _named(device: str) -> str:
    import torch

    return f"cuda ({torch.cuda.get_device_name(device)})" if torch.device(device).type == "cuda" else device


def _measured(member: Member, workspace: Workspace, device: str, batches: Sequence[int]) -> dict[int, Timing]:
    import torch

    timings, spec = {}, member.network(workspace)
    with streaming.network_on_device(spec, device) as (forward, placed):
        for size in batches:
            noise = torch.randn(size, 3, spec.img_size, spec.img_size, generator=torch.Generator().manual_seed(0))
            try:
                timings[size] = timing_of(forward, placed(noise))
            except (RuntimeError, MemoryError) as error:
                if not out_of_memory(error):
                    raise
                logger.warning("%s: out of memory with %d images on %s; not measured", member.name, size, device)
    return timings


def timing_of(forward: Callable[[Tensor], Tensor], images: Tensor) -> Timing:
    """Time forward passes over a batch, such as images (B, 3, H, W), after a warm-up; by CUDA events on a GPU."""
    once = _by_events if images.is_cuda else _by_clock
    spent, warm_runs = 0.0, 0
    while not warm_runs or (spent < WARM and warm_runs < WARM_UP):
        spent += once(forward, images)
        warm_runs += 1
    seconds: list[float] = []
    while len(seconds) < MOST and (sum(seconds) < ENOUGH or len(seconds) < FEWEST) and sum(seconds) < LONGEST:
        seconds.append(once(forward, images))
    p50, p95 = (round(1000 * float(value), 4) for value in np.percentile(seconds, (50, 95)))
    return Timing(p50, p95, len(seconds))


def _by_clock(forward: Callable[[Tensor], Tensor], images: Tensor) -> float:
    start = time.perf_counter()
    forward(images)
    return time.perf_counter() - start


def _by_events(forward: Callable[[Tensor], Tensor], images: Tensor) -> float:
    import torch

    with torch.cuda.device(images.device):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        forward(images)
        end.record()
        end.synchronize()
    return start.elapsed_time(end) / 1000
