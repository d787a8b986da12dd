"""`predict --maps`: a picture of each class-activation map, and a table of all maps."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from utils.activation_maps.background import background_sentence
from utils.activation_maps.map_maker import MapMaker
from utils.activation_maps.overlays import overlay
from utils.core.artifacts import replacing, write_text
from utils.core.errors import UserError
from utils.evaluation.report import report_audit
from utils.evaluation.table_formats import csv_text
from utils.inference.classifier import BlockPredictions, WorkspaceClassifier, content_digests

LEAST_SIDE = 224  # minimum side of a picture in pixels; smaller images are enlarged
TABLE = "maps.csv"


class MappingClassifier:
    """A classifier that also writes the map of each image for the class that it predicts."""

    def __init__(self, classifier: WorkspaceClassifier, folder: Path) -> None:
        """Raises UserError for a folder that is a file."""
        if folder.exists() and not folder.is_dir():
            raise UserError(f"--maps {folder}: a file; expected a folder, which is created if it does not exist")
        self.classifier, self.folder = classifier, folder
        self.maker = MapMaker(classifier.store, classifier.name, classifier.members)
        self.classes, self.version = classifier.classes, classifier.version
        self.n_networks, self.block_size = classifier.n_networks, min(classifier.block_size, 256)
        self._rows: list[list[str]] = []
        self._outside: list[float] = []

    def predict_block(self, paths: Sequence[Path], step: Callable[[int], None]) -> BlockPredictions:
        """Like the classifier's; also write the pictures of the block, and the table of all maps so far."""
        predictions = self.classifier.predict_block(paths, step)
        readable = [paths[index] for index in predictions.readable.tolist()]
        if not readable:
            return predictions
        targets = predictions.probabilities.argmax(axis=1)
        contents, unread = content_digests(readable)
        if unread:  # files removed since their prediction
            keep = [row for row in range(len(readable)) if row not in unread]
            readable, contents = [readable[row] for row in keep], tuple(contents[row] for row in keep)
            targets = targets[keep]
        for path, target, image_map in zip(
            readable, targets, self.maker.maps(readable, contents, targets), strict=True
        ):
            file = self.folder / picture_name(path)
            _save(file, overlay(image_map))
            self._outside.append(image_map.outside_centre)
            self._rows.append([os.fspath(path), file.name, self.classes[target], f"{image_map.outside_centre:.4f}"])
        _write_table(self.folder / TABLE, self._rows)
        return predictions

    def summary(self) -> list[str]:
        """The share of the maps outside the centre and, if the audit agrees, that the model depends on the background.

        Raises UserError for a damaged record of the audit.
        """
        if not self._outside:
            return []
        outside = sum(self._outside) / len(self._outside)
        lines = [f"maps: {self.folder}, {outside:.0%} of their mass outside the central half of the image on average"]
        store = self.classifier.store
        audit = report_audit.current_record(store.workspace, store.catalog)
        sentence = background_sentence(self.classifier.name, outside, (audit or {"probes": []})["probes"])
        return [*lines, sentence] if sentence else lines


def picture_name(path: Path) -> str:
    """Name of an image's picture; images with the same name in different folders have different pictures."""
    digest = hashlib.sha256(os.fsencode(path.absolute())).hexdigest()[:8]
    return f"{path.stem.encode('utf-8', 'replace').decode()}-{digest}.png"


def _save(path: Path, pixels: np.ndarray) -> None:
    from PIL import Image

    image = Image.fromarray(pixels)
    if image.width < LEAST_SIDE:
        factor = -(-LEAST_SIDE // image.width)
        image = image.resize((factor * image.width, factor * image.height), Image.Resampling.NEAREST)
    with replacing(path) as temporary:
        image.save(temporary, "PNG")


def _write_table(path: Path, rows: Sequence[Sequence[str]]) -> None:
    text = csv_text(("path", "map", "class", "outside_centre"), rows)
    write_text(path, text.encode("utf-8", "backslashreplace").decode())
