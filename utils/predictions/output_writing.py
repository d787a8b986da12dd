"""Writes the outputs of members' networks to the prediction store while they are computed."""

from __future__ import annotations

import itertools
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from operator import attrgetter
from pathlib import Path

import numpy as np

from utils.core.artifacts import preallocate, replacing
from utils.core.links import remove_file
from utils.predictions import streaming
from utils.predictions.catalog import Member
from utils.predictions.image_splits import ImageSplit
from utils.predictions.store import Store, embeddings_name
from utils.predictions.streaming import OutputBatch


def stream_member(
    store: Store,
    member: Member,
    images: Sequence[ImageSplit],
    *,
    kept: Sequence[ImageSplit],
    device: str,
    threads: int,
    stage: str | None = None,
) -> Iterator[OutputBatch]:
    """`streaming.stream` of a member, or of another of its stages; outputs for the splits `kept` are stored.

    `kept` are those of `images` that are whole splits. Their arrays are written to temporary files, which are renamed
    when a split is complete; an iterator that is not exhausted leaves none. `threads`: number of decoding threads.
    """
    batches = streaming.stream(
        member.network(store.workspace, stage),
        images,
        batch_size=store.config.dataset.batch_size,
        device=device,
        image_cache=store.workspace.image_cache,
        decoding_threads=threads,
        val=store.images("val"),
    )
    by_name = {split.split: split for split in kept}
    for name, of_split in itertools.groupby(batches, key=attrgetter("split")):
        if name in by_name:
            of_split = _stored_split(store, member, by_name[name], of_split, device)
        yield from of_split


def _stored_split(
    store: Store, member: Member, images: ImageSplit, batches: Iterator[OutputBatch], device: str
) -> Iterator[OutputBatch]:
    start = time.monotonic()
    n, order = len(images.paths), [member.classes.index(name) for name in store.catalog.classes]
    folder = store.workspace.predictions(member.name, images.split)
    embeddings_path = store.workspace.embeddings(member.name, embeddings_name(member, images.split))
    remove_file(folder / "record.json")
    remove_file(embeddings_path)
    first_batch = next(batches)
    width = first_batch.embeddings.shape[1]
    with ExitStack() as stack:
        logits = _growing_array(stack, folder / "logits.npy", (n, len(order)))
        embeddings = _growing_array(stack, embeddings_path, (n, width)) if width else None
        for batch in itertools.chain([first_batch], batches):
            rows = slice(batch.start, batch.start + len(batch.logits))
            logits[rows] = batch.logits[:, order]
            if embeddings is not None:
                embeddings[rows] = batch.embeddings
            yield batch
        logits.flush()
        if embeddings is not None:
            embeddings.flush()
    facts = {
        "device": device,
        "threads": first_batch.threads,
        "batch_size": batch.batch_size,
        "seconds": round(time.monotonic() - start, 3),
        "width": width,
    }
    store.complete_rows(member, store.samples(images.split), facts)


def _growing_array(stack: ExitStack, path: Path, shape: tuple[int, int]) -> np.memmap:
    """A float32 array on disk in a temporary file, which is renamed to `path` when the stack exits without an error."""
    temporary = stack.enter_context(replacing(path))
    array = np.lib.format.open_memmap(temporary, mode="w+", dtype=np.float32, shape=shape)
    preallocate(temporary, array.offset)
    return array
