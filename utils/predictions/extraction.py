"""Extraction: runs members' networks on splits and writes their logits and embeddings to the prediction store.

Missing predictions are computed for one member at a time, all requested splits in one pass.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Iterable, Sequence
from pathlib import Path

from utils import base_back
from utils.core import engines, estimates, worker_processes
from utils.core.progress_bar import progress_bar
from utils.networks.checkpoints import reading_ahead
from utils.predictions import catalog, image_splits, inspection, output_writing, row_groups, streaming, training_data
from utils.predictions.catalog import IMPORTED, Member
from utils.predictions.store import Store

logger = logging.getLogger("disease_pipeline")

STREAMED_SPLITS = ("val", "test")
"""Splits that one pass of a member covers: for the out-of-sample rows and the later evaluation."""
FLOAT_BYTES = 4  # bytes of a parameter in a checkpoint
HALF_BYTES = 2  # of a parameter in half precision, by which the number of parameters is not underestimated
GPU_SHARE = 0.5  # share of a GPU per member on a cluster: one member loads weights while another runs


def ensure(store: Store, members: Sequence[Member], splits: Sequence[str]) -> None:
    """Run the members' networks on those splits whose predictions the store lacks.

    With val, train images are included for members whose predictions on some of them are out of sample
    (`training_data`). New val logits are checked, and the problems are added to the store's catalog. Imported members
    have no network and are skipped: `Store.rows` reports what they lack. Raises UserError for a network that cannot be
    run, and for one whose val logits show that it is unusable.
    """
    networks = [member for member in members if member.source != IMPORTED]
    missing = [(m, gaps) for m in networks if (gaps := _gaps(store, m, splits))]
    store.digests.save()
    if not missing:
        return
    device = streaming.resolve_device(store.config.device)
    threads = image_splits.decoding_threads(store.config.dataset.num_workers)
    _prepare(store, missing, device, threads)
    engine = engines.current()
    files = [member.network(store.workspace).checkpoint for member, _ in missing]
    is_local = engine.name == engines.Local.name
    next_files = [*files[1:], None] if is_local else [None] * len(files)
    start = time.monotonic()
    finished = engine.map(
        _extract_member,
        [(member, gaps, next_file) for (member, gaps), next_file in zip(missing, next_files, strict=True)],
        shared=(store, engine.worker_device(device), threads),
        threads_per_job=job_threads(store, [member for member, _ in missing], device),
        gpu=GPU_SHARE if device != "cpu" else 0.0,
    )
    for number, ((member, gaps), _) in enumerate(zip(missing, finished, strict=True), start=1):
        seconds_left = (time.monotonic() - start) / number * (len(missing) - number)
        logger.info(
            "[%d/%d] streamed %s over %s; about %.0f s left", number, len(missing), member.name, gaps, seconds_left
        )
    val_rows = {member.name: store.rows(member, "val") for member, gaps in missing if "val" in gaps}
    outputs = {name: (rows.logits, rows.labels) for name, rows in val_rows.items()}
    rule = store.config.dataset.group_regex
    groups = {
        split: row_groups.count_groups(store.workspace, rule, store.images(split)) if outputs else None
        for split in ("train", "val")
    }
    store.catalog = inspection.record_val_measurements(store.workspace, store.catalog, store.digests, outputs, groups)
    store.digests.save()


def _gaps(store: Store, member: Member, splits: Sequence[str]) -> list[str]:
    """The requested splits, and train if it has out-of-sample rows, that are not stored for a member."""
    of_train = ["train"] if "val" in splits and training_data.predicts_unseen_train_rows(store, member) else []
    return [split for split in dict.fromkeys([*splits, *of_train]) if not store.is_stored(member, split)]


def job_threads(store: Store, members: Sequence[Member], device: str) -> int | None:
    """Number of threads of the largest network, which is the number of cores per job on a cluster; None on a GPU."""
    if device != "cpu":
        return None
    rule = base_back.load_bundled("threads")
    numbers = [
        rule.number_of_threads("streaming", n_bytes // FLOAT_BYTES, img_size)
        for n_bytes, img_size in network_sizes(store, members)
    ]
    return max([1, *numbers])


def n_processes(store: Store, members: Sequence[Member], device: str) -> int:
    """Number of processes among which members can be divided, each with one network at a time.

    1 unless all networks use one thread of the CPU and processes can be forked.
    """
    if device != "cpu" or not worker_processes.can_fork():
        return 1
    return engines.cores() if use_one_thread(network_sizes(store, members)) else 1


def network_sizes(store: Store, members: Sequence[Member]) -> list[tuple[int, int]]:
    """(bytes of the checkpoint, input size in px) of each member's network whose file exists."""
    specs = [member.network(store.workspace) for member in members]
    return [(spec.checkpoint.stat().st_size, spec.img_size) for spec in specs if spec.checkpoint.is_file()]


def use_one_thread(sizes: Iterable[tuple[int, int]]) -> bool:
    """Whether networks of these sizes (bytes of the checkpoint, input size in px) all use one thread on the CPU.

    A forked process must: an operation of two threads never ends there once its parent has run one.
    """
    rule = base_back.load_bundled("threads")
    return all(rule.number_of_threads("streaming", n_bytes // HALF_BYTES, img_size) == 1 for n_bytes, img_size in sizes)


def _prepare(store: Store, missing: Sequence[tuple[Member, list[str]]], device: str, threads: int) -> None:
    """Decode the images that the members need and log the estimated duration of the pass."""
    config, workspace = store.config, store.workspace
    sizes = {member.img_size for member, _ in missing if member.img_size is not None}
    if sizes != {config.dataset.img_size} and not sizes <= store.warned_sizes:
        store.warned_sizes |= sizes
        logger.warning(
            "dataset.img_size is %d; the checkpoints were trained at %s px, which is what is used",
            config.dataset.img_size,
            ", ".join(map(str, sorted(sizes))),
        )
    splits = sorted({split for _, gaps in missing for split in gaps})
    images = [store.images(split) for split in splits]
    preprocessings = [member.image_preprocessing for member, _ in missing]
    image_splits.decode(images, preprocessings, image_cache=workspace.image_cache, threads=threads)
    files = [member.network(workspace).checkpoint for member, _ in missing]
    expected = estimates.estimate_extraction(
        [path.stat().st_size for path in files if path.is_file()],
        sum(store.catalog.splits[split]["n"] for split in splits),
        batch_size=config.dataset.batch_size,
        img_size=max(sizes),
        on_cuda=device != "cpu",
    )
    logger.info("streaming %d member(s) over %s: %s", len(missing), ", ".join(splits), expected)


def _extract_member(store: Store, device: str, threads: int, job: tuple[Member, Sequence[str], Path | None]) -> None:
    """Run one member on its missing splits, while `next_file`, if any, is read into the page cache."""
    member, splits, next_file = job
    catalog.check_current(store.workspace, member, store.digests)
    images = [store.images(split) for split in splits]
    total = sum(len(split.paths) for split in images)
    with reading_ahead(next_file), progress_bar(total, member.name) as advance:
        batches = output_writing.stream_member(store, member, images, kept=images, device=device, threads=threads)
        for batch in batches:
            advance(len(batch.logits))
