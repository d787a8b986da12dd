"""What the GPU benchmark runs and times: the product's loops, plain loops beside them, and clocks of a device."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from gpu_workspace import CLASSES, PROJECT, RATE, Bench

CONFIG = PROJECT / "configs" / "votes.yaml"
TEMPERATURE, ALPHA = 4.0, 0.5  # the configuration's defaults
LARGEST_TEACHER = 3
"""Members of the teacher at most."""


# clocks --------------------------------------------------------------------------------------------------------------
class Clock:
    """Seconds that calls take on a device: between two CUDA events, or by `perf_counter` on the CPU."""

    def __init__(self, bench: Bench) -> None:
        self._bench = bench
        self._spans: list[tuple[Any, Any]] = []

    @contextmanager
    def timing(self) -> Iterator[None]:
        """Count what the device does inside the block."""
        start = self._mark()
        try:
            yield
        finally:
            self._spans.append((start, self._mark()))

    def seconds(self) -> float:
        """Of all blocks so far."""
        self._bench.synchronize()
        if not self._bench.on_cuda:
            return float(sum(end - start for start, end in self._spans))
        return sum(start.elapsed_time(end) for start, end in self._spans) / 1000

    def _mark(self) -> Any:
        if not self._bench.on_cuda:
            return time.perf_counter()
        import torch

        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event


@contextmanager
def forward_passes_timed(clock: Clock) -> Iterator[None]:
    """Inside the block `clock` counts the forward passes of the product's streaming."""
    from utils.networks.embeddings import EmbeddingExtractor

    original = EmbeddingExtractor.__call__

    def timed(self: Any, images: Any) -> Any:
        with clock.timing():
            return original(self, images)

    EmbeddingExtractor.__call__ = timed  # type: ignore[method-assign]
    try:
        yield
    finally:
        EmbeddingExtractor.__call__ = original  # type: ignore[method-assign]


def seconds_of(bench: Bench, run: Callable[[], object]) -> float:
    """Wall seconds until the device has done what `run` gives it."""
    bench.synchronize()
    start = time.perf_counter()
    run()
    bench.synchronize()
    return time.perf_counter() - start


def by_turns(bench: Bench, runs: dict[str, Callable[[], object]]) -> dict[str, float]:
    """Seconds of the quickest of some turns of each run, after a turn that does not count."""
    for run in runs.values():
        run()
    turns = [{name: seconds_of(bench, run) for name, run in runs.items()} for _ in range(bench.form.turns)]
    return {name: min(turn[name] for turn in turns) for name in runs}


def busy_share(bench: Bench, run: Callable[[], object]) -> float | None:
    """Share of the wall time of `run` in which the GPU computes or copies, by torch's profiler; None if it sees none.

    The profiler itself costs time, so that the share is rather too low. It sees nothing on the CPU, nor without the
    rights that CUPTI needs.
    """
    from torch.profiler import ProfilerActivity, profile, supported_activities

    if not bench.on_cuda or ProfilerActivity.CUDA not in supported_activities():
        return None
    with profile(activities=[ProfilerActivity.CUDA]) as profiler:
        seconds = seconds_of(bench, run)
    return device_seconds(profiler.events()) / seconds or None


def device_seconds(events: Iterable[Any]) -> float:
    """Seconds in which at least one of a profiler's events runs on the GPU, without annotations, which cover gaps."""
    from torch.autograd import DeviceType

    spans = [
        (event.time_range.start / 1e6, event.time_range.end / 1e6)
        for event in events
        if event.device_type == DeviceType.CUDA and not getattr(event, "is_user_annotation", False)
    ]
    length, reached = 0.0, float("-inf")
    for start, end in sorted(spans):
        length += max(0.0, end - max(start, reached))
        reached = max(reached, end)
    return length


# extraction ----------------------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class Streamed:
    """One member past the images, by the product."""

    seconds: float
    opening: float
    """Of these, seconds in which the network is built and its weights are read"""
    forward: float
    """Of these, seconds in which forward passes run"""
    batch_size: int
    """Images of the largest batch"""
    peak_bytes: int | None
    """Of the device's memory; None on the CPU"""


def streamed(bench: Bench, name: str, count: int) -> Streamed:
    """Stream one member over `count` decoded images and time it."""
    import torch

    from utils.predictions import streaming

    clock, opening, largest, images = Clock(bench), [0.0], [0], bench.images("val", count)

    def opened(spec: Any) -> Any:
        start = time.perf_counter()
        network = streaming.open_network(spec)
        opening[0] = time.perf_counter() - start
        return network

    def run() -> None:
        for batch in _stream(bench, name, images, bench.device, opener=opened):
            largest[0] = max(largest[0], len(batch.logits))

    if bench.on_cuda:
        torch.cuda.reset_peak_memory_stats()
    with forward_passes_timed(clock):
        seconds = seconds_of(bench, run)
    peak = torch.cuda.max_memory_allocated() if bench.on_cuda else None
    return Streamed(seconds, opening[0], clock.seconds(), largest[0], peak)


def probabilities(bench: Bench, name: str, device: str) -> np.ndarray:
    """The product's probabilities (N, C) of a member on a device."""
    from utils.numeric.metrics import softmax

    images = bench.images("val", bench.form.compared)
    found: np.ndarray = softmax(np.concatenate([batch.logits for batch in _stream(bench, name, images, device)]))
    return found


def _stream(bench: Bench, name: str, images: Any, device: str, **options: Any) -> Iterator[Any]:
    from utils.predictions import streaming

    cache = bench.workspace / "image_cache"
    options |= {"batch_size": bench.form.batch_size, "device": device, "image_cache": cache}
    return streaming.stream(bench.spec(name), [images], **options)


def bare_forward_seconds(bench: Bench, name: str, count: int, batch_size: int) -> float:
    """Seconds of a plain loop over decoded images in memory, with the network open: copy, normalise, forward pass."""
    import torch

    from utils import base_back
    from utils.networks.construction import evaluation_format
    from utils.predictions import image_splits, streaming

    spec = bench.spec(name)
    model = streaming.open_network(spec)
    layout = evaluation_format(model)
    model.to(device=bench.device, memory_format=layout)
    images, cache = bench.images("val", batch_size), bench.workspace / "image_cache"
    opened = image_splits.open_images(images, spec.preprocessing, image_cache=cache, threads=1)
    pixels = torch.from_numpy(opened.crops(range(batch_size)))
    pixels = pixels.pin_memory() if bench.on_cuda else pixels
    mean, std = (
        torch.tensor(values, device=bench.device).view(1, 3, 1, 1)
        for values in (spec.preprocessing.mean, spec.preprocessing.std)
    )
    rule = base_back.load_bundled("threads")
    threads = rule.threads_of_network("streaming", model, bench.form.side, bench.device)

    def loop(total: int) -> Any:
        outputs = []
        for start in range(0, total, batch_size):
            batch = pixels[: total - start].to(bench.device, non_blocking=True)
            planes = batch.permute(0, 3, 1, 2).to(dtype=torch.float32, memory_format=layout)
            outputs.append(model(planes.div_(255).sub_(mean).div_(std)))
        return torch.cat(outputs).float().cpu()

    precision = torch.autocast("cuda", dtype=torch.bfloat16) if bench.on_cuda else nullcontext()
    with torch.inference_mode(), rule.intra_op_threads(threads), precision:
        loop(batch_size)
        return seconds_of(bench, lambda: loop(count))


# training ------------------------------------------------------------------------------------------------------------
def training_runs(bench: Bench) -> dict[str, Callable[[], object]]:
    """Epochs of one network by the base pipeline (`product`; `in memory` without its loader) and by a plain loop.

    All have the same batches but for their augmentation, the same optimizer and the same autocast.
    """
    from training import create_optimized_optimizer, get_loss_function_for_backbone, train_epoch_optimized

    name, loader, device = bench.form.trained, bench.train_loader(), bench.torch_device
    criterion = get_loss_function_for_backbone(name, len(CLASSES))
    batches = [tuple(part.pin_memory() if bench.on_cuda else part for part in batch) for batch in loader]

    def trained(data: Any) -> Callable[[], object]:
        model = bench.new_network(name)
        optimizer, scaler = create_optimized_optimizer(model, RATE, name), bench.new_scaler()
        return lambda: train_epoch_optimized(model, data, optimizer, criterion, device, scaler=scaler)

    model, scaler = bench.new_network(name), bench.new_scaler()
    optimizer = create_optimized_optimizer(model, RATE, name)
    return {
        "product": trained(loader),
        "in memory": trained(batches),
        "bare": lambda: _bare_epoch(bench, model, batches, optimizer, criterion, scaler),
    }


def _bare_epoch(bench: Bench, model: Any, batches: Sequence[Any], optimizer: Any, criterion: Any, scaler: Any) -> None:
    import torch

    model.train()
    for images, labels in batches:
        optimizer.zero_grad(set_to_none=True)
        with torch.autocast("cuda") if bench.on_cuda else nullcontext():
            logits = model(images.to(bench.device, non_blocking=True))
            loss = criterion(logits, labels.to(bench.device, non_blocking=True))
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()


def distillation_runs(bench: Bench) -> dict[str, Callable[[], object]]:
    """Trainings of one epoch: `student` with the targets `consistent`, `alone` the same network by its labels."""
    import torch

    from utils.distillation import target_sources
    from utils.distillation.student_training import StudentTrainingSettings, train
    from utils.training.image_source import ImageSource

    store = _opened_store(bench)
    teacher, numbers = _teacher(bench, store), iter(range(1, 10**6))

    def source(images: Any) -> Any:
        return ImageSource(images, bench.preprocessing(), "full", image_cache=store.workspace.image_cache)

    images = source(store.images("train"))
    crossfit = np.full((len(images), len(CLASSES)), np.nan)
    targets = target_sources.prepare(store, teacher, images, target_sources.CONSISTENT, crossfit, ensemble="student")
    val = source(bench.images("val", bench.form.batch_size))

    def epoch(*, with_teacher: bool) -> None:
        # Of a seed of its own, so that no epoch finds the images of the one before in memory.
        schedule = targets.of_seed(next(numbers))
        alpha = ALPHA if with_teacher else 0.0
        settings = StudentTrainingSettings(bench.form.student, 1, RATE, TEMPERATURE, alpha, schedule.seed)
        model = bench.new_network(bench.form.student)
        if with_teacher:
            train(model, settings, schedule, partial(targets.predict, schedule), val, device=bench.device)
        else:
            train(model, settings, replace(schedule, is_shared=False), None, val, device=bench.device)
        del model
        if bench.on_cuda:
            torch.cuda.empty_cache()

    return {"student": lambda: epoch(with_teacher=True), "alone": lambda: epoch(with_teacher=False)}


def _opened_store(bench: Bench) -> Any:
    from utils import base_back
    from utils.core.config_file import load_config
    from utils.discovery import discover
    from utils.predictions import catalog
    from utils.predictions.store import Store

    batch_size = bench.form.batch_size
    overrides = [f"device={bench.device}", f"dataset.img_size={bench.form.side}", f"dataset.batch_size={batch_size}"]
    config = load_config(CONFIG, overrides=[*overrides, f"distillation.batch_size={batch_size}"])
    place = base_back.open_workspace()
    discover.discover(config, place)
    return Store(config, place, catalog.load(place))


def _teacher(bench: Bench, store: Any) -> Any:
    """Soft voting over the first members."""
    from utils.distillation import teachers

    names = tuple(sorted(bench.form.members[:LARGEST_TEACHER]))
    first = teachers.resolve(store, names[0], excluded_member=bench.form.student)
    digests = {name: store.catalog.members[name].digest for name in names}
    ensemble = replace(first.ensemble, name="teacher", members=names, candidates=names, member_digests=digests)
    return replace(first, name="teacher", ensemble=ensemble, is_member=False)


# export --------------------------------------------------------------------------------------------------------------
def vote_network(bench: Bench) -> Any:
    """Soft voting over the members as one network, on the CPU."""
    from utils.combiners.heads import MeanOfProbabilities
    from utils.networks.ensemble_network import EnsembleNetwork, MemberNetworks
    from utils.predictions import streaming

    columns = range(len(CLASSES))
    parts = [
        MemberNetworks(name, [streaming.open_network(bench.spec(name))], bench.preprocessing(), columns)
        for name in bench.form.members
    ]
    return EnsembleNetwork(parts, MeanOfProbabilities()).eval()


def write_onnx(bench: Bench, network: Any) -> Path:
    """Write a network as an ONNX file, as `export` does."""
    import torch

    from utils.exporting import export_formats

    side = bench.form.side
    given = {"kind": "float-nchw", "name": "images", "img_size": side, "shorter_side": int(side * 1.14)}
    folder, example = bench.workspace / "voting", torch.rand(1, 3, side, side)
    done = export_formats.write_packaged_formats(
        network, "voting", ["onnx"], folder, example, {"input": given}, list(CLASSES)
    )
    if done["onnx"]["status"] != "ok":
        raise RuntimeError(f"the export to ONNX failed: {done['onnx']['reason']}")
    path: Path = folder / done["onnx"]["path"]
    return path


def eager_run(bench: Bench, network: Any, images: np.ndarray) -> Callable[[], object]:
    """A run of the network on the device, in bfloat16 on CUDA, from and to the memory of the CPU."""
    import torch

    network.to(bench.device)

    def run() -> Any:
        precision = torch.autocast("cuda", dtype=torch.bfloat16) if bench.on_cuda else nullcontext()
        with torch.inference_mode(), precision:
            return network(torch.from_numpy(images).to(bench.device)).float().cpu()

    return run
