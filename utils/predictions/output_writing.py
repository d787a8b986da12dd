"""Outputs of a network, written into the prediction store while they are computed."""

from __future__ import annotations

import itertools
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack
from operator import attrgetter
from pathlib import Path

import numpy as np

from utils.core.artifacts import preallocate, replacing
from utils.core.links import remove_file
from utils.predictions.catalog import Member
from utils.predictions.image_splits import ImageSplit
from utils.predictions.store import Store, embeddings_name
from utils.predictions.streaming import OutputBatch


def stored(
    store: Store, member: Member, splits: Sequence[ImageSplit], batches: Iterable[OutputBatch], *, device: str
) -> Iterator[OutputBatch]:
    """The batches of a member's full network, of which those of `splits` are written into the store on the way.

    `splits` are whole splits of the store. Their arrays grow on disk under temporary names and appear when a split is
    complete; those of an iterator that is not exhausted do not appear.
    """
    by_name = {images.split: images for images in splits}
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
    first = next(batches)
    width = first.embeddings.shape[1]
    with ExitStack() as stack:
        logits = _growing_array(stack, folder / "logits.npy", (n, len(order)))
        embeddings = _growing_array(stack, embeddings_path, (n, width)) if width else None
        for batch in itertools.chain([first], batches):
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
        "threads": first.threads,
        "batch_size": batch.batch_size,
        "seconds": round(time.monotonic() - start, 3),
        "width": width,
    }
    store.complete_rows(member, store.samples(images.split), facts)


def _growing_array(stack: ExitStack, path: Path, shape: tuple[int, int]) -> np.memmap:
    """A float32 array that is filled on disk and takes its name when the stack ends well."""
    temporary = stack.enter_context(replacing(path))
    array = np.lib.format.open_memmap(temporary, mode="w+", dtype=np.float32, shape=shape)
    preallocate(temporary, array.offset)
    return array
