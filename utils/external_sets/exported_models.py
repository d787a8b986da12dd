"""An exported ONNX file on an external set: the file's predictions, scored like those of a model of the workspace.

If the file is the export of a current ensemble or member of the workspace, thresholds and temperature come from that
model's out-of-sample rows; the training data of any other file is unknown.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from utils.building.ensembles import Provenance
from utils.core.artifacts import read_json
from utils.core.errors import UserError
from utils.evaluation.costs import Costs
from utils.evaluation.evaluation_inputs import EvaluationInputs
from utils.evaluation.scoring import ScoredModel
from utils.exporting import export_folder
from utils.external_sets.external_inputs import OwnEvaluation, external_groups
from utils.external_sets.labelled_images import LabelledImages
from utils.inference.predict import ExportClassifier, valid_predictions
from utils.predictions.image_splits import ImageSplit
from utils.predictions.rows import Rows

KIND = "export"
NOTES = {
    "config_digest": "an exported file records none",
    "latency_ms": "export_status.json of the export holds the latency of the file",
    "mutual_information": "an exported file gives no predictions of members",
    "out_of_distribution": "an exported file gives probabilities, and OOD scores need logits",
}


@dataclass(frozen=True)
class Answers:
    """Probabilities of the readable images."""

    probabilities: Mapping[str, np.ndarray]
    """{sample id: probabilities (C,)}, in the order of the workspace's classes"""
    problems: Mapping[str, str]
    """{sample id: reason} of the other images"""


class ExportedFile:
    """An open exported ONNX file, and the model of the workspace that it was exported from, if any."""

    def __init__(self, path: Path, own_classes: Sequence[str]) -> None:
        """Open the file, or that of an export's folder. Raises UserError for other classes than the workspace's."""
        self.path = onnx_file(path)
        self.classifier = ExportClassifier(self.path)
        self.own_classes = tuple(own_classes)
        if set(self.classifier.classes) != set(own_classes):
            raise UserError(
                f"--from-export {self.path}: answers {', '.join(self.classifier.classes)}; expected the classes of the "
                f"workspace, {', '.join(own_classes)}. Name the workspace that it was exported from: --workspace DIR"
            )
        self.columns = [self.classifier.classes.index(name) for name in own_classes]

    @property
    def name(self) -> str:
        """The name of the file."""
        return self.path.name

    def source(self, evaluation: OwnEvaluation) -> ScoredModel | None:
        """The model of the workspace that the file was exported from; None if it is unknown or has changed."""
        folder = self.path.parent.parent
        metadata = read_json(folder / export_folder.METADATA, remedy=export_folder.EXPORT_AGAIN)
        training = metadata.get("training") if isinstance(metadata, dict) else None
        if not isinstance(training, dict) or not self._is_of_the_export(folder):
            return None
        name = training.get("ensemble")
        model = next((model for model in evaluation.inputs.models if model.name == name), None)
        if model is None:
            return None
        is_ensemble = model.name in evaluation.inputs.ensembles
        digest = (
            evaluation.inputs.ensembles[model.name].ensemble.inputs_digest
            if is_ensemble
            else evaluation.members[model.name].digest
        )
        return model if training.get("inputs_digest") == digest else None

    def _is_of_the_export(self, folder: Path) -> bool:
        """Whether `export_status.json` of the folder records the digest of this file."""
        recorded = {
            digest
            for entry in (export_folder.read_status(folder) or {}).values()
            for digest in (entry.get("files") or {}).values()
        }
        return export_folder.file_sha256(self.path) in recorded

    def answers(self, images: ImageSplit) -> Answers:
        """Run the file on images, block by block."""
        probabilities: dict[str, np.ndarray] = {}
        problems: dict[str, str] = {}
        size = self.classifier.block_size
        for start in range(0, len(images.paths), size):
            names = images.sample_ids[start : start + size]
            block = self.classifier.predict_block(images.paths[start : start + size], lambda n_images: None)
            predictions = valid_predictions(self.classifier, block)
            rows = zip(predictions.readable.tolist(), predictions.probabilities[:, self.columns], strict=True)
            probabilities |= {names[index]: row for index, row in rows}
            problems |= {names[index]: reason for index, reason in predictions.problems.items()}
        return Answers(probabilities, problems)


def onnx_file(path: Path) -> Path:
    """The ONNX file of an export's folder, or the file itself. Raises UserError if there is none."""
    if not path.is_dir():
        return path
    files = sorted(path.glob("onnx/*.onnx"))
    plain = [file for file in files if file.stem == path.name] or files
    if not plain:
        raise UserError(
            f"--from-export {path}: no file onnx/*.onnx in it; expected a folder that export wrote. Write it: python "
            "ensemble_orchestrator.py export --formats onnx"
        )
    return plain[0]


def export_inputs(
    evaluation: OwnEvaluation, file: ExportedFile, images: ImageSplit, answers: Answers, listed: LabelledImages | None
) -> EvaluationInputs:
    """The evaluation inputs of the file on images: those of `listed` or, with None, the workspace's test split."""
    order = sorted(range(len(images.sample_ids)), key=lambda row: images.sample_ids[row])
    order = [row for row in order if images.sample_ids[row] in answers.probabilities]
    if listed is None:
        evaluated = set(evaluation.inputs.rows.sample_ids.tolist())
        order = [row for row in order if images.sample_ids[row] in evaluated]
    ids = [images.sample_ids[row] for row in order]
    rows = Rows(
        members=(),
        classes=file.own_classes,
        split=np.full(len(ids), images.split),
        sample_ids=np.array(ids),
        labels=images.labels[order],
        logits=np.empty((0, len(ids), len(file.own_classes)), dtype=np.float32),
        out_of_sample=np.ones(len(ids), dtype=bool),
    )
    source = file.source(evaluation)
    provenance = Provenance((), (), (file.name,)) if source is None else source.provenance
    model = ScoredModel(
        file.name,
        KIND,
        (),
        np.array([answers.probabilities[name] for name in ids]).reshape(len(ids), -1),
        provenance,
        inference=KIND,
    )
    crossfits = (
        {file.name: evaluation.inputs.crossfits[source.name]}
        if source and source.name in evaluation.inputs.crossfits
        else {}
    )
    parts = [] if source is None else evaluation.inputs.out_of_sample.get(source.name, [])
    size = sum(path.stat().st_size for path in [file.path, *file.path.parent.glob(f"{file.name}*.data")])
    contents = dict(zip(((images.split, name) for name in images.sample_ids), images.contents, strict=True))
    return replace(
        evaluation.inputs,
        settings=replace(evaluation.inputs.settings, split=images.split, model_name=file.name),
        rows=rows,
        models=[model],
        members={},
        ranked={},
        selected=(),
        ensembles={},
        declared=(),
        controls={},
        crossfits=crossfits,
        out_of_sample={file.name: parts},
        contents={**evaluation.inputs.contents, **contents},
        groups=_test_groups(evaluation, ids) if listed is None else external_groups(evaluation.store, ids, listed),
        costs=Costs({}, {}, {file.name: NOTES["latency_ms"]}, {file.name: size}, {}),
    )


def _test_groups(evaluation: OwnEvaluation, ids: Sequence[str]) -> np.ndarray | None:
    groups = evaluation.inputs.groups
    if groups is None:
        return None
    of_row = dict(zip(evaluation.inputs.rows.sample_ids.tolist(), groups.tolist(), strict=True))
    return np.array([of_row[name] for name in ids])


def add_notes(record: dict[str, Any]) -> None:
    """Add the reasons for missing values of an exported file to the notes of `metrics.json`."""
    record["notes"] |= {key: note for key, note in NOTES.items() if record[key] is None}
