"""`predict`: class, probability, prediction set, abstention and disagreement of image files."""

from __future__ import annotations

import hashlib
import logging
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from utils.building import ensembles
from utils.building.command_hints import build_command
from utils.core.array_archives import physical_memory
from utils.core.config import Config
from utils.core.display_text import printable
from utils.core.errors import ConfigError, UserError
from utils.core.progress_bar import progress_bar
from utils.core.regular_files import open_regular
from utils.core.results import Result
from utils.core.workspace import Workspace
from utils.evaluation import recommended_names
from utils.inference import image_paths
from utils.inference.classifier import BlockPredictions, WorkspaceClassifier
from utils.inference.map_pictures import MappingClassifier
from utils.inference.output_files import PredictionFile, RecordFormat
from utils.inference.prediction_progress import PredictionProgress
from utils.inference.thresholds import Thresholds, load_thresholds
from utils.predictions import catalog, view_members
from utils.predictions.store import Store

logger = logging.getLogger("disease_pipeline")

N_DIGITS = 6
MAX_IMAGES_ON_SCREEN = 10_000
"""Larger numbers of images need an output file, which can be continued."""
MAX_PROBLEMS_NAMED = 5  # in messages


class Classifier(Protocol):
    """Predicts image files: the members' networks in a workspace, or an exported file."""

    version: str
    """Name and digest; a file contains predictions of one version only."""
    classes: tuple[str, ...]

    @property
    def n_networks(self) -> int:
        """Number of networks that run on every image."""

    @property
    def block_size(self) -> int:
        """Number of images per block."""

    def predict_block(self, paths: Sequence[Path], step: Callable[[int], None]) -> BlockPredictions:
        """Predict the images of one block; `step(n_images)` is called after every batch of every network."""


def predict(
    config: Config,
    workspace: Workspace,
    *,
    paths: Sequence[str],
    model_name: str,
    to: str | None = None,
    form: str | None = None,
    probabilities: bool = False,
    sets: str = "lac",
    tta: bool = False,
    maps: str | None = None,
    append: bool = False,
    spreadsheet_safe: bool = False,
    force: bool = False,
) -> Result:
    """Predict images, to the file `to` or, up to 10,000 images, to the screen.

    `form` is csv or jsonl, by default according to the suffix of `to`. `probabilities` adds those of all classes, and
    `sets` is the kind of prediction sets: lac, aps or raps. With `tta` the model averages over the views selected for
    it. `maps` is a folder for pictures of class-activation maps. With `append` the file is continued: images with a
    prediction are skipped, and images with an error are tried again. An image that cannot be read has a record with its
    error and is a failure of the result. Raises UserError without images, for a model that cannot be run, has no views
    with `tta` or no map with `maps`, and for an existing file that may be neither continued nor replaced.
    """
    output = OutputOptions(to, form, probabilities, append, spreadsheet_safe, force)
    listing = image_paths.list_images(paths, sys.stdin.buffer)
    store = Store(config, workspace, catalog.load(workspace))
    model_name = recommended_names.resolve(store, model_name)
    model_name = model_with_views(store, model_name) if tta else model_name
    classifier = WorkspaceClassifier(store, model_name)
    thresholds = load_thresholds(workspace, model_name, is_ensemble=classifier.ensemble is not None, sets=sets)
    if not maps:
        return _predict_listing(classifier, thresholds, listing, paths, output)
    mapping = MappingClassifier(classifier, Path(maps).expanduser())
    result = _predict_listing(mapping, thresholds, listing, paths, output)
    for line in mapping.summary():
        logger.info("%s", line)
    return result


def predict_from_export(
    *,
    paths: Sequence[str],
    from_export: str,
    to: str | None = None,
    form: str | None = None,
    probabilities: bool = False,
    sets: str = "lac",
    tta: bool = False,
    maps: str | None = None,
    append: bool = False,
    spreadsheet_safe: bool = False,
    force: bool = False,
) -> Result:
    """Predict images with an exported ONNX file, without workspace, torch and base pipeline.

    The file has no thresholds, so `set` and `abstain` are empty. Raises UserError like `predict`, and for a file that
    `export` did not write; ConfigError for `tta` and `maps`.
    """
    from utils.inference.onnx_prediction import SUFFIXES

    output = OutputOptions(to, form, probabilities, append, spreadsheet_safe, force)
    if tta:
        raise ConfigError("--tta: the views of an exported model are in its file; expected --model-name with it")
    if maps:
        raise ConfigError("--maps: an exported file gives no gradients to make maps of; expected --model-name with it")
    listing = image_paths.list_images(paths, sys.stdin.buffer, SUFFIXES)
    classifier = ExportClassifier(Path(from_export).expanduser())
    return _predict_listing(classifier, Thresholds(sets, None, None), listing, paths, output)


def model_with_views(store: Store, name: str) -> str:
    """The model that averages over views: the ensemble if one of its members does, or the member's version with views.

    Raises UserError, with the command that selects views, for a model without any.
    """
    members = store.catalog.members
    if name in ensembles.names(store.workspace):
        parts = [members[part] for part in ensembles.load(store.workspace, name).members if part in members]
        if any(part.views for part in parts):
            return name
        remedy = f"Build it on members with views: {build_command(name)} --set tta.enable=true --force"
        raise UserError(f"--tta: no member of {name} averages over views. {remedy}")
    if name not in members or members[name].views:
        return name
    with_views = view_members.name_with_views(name)
    if with_views in members:
        return with_views
    if view_members.record_of(store.workspace, name) is not None:
        raise UserError(f"--tta: out-of-sample rows gain by no views of {name}. Predict without --tta")
    choose = "python ensemble_orchestrator.py build-ensemble --set tta.enable=true"
    raise UserError(f"--tta: no views were chosen for {name} yet. Let its out-of-sample rows choose: {choose}")


@dataclass(frozen=True)
class OutputOptions:
    """Destination and format of predictions.

    Raises UserError for `append` without a file, and ConfigError for options that exclude each other.
    """

    to: str | None
    form: str | None
    probabilities: bool
    append: bool
    spreadsheet_safe: bool
    force: bool

    def __post_init__(self) -> None:
        if self.append and self.to is None:
            raise UserError("--append: expected together with --to FILE, which it continues")
        if self.spreadsheet_safe and (self.append or (self.form or _format_of_suffix(self.to)) != "csv"):
            raise ConfigError(
                "--spreadsheet-safe: changes paths, by which --append continues a file; expected CSV without --append"
            )

    def record_format(self, classes: tuple[str, ...]) -> RecordFormat:
        """Format of the records of a model with these classes."""
        columns = classes if self.probabilities else None
        return RecordFormat(self.form or _format_of_suffix(self.to), columns, self.spreadsheet_safe)


class ExportClassifier:
    """Predicts with an exported ONNX file, in onnxruntime."""

    n_networks, block_size = 1, 1024

    def __init__(self, path: Path) -> None:
        """Open the file. Raises UserError for a file that `export` did not write, or that does not take images."""
        from utils.inference.graph_checks import require_bounded
        from utils.inference.onnx_prediction import ExportedModel

        try:
            with open_regular(path) as file:
                digest = hashlib.file_digest(file, "sha256").hexdigest()
            require_bounded(path)
            self.model = ExportedModel(path, max_bytes=physical_memory() // 4)
        except OSError as error:
            raise UserError(f"--from-export {path}: {error.strerror}; expected an exported .onnx file") from error
        except ValueError as error:
            raise UserError(f"--from-export {error}") from error
        self.classes = tuple(self.model.classes)
        self.version = f"{path.stem}@{digest[:12]}"

    def predict_block(self, paths: Sequence[Path], step: Callable[[int], None]) -> BlockPredictions:
        """Predict image files; `step(n_images)` is called after every batch.

        Raises UserError for outputs that are not one row of probabilities per image.
        """
        rows: dict[int, np.ndarray] = {}
        problems: dict[int, str] = {}
        for start in range(0, len(paths), self.model.batch_size):
            images: dict[int, tuple[np.ndarray, ...]] = {}
            for index, path in enumerate(paths[start : start + self.model.batch_size], start):
                try:
                    images[index] = self.model.prepare(path)
                except ValueError as error:
                    problems[index] = str(error).removeprefix(f"{path}: ")
            if images:
                try:
                    probabilities = self.model.run_by_shape(list(images.values()))
                except ValueError as error:
                    raise UserError(f"--from-export {error}") from error
                rows |= zip(images, probabilities, strict=True)
                step(len(images))
        values = np.stack(list(rows.values())) if rows else np.empty((0, len(self.classes)))
        return BlockPredictions(np.array(list(rows), dtype=np.int64), values.astype(np.float64), None, problems)


def _predict_listing(
    classifier: Classifier,
    thresholds: Thresholds,
    listing: image_paths.ImageListing,
    paths: Sequence[str],
    output: OutputOptions,
) -> Result:
    failures = [f"{printable(name)}: no image in it" for name in listing.empty]
    if not listing.paths:
        raise UserError(
            f"{', '.join(map(printable, paths))}: no image found; expected image files, folders or patterns"
        )
    record_format = output.record_format(classifier.classes)
    if output.to is None:
        return _predict_to_screen(classifier, thresholds, listing.paths, record_format, failures)
    requested = {str(path) for path in listing.paths}
    file = PredictionFile(
        Path(output.to).expanduser(),
        record_format,
        classifier.version,
        append=output.append,
        replace=output.force,
        requested=requested,
    )
    remaining = [path for path in listing.paths if str(path) not in file.done]
    n_done = len(listing.paths) - len(remaining)
    if n_done:
        logger.info("%d of %d images have a prediction in %s", n_done, len(listing.paths), file.path)
    problems: list[str] = []
    with closing(file):
        for records, lines in _predict_blocks(classifier, thresholds, remaining, record_format):
            file.add(lines)
            problems += _problems_of(records)
    n_predicted = len(remaining) - len(problems)
    document = {"file": str(file.path), "images": len(listing.paths), "answered": n_predicted}
    document |= {"model": classifier.version, "unreadable": len(problems)}
    name = classifier.version.rpartition("@")[0]
    text = f"{name}: {n_predicted} of {len(remaining)} images predicted\nwritten: {file.path}"
    return Result(text, document, failures + _named_problems(problems))


def _format_of_suffix(to: str | None) -> str:
    return "jsonl" if to is not None and to.lower().endswith((".jsonl", ".ndjson")) else "csv"


def _predict_to_screen(
    classifier: Classifier,
    thresholds: Thresholds,
    paths: Sequence[Path],
    record_format: RecordFormat,
    failures: list[str],
) -> Result:
    if len(paths) > MAX_IMAGES_ON_SCREEN:
        raise UserError(
            f"{len(paths):,} images: more than {MAX_IMAGES_ON_SCREEN:,} need a file; name it with --to FILE"
        )
    records: list[dict[str, Any]] = []
    text = record_format.header
    for block_records, lines in _predict_blocks(classifier, thresholds, paths, record_format):
        records += block_records
        text += "".join(lines)
    document = {"model": classifier.version, "images": [record_format.as_document(record) for record in records]}
    # A terminal accepts only text, so bytes of a name that are not UTF-8 are escaped.
    text = text.rstrip("\n").encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")
    return Result(text, document, failures + _named_problems(_problems_of(records)))


def _predict_blocks(
    classifier: Classifier, thresholds: Thresholds, paths: Sequence[Path], record_format: RecordFormat
) -> Iterator[tuple[list[dict[str, Any]], list[str]]]:
    """Records and their lines, block by block."""
    with progress_bar(len(paths) * classifier.n_networks, "predict") as advance:
        progress = PredictionProgress(len(paths), classifier.n_networks, advance)
        for start in range(0, len(paths), classifier.block_size):
            block = paths[start : start + classifier.block_size]
            predictions = valid_predictions(classifier, classifier.predict_block(block, progress.step))
            records = _records(
                classifier, thresholds, block, predictions, with_probabilities=record_format.classes is not None
            )
            yield records, [record_format.format_record(record) for record in records]
            progress.end_block(min(start + len(block), len(paths)))


def valid_predictions(classifier: Classifier, predictions: BlockPredictions) -> BlockPredictions:
    """The predictions whose probabilities are valid; an invalid row becomes a problem of its image.

    Raises UserError for an array of another shape.
    """
    from utils.inference.onnx_prediction import check_shape, row_problems

    try:
        check_shape(predictions.probabilities, len(predictions.readable), len(classifier.classes))
    except ValueError as error:
        raise UserError(f"{classifier.version}: {error}") from error
    reasons = row_problems(predictions.probabilities)
    if not reasons:
        return predictions
    valid = [row for row in range(len(predictions.readable)) if row not in reasons]
    return BlockPredictions(
        predictions.readable[valid],
        predictions.probabilities[valid],
        None if predictions.disagreement is None else predictions.disagreement[valid],
        predictions.problems | {int(predictions.readable[row]): reason for row, reason in reasons.items()},
    )


def _records(
    classifier: Classifier,
    thresholds: Thresholds,
    paths: Sequence[Path],
    predictions: BlockPredictions,
    *,
    with_probabilities: bool,
) -> list[dict[str, Any]]:
    """One record per image, in the format of `output_files`."""
    row_of = {int(index): row for row, index in enumerate(predictions.readable)}
    readable = [paths[index] for index in predictions.readable.tolist()]
    decisions = thresholds.apply(predictions.probabilities, classifier.classes, readable)
    records = []
    for index, path in enumerate(paths):
        record: dict[str, Any] = {"path": str(path), "class": None, "probability": None, "set": None, "abstain": None}
        record |= {"disagreement": None, "model": classifier.version, "error": predictions.problems.get(index)}
        rounded = None
        if index in row_of:
            row = row_of[index]
            probabilities = predictions.probabilities[row]
            rounded = [round(float(value), N_DIGITS) for value in probabilities]
            top = int(probabilities.argmax())
            record |= {"class": classifier.classes[top], "probability": rounded[top]} | decisions[row]
            if predictions.disagreement is not None and not np.isnan(predictions.disagreement[row]):
                record["disagreement"] = round(float(predictions.disagreement[row]), N_DIGITS)
        if with_probabilities:
            record["probabilities"] = rounded
        records.append(record)
    return records


def _problems_of(records: Sequence[Mapping[str, Any]]) -> list[str]:
    return [
        f"{printable(record['path'])}: {printable(record['error'])}"
        for record in records
        if record["error"] is not None
    ]


def _named_problems(problems: Sequence[str]) -> list[str]:
    """The first problems, and the number of the remaining ones."""
    n_more = len(problems) - MAX_PROBLEMS_NAMED
    summary = [f"{n_more} more images without a prediction; each record holds the error"] if n_more > 0 else []
    return [*problems[:MAX_PROBLEMS_NAMED], *summary]
