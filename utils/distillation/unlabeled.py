"""Unlabeled images: a folder of any depth, on which a student learns only from its teacher."""

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

CONFIG_KEY = "distillation.unlabeled_dir"
ID_PREFIX = "unlabeled:"  # distinguishes their ids from those of the splits


def unlabeled_images(store: Store) -> ImageSplit | None:
    """The images of the configured folder, sorted by path; None if none is configured.

    Duplicates and images that are also in train or val are omitted with a warning, since val must remain unseen.

    Raises UserError for a folder that is missing, has no image, or has an image with the content of a test image.
    """
    configured = store.config.distillation.unlabeled_dir
    if configured is None:
        return None
    folder = Path(configured).expanduser().absolute()
    if not folder.is_dir():
        raise UserError(f"{CONFIG_KEY} {configured}: no such folder; expected one that holds images, at any depth")
    suffixes = base_back.load_bundled("samples").SUFFIXES
    paths = sorted(path for path in folder.rglob("*") if path.suffix.lower() in suffixes and path.is_file())
    if not paths:
        raise UserError(
            f"{CONFIG_KEY} {configured}: no image in it ({', '.join(suffixes)}); add some, or set it to null"
        )
    contents = [store.digests.of(path) for path in paths]
    in_test = set(store.images("test").contents)
    leaked = [path for path, content in zip(paths, contents, strict=True) if content in in_test]
    if leaked:
        raise UserError(
            f"{CONFIG_KEY} {configured}: {len(leaked)} of {len(paths)} images have the content of a test image, first "
            f"{leaked[0]}; a student trained on them would have no test. Remove them from the folder, or set it to null"
        )
    in_splits = {content for split in SPLITS for content in store.images(split).contents}
    first_index = {content: index for index, content in reversed(list(enumerate(contents)))}
    selected = [
        index for index, content in enumerate(contents) if content not in in_splits and first_index[content] == index
    ]
    if len(selected) < len(paths):
        logger.warning(
            "%s: %d of %d images are duplicates or in the splits, and are left out",
            *(configured, len(paths) - len(selected), len(paths)),
        )
    if not selected:
        raise UserError(f"{CONFIG_KEY} {configured}: all {len(paths)} images are in the splits already; set it to null")
    selected_contents = tuple(contents[index] for index in selected)
    return ImageSplit(
        split="unlabeled",
        classes=store.catalog.classes,
        sample_ids=tuple(ID_PREFIX + paths[index].relative_to(folder).as_posix() for index in selected),
        labels=np.full(len(selected), UNKNOWN, dtype=np.int64),
        paths=tuple(paths[index] for index in selected),
        contents=selected_contents,
        digest=digest_of(sorted(selected_contents)),
    )


def append_unlabeled(train: ImageSplit, unlabeled: ImageSplit | None) -> ImageSplit:
    """The train images followed by the unlabeled ones."""
    if unlabeled is None:
        return train
    return replace(
        train,
        sample_ids=train.sample_ids + unlabeled.sample_ids,
        labels=np.concatenate([train.labels, unlabeled.labels]),
        paths=train.paths + unlabeled.paths,
        contents=train.contents + unlabeled.contents,
        digest=digest_of([train.digest, unlabeled.digest]),
    )
