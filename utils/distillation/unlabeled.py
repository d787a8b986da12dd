"""Images without labels: a folder of any depth, from which a student learns what its teacher says of them."""

from __future__ import annotations

import logging
from dataclasses import replace
from pathlib import Path

import numpy as np

from utils import base_back
from utils.core.artifacts import digest_of
from utils.core.errors import UserError
from utils.core.workspace import SPLITS
from utils.predictions.image_splits import ImageSplit
from utils.predictions.rows import UNKNOWN
from utils.predictions.store import Store

logger = logging.getLogger("disease_pipeline")

PLACE = "distillation.unlabeled_dir"
PREFIX = "unlabeled:"  # of their ids, so that none is that of an image of the splits


def find(store: Store) -> ImageSplit | None:
    """The images of the configured folder, sorted; None where none is configured.

    One that is also an image of the splits is left out, which is said: val and test must stay unseen, and train has it.
    Raises UserError for a folder that is missing or holds no image.
    """
    given = store.config.distillation.unlabeled_dir
    if given is None:
        return None
    folder = Path(given).expanduser().absolute()
    if not folder.is_dir():
        raise UserError(f"{PLACE} {given}: no such folder; expected one that holds images, at any depth")
    suffixes = base_back.load_bundled("samples").SUFFIXES
    paths = sorted(path for path in folder.rglob("*") if path.suffix.lower() in suffixes and path.is_file())
    if not paths:
        raise UserError(f"{PLACE} {given}: no image in it ({', '.join(suffixes)}); add some, or set it to null")
    contents = [store.digests.of(path) for path in paths]
    known = {content for split in SPLITS for content in store.images(split).contents}
    first = {content: place for place, content in reversed(list(enumerate(contents)))}
    chosen = [place for place, content in enumerate(contents) if content not in known and first[content] == place]
    if len(chosen) < len(paths):
        left_out = len(paths) - len(chosen)
        logger.warning("%s: %d of %d images are in the splits, or twice, and are left out", given, left_out, len(paths))
    if not chosen:
        raise UserError(f"{PLACE} {given}: all {len(paths)} images are in the splits already; set it to null")
    ids = tuple(PREFIX + paths[place].relative_to(folder).as_posix() for place in chosen)
    own = tuple(contents[place] for place in chosen)
    return ImageSplit(
        split="unlabeled",
        classes=store.catalog.classes,
        sample_ids=ids,
        labels=np.full(len(chosen), UNKNOWN, dtype=np.int64),
        paths=tuple(paths[place] for place in chosen),
        contents=own,
        digest=digest_of(sorted(own)),
    )


def joined(train: ImageSplit, others: ImageSplit | None) -> ImageSplit:
    """Train images, then those without labels."""
    if others is None:
        return train
    return replace(
        train,
        sample_ids=train.sample_ids + others.sample_ids,
        labels=np.concatenate([train.labels, others.labels]),
        paths=train.paths + others.paths,
        contents=train.contents + others.contents,
        digest=digest_of([train.digest, others.digest]),
    )
