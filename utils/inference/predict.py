"""`predict`: class, probability, conformal set, abstention and disagreement for image files without labels."""

from __future__ import annotations

import hashlib
import logging
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from utils.core.artifacts import read_record
from utils.core.config import Config
from utils.core.display_text import printable
from utils.core.errors import UserError
from utils.core.results import Result
from utils.core.workspace import Workspace
from utils.inference import image_paths
from utils.inference.classifier import BlockPredictions, WorkspaceClassifier
from utils.inference.output_files import PredictionFile, RecordFormat
from utils.numeric import uncertainty
from utils.predictions import catalog
from utils.predictions.store import Store

logger = logging.getLogger("disease_pipeline")

N_DIGITS = 6
MAX_IMAGES_ON_SCREEN = 10_000  # images; more need a file, which can be continued
MAX_PROBLEMS_NAMED = 5  # images without an answer in messages
PROGRESS_SECONDS = 10.0  # seconds between two lines of progress


class Classifier(Protocol):
    """What answers for image files: the members in a workspace, or an exported file."""

    version: str
    classes: tuple[str, ...]

    @property
    def n_networks(self) -> int:
        """How often every image is counted in the progress."""

    @property
    def block_size(self) -> int:
        """Images at a time."""

    def predict_block(self, paths: Sequence[Path], step: Any) -> BlockPredictions:
        """Answers for the images of one block; `step(images)` tells of progress."""


@dataclass(frozen=True)
class Thresholds:
    """What `evaluate` measured of a model: when a set of classes is large enough, and when to be silent."""

    kind: str
    """How sets are made, a key of `uncertainty.NONCONFORMITY_SCORES`"""
    limit: float | None
    """Scores up to it are in the set."""
    abstain: float | None
    """Below this probability of the top class there is no answer to rely on."""

    def apply(self, probabilities: np.ndarray, classes: Sequence[str]) -> list[dict[str, Any]]:
        """`set` and `abstain` of each image, from (N, C); None where they were not measured."""
        found: list[dict[str, Any]] = [{"set": None, "abstain": None} for _ in probabilities]
        if self.limit is not None:
            for row, inside in zip(
                found, uncertainty.prediction_sets(self.kind, probabilities, self.limit), strict=True
            ):
                row["set"] = [classes[place] for place in np.flatnonzero(inside)]
        if self.abstain is not None:
            for row, highest in zip(found, probabilities.max(axis=1), strict=True):
                row["abstain"] = bool(highest < self.abstain)
        return found


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
    append: bool = False,
    force: bool = False,
) -> Result:
    """Answer for images, into the file `to` or, up to 10,000 of them, onto the screen.

    `form` is csv or jsonl, by default what the file's ending says; `probabilities` adds those of all classes,
    `sets` is a way to make prediction sets, lac or aps. With `append` the file is continued: images that it answers are
    passed over, those with an error are tried again. An image that cannot be read is a record with
    its error and a failure of the result. Raises UserError without an image, for a model that cannot answer, and for a
    file that is there and not to be continued.
    """
    answers = OutputOptions(to, form, probabilities, append, force)
    store = Store(config, workspace, catalog.load(workspace))
    classifier = WorkspaceClassifier(store, model_name)
    thresholds = load_thresholds(workspace, model_name, is_ensemble=classifier.ensemble is not None, sets=sets)
    return _predicted(classifier, thresholds, image_paths.list_images(paths, sys.stdin.buffer), paths, answers)


def predict_from_export(
    *,
    paths: Sequence[str],
    from_export: str,
    to: str | None = None,
    form: str | None = None,
    probabilities: bool = False,
    sets: str = "lac",
    append: bool = False,
    force: bool = False,
) -> Result:
    """Answer as `predict` does, by an exported ONNX file alone: no workspace, no torch, no base pipeline.

    The file holds no thresholds, so `set` and `abstain` stay empty. Raises UserError as `predict` does, and for a file
    that is no export.
    """
    from utils.inference.onnx_prediction import SUFFIXES

    answers = OutputOptions(to, form, probabilities, append, force)
    classifier = ExportClassifier(Path(from_export).expanduser())
    listing = image_paths.list_images(paths, sys.stdin.buffer, SUFFIXES)
    return _predicted(classifier, Thresholds(sets, None, None), listing, paths, answers)


@dataclass(frozen=True)
class OutputOptions:
    """Where the answers go, and how they are written. Raises UserError where there is nothing to go on with."""

    to: str | None
    form: str | None
    probabilities: bool
    append: bool
    force: bool

    def __post_init__(self) -> None:
        if self.append and self.to is None:
            raise UserError("--append goes on with a file; name it with --to FILE")

    def style(self, classes: tuple[str, ...]) -> RecordFormat:
        """Of the records."""
        return RecordFormat(self.form or _form_of(self.to), classes if self.probabilities else None)


class ExportClassifier:
    """Answers by an exported ONNX file, in onnxruntime."""

    n_networks, block_size = 1, 1024

    def __init__(self, path: Path) -> None:
        """Raises UserError for a file that is no export of images."""
        from utils.inference.onnx_prediction import ExportedModel

        try:
            with path.open("rb") as file:
                digest = hashlib.file_digest(file, "sha256").hexdigest()
            self.model = ExportedModel(path)
        except OSError as error:
            raise UserError(f"--from-export {path}: {error.strerror}; expected an exported .onnx file") from error
        except ValueError as error:
            raise UserError(f"--from-export {error}") from error
        self.classes = tuple(self.model.classes)
        self.version = f"{path.stem}@{digest[:12]}"
        """Name and digest of the file: answers of two files do not go into one."""

    def predict_block(self, paths: Sequence[Path], step: Callable[[int], None]) -> BlockPredictions:
        """Probabilities for image files; `step(images)` is called for every batch.

        Raises UserError for an output that is not a row of probabilities for each image.
        """
        found: dict[int, np.ndarray] = {}
        problems: dict[int, str] = {}
        for start in range(0, len(paths), self.model.batch_size):
            images: dict[int, np.ndarray] = {}
            for place, path in enumerate(paths[start : start + self.model.batch_size], start):
                try:
                    images[place] = self.model.prepare(path)
                except ValueError as error:
                    problems[place] = str(error).removeprefix(f"{path}: ")
            if images:
                try:
                    answers = self.model.run_each(list(images.values()))
                except ValueError as error:
                    raise UserError(f"--from-export {error}") from error
                found |= zip(images, answers, strict=True)
                step(len(images))
        rows = np.stack(list(found.values())) if found else np.empty((0, len(self.classes)))
        return BlockPredictions(np.array(list(found), dtype=np.int64), rows.astype(np.float64), None, problems)


def _predicted(
    classifier: Classifier,
    thresholds: Thresholds,
    listing: image_paths.ImageListing,
    paths: Sequence[str],
    answers: OutputOptions,
) -> Result:
    failures = [f"{printable(name)}: no image in it" for name in listing.empty]
    if not listing.paths:
        raise UserError(
            f"{', '.join(map(printable, paths))}: no image found; expected image files, folders or patterns"
        )
    style = answers.style(classifier.classes)
    if answers.to is None:
        return _on_screen(classifier, thresholds, listing.paths, style, failures)
    place = Path(answers.to).expanduser()
    names = {str(path) for path in listing.paths}
    file = PredictionFile(
        place, style, classifier.version, append=answers.append, replace=answers.force, requested=names
    )
    left = [path for path in listing.paths if str(path) not in file.done]
    if len(left) < len(listing.paths):
        logger.info("%d of %d images are answered in %s", len(listing.paths) - len(left), len(listing.paths), file.path)
    problems: list[str] = []
    for records, lines in _answers(classifier, thresholds, left, style):
        file.add(lines)
        problems += _problems(records)
    summary = {"file": str(file.path), "images": len(listing.paths), "answered": len(left) - len(problems)}
    name = classifier.version.rpartition("@")[0]
    text = f"{name}: {len(left) - len(problems)} of {len(left)} images answered\nwritten: {file.path}"
    return Result(
        text, summary | {"model": classifier.version, "unreadable": len(problems)}, failures + _named(problems)
    )


def load_thresholds(workspace: Workspace, name: str, *, is_ensemble: bool, sets: str = "lac") -> Thresholds:
    """What the newest evaluation on test says of a model; without one, or one of an older ensemble, this is said."""
    path = (workspace.ensemble_metrics if is_ensemble else workspace.member_metrics)(name, "test")
    record: Mapping[str, Any] = read_record(path, remedy="Remove it, then evaluate again") or {}
    built = workspace.ensemble(name) / "ensemble.json"
    stale = bool(record) and is_ensemble and built.stat().st_mtime_ns > path.stat().st_mtime_ns
    if stale:
        record = {}
    found = Thresholds(
        sets,
        ((record.get("conformal") or {}).get(sets) or {}).get("threshold"),
        (record.get("selective") or {}).get("threshold"),
    )
    lacking = [word for word, value in (("set", found.limit), ("abstain", found.abstain)) if value is None]
    if lacking:
        why = "was built again since it was evaluated" if stale else "has no measured thresholds"
        logger.warning(
            "%s %s, so %s stay empty; run: python ensemble_orchestrator.py evaluate", name, why, " and ".join(lacking)
        )
    return found


def _form_of(to: str | None) -> str:
    return "jsonl" if to is not None and to.lower().endswith((".jsonl", ".ndjson")) else "csv"


def _on_screen(
    classifier: Classifier, thresholds: Thresholds, paths: Sequence[Path], style: RecordFormat, failures: list[str]
) -> Result:
    if len(paths) > MAX_IMAGES_ON_SCREEN:
        raise UserError(
            f"{len(paths):,} images: more than {MAX_IMAGES_ON_SCREEN:,} need a file; name it with --to FILE"
        )
    records: list[dict[str, Any]] = []
    text = style.header
    for found, lines in _answers(classifier, thresholds, paths, style):
        records += found
        text += "".join(lines)
    document = {"model": classifier.version, "images": [style.as_document(record) for record in records]}
    # A terminal takes text alone; a file keeps the bytes of every name.
    text = text.rstrip("\n").encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")
    return Result(text, document, failures + _named(_problems(records)))


def _answers(
    classifier: Classifier, thresholds: Thresholds, paths: Sequence[Path], style: RecordFormat
) -> Iterator[tuple[list[dict[str, Any]], list[str]]]:
    """Records and their lines, block by block."""
    progress = _Progress(len(paths), classifier.n_networks)
    for start in range(0, len(paths), classifier.block_size):
        block = paths[start : start + classifier.block_size]
        found = _checked(classifier, classifier.predict_block(block, progress.step))
        yield _records(classifier, thresholds, block, found, style)
        progress.block_ends(min(start + len(block), len(paths)))


def _checked(classifier: Classifier, answers: BlockPredictions) -> BlockPredictions:
    """Answers that are probabilities; a row that is none becomes a problem of its image and of no other."""
    from utils.inference.onnx_prediction import check_shape, row_problems

    try:
        check_shape(answers.probabilities, len(answers.readable), len(classifier.classes))
    except ValueError as error:
        raise UserError(f"{classifier.version}: {error}") from error
    reasons = row_problems(answers.probabilities)
    if not reasons:
        return answers
    kept = [row for row in range(len(answers.readable)) if row not in reasons]
    return BlockPredictions(
        answers.readable[kept],
        answers.probabilities[kept],
        None if answers.disagreement is None else answers.disagreement[kept],
        answers.problems | {int(answers.readable[row]): reason for row, reason in reasons.items()},
    )


def _records(
    classifier: Classifier, thresholds: Thresholds, paths: Sequence[Path], found: BlockPredictions, style: RecordFormat
) -> tuple[list[dict[str, Any]], list[str]]:
    row_of = {int(place): row for row, place in enumerate(found.readable)}
    measured_of = thresholds.apply(found.probabilities, classifier.classes)
    records, lines = [], []
    for place, path in enumerate(paths):
        record: dict[str, Any] = {"path": str(path), "class": None, "probability": None, "set": None, "abstain": None}
        record |= {"disagreement": None, "model": classifier.version, "error": found.problems.get(place)}
        values = None
        if place in row_of:
            row = found.probabilities[row_of[place]]
            top = int(row.argmax())
            record |= {"class": classifier.classes[top], "probability": round(float(row[top]), N_DIGITS)}
            record |= measured_of[row_of[place]]
            if found.disagreement is not None and not np.isnan(found.disagreement[row_of[place]]):
                record["disagreement"] = round(float(found.disagreement[row_of[place]]), N_DIGITS)
            values = [round(float(value), N_DIGITS) for value in row]
        if style.classes is not None:
            record["probabilities"] = values
        records.append(record)
        lines.append(style.format_record(record))
    return records, lines


def _problems(records: Sequence[Mapping[str, Any]]) -> list[str]:
    return [
        f"{printable(record['path'])}: {printable(record['error'])}"
        for record in records
        if record["error"] is not None
    ]


def _named(problems: Sequence[str]) -> list[str]:
    more = len(problems) - MAX_PROBLEMS_NAMED
    return [
        *problems[:MAX_PROBLEMS_NAMED],
        *([f"{more} more images without an answer, each with its error in its record"] if more > 0 else []),
    ]


class _Progress:
    """Tells now and then how far it is, and how long it will take."""

    def __init__(self, images: int, networks: int) -> None:
        self.images, self.total = images, images * networks
        self.n_networks, self.done = networks, 0
        self.start = self.told = time.monotonic()

    def step(self, images: int) -> None:
        """One network has seen so many more images."""
        self.done += images
        now = time.monotonic()
        if now - self.told >= PROGRESS_SECONDS:
            self.told = now
            left = (now - self.start) / self.done * (self.total - self.done)
            share = self.done / self.total
            logger.info(
                "%.0f %% of %d images by %d networks; about %.0f s left",
                100 * share,
                self.images,
                self.n_networks,
                left,
            )

    def block_ends(self, images: int) -> None:
        """So many images are answered; those that could not be read are counted as well."""
        self.done = images * self.n_networks
        spent = time.monotonic() - self.start
        left = spent / images * (self.images - images)
        logger.info("[%d/%d] images; about %.0f s left", images, self.images, left)
