"""The images of an external set, in any layout that the base pipeline reads: class or split folders, or a manifest."""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from utils import base_back
from utils.core.artifacts import FileDigests, digest_of
from utils.core.display_text import printable
from utils.core.errors import ConfigError, UserError
from utils.core.workspace import EXTERNAL
from utils.predictions.image_splits import ImageSplit

logger = logging.getLogger("disease_pipeline")

NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
PREDICT = "Images without labels are classified by: python ensemble_orchestrator.py predict"


@dataclass(frozen=True)
class LabelledImages:
    """Images with the class names of their source."""

    source: Path
    classes: tuple[str, ...]
    """Class names of the source"""
    names: tuple[str, ...]
    """Path of each image relative to the source, with `/`"""
    labels: np.ndarray
    """int64 (N,), indices into `classes`"""
    paths: tuple[Path, ...]
    contents: tuple[str, ...]
    """SHA-256 of each file"""
    groups: tuple[str | None, ...]
    """Name of each image's group, or None if the source has none"""
    unreadable: Mapping[str, str]
    """{image: reason} of unreadable files, which are not among the N images"""

    def take(self, rows: Sequence[int] | np.ndarray) -> LabelledImages:
        """The images at indices `rows`."""
        return LabelledImages(
            self.source,
            self.classes,
            tuple(self.names[row] for row in rows),
            self.labels[rows],
            tuple(self.paths[row] for row in rows),
            tuple(self.contents[row] for row in rows),
            tuple(self.groups[row] for row in rows),
            self.unreadable,
        )

    def counts(self) -> dict[str, int]:
        """{class of the source: number of images}."""
        counts = np.bincount(self.labels, minlength=len(self.classes)).tolist()
        return dict(zip(self.classes, counts, strict=True))

    def as_split(self, name: str, classes: tuple[str, ...], labels: np.ndarray) -> ImageSplit:
        """The images as the split of an external set, with labels (N,) as indices into `classes`."""
        labels = labels.astype(np.int64)
        digest = digest_of([list(classes), list(self.names), list(self.contents), labels.tolist()])
        return ImageSplit(EXTERNAL + name, classes, self.names, labels, self.paths, self.contents, digest)


def read_labelled_images(source: Path, digests: FileDigests) -> LabelledImages:
    """List a folder or a CSV manifest; all of its splits count as one set.

    Raises UserError for a source without labelled images.
    """
    image_sets = base_back.load_bundled("image_sets")
    try:
        listed = image_sets.open_image_set(source, fewest_classes=1)
    except (OSError, ValueError) as error:
        raise UserError(f"evaluate --data {error}. {PREDICT}") from error
    for note in listed.notes:
        logger.warning("evaluate --data: %s", note)
    kept, contents, unreadable = [], [], {}
    for row, (sample, name) in enumerate(zip(listed.samples, listed.names, strict=True)):
        try:
            name.encode()  # records are UTF-8
            contents.append(digests.of(sample.path))
            kept.append(row)
        except UnicodeEncodeError:
            unreadable[printable(name)] = "its name is not UTF-8; rename the file"
        except (OSError, ValueError) as error:
            unreadable[name] = getattr(error, "strerror", None) or str(error)
    samples = [listed.samples[row] for row in kept]
    return LabelledImages(
        source,
        tuple(listed.classes),
        tuple(listed.names[row] for row in kept),
        np.array([sample.label for sample in samples], dtype=np.int64),
        tuple(sample.path for sample in samples),
        tuple(contents),
        tuple(sample.group for sample in samples),
        unreadable,
    )


def set_name(source: Path, requested: str | None) -> str:
    """The name of a set: the requested one, or that of its folder or manifest.

    Raises ConfigError for a requested name that is not a valid folder name.
    """
    if requested is not None:
        if not NAME.fullmatch(requested):
            raise ConfigError(
                f"evaluate --name {requested!r}: expected at most 64 letters, digits and '._-', such as field_2024"
            )
        return requested
    source = Path(os.path.abspath(source))
    stem = source.name
    if source.suffix.lower() == ".csv":
        stem = source.stem if source.stem.lower() != "metadata" else source.parent.name
    name = re.sub(r"[^A-Za-z0-9._-]+", "-", stem).strip("-._")[:64]
    return name or "external"
