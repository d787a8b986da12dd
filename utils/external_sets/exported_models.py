"""An exported ONNX file on an external set: the file's own answers, judged like those of a model of the workspace.

Where the file is the export of an ensemble or member as the workspace holds it, thresholds and temperature come from
that model's out-of-sample rows; the training data of any other file is not known.
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
    """Probabilities of the images that could be read."""

    probabilities: Mapping[str, np.ndarray]
    """{sample id: (C,)}, in the order of the workspace's classes"""
    problems: Mapping[str, str]
    """{sample id: reason} of the others"""


class ExportedFile:
    """An exported ONNX file that is opened, and the model of the workspace that it is the export of."""

    def __init__(self, path: Path, own_classes: Sequence[str]) -> None:
        """Open the file, or the file of an export's folder. Raises UserError for other classes than the workspace's."""
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

    def source(self, own: OwnEvaluation) -> ScoredModel | None:
        """The model of the workspace that the file was exported from, if that is as it was."""
        folder = self.path.parent.parent
        metadata = read_json(folder / export_folder.METADATA, remedy=export_folder.EXPORT_AGAIN)
        training = metadata.get("training") if isinstance(metadata, dict) else None
        if not isinstance(training, dict) or not self._is_of_the_export(folder):
            return None
        name = training.get("ensemble")
        model = next((model for model in own.inputs.models if model.name == name), None)
        if model is None:
            return None
        is_ensemble = model.name in own.inputs.ensembles
        digest = (
            own.inputs.ensembles[model.name].ensemble.inputs_digest if is_ensemble else own.members[model.name].digest
        )
        return model if training.get("inputs_digest") == digest else None

    def _is_of_the_export(self, folder: Path) -> bool:
        """Whether `export_status.json` of the folder records this very content."""
        recorded = {
            digest
            for entry in (export_folder.read_status(folder) or {}).values()
            for digest in (entry.get("files") or {}).values()
        }
        return export_folder.file_sha256(self.path) in recorded

    def answers(self, images: ImageSplit) -> Answers:
        """Run the file over images, block by block."""
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
    """The ONNX file of an export's folder, or the file itself. Raises UserError where there is none."""
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
    own: OwnEvaluation, file: ExportedFile, images: ImageSplit, answers: Answers, listed: LabelledImages | None
) -> EvaluationInputs:
    """What is computed with for the file on some images, those of `listed` or, with None, the own test split."""
    order = sorted(range(len(images.sample_ids)), key=lambda row: images.sample_ids[row])
    order = [row for row in order if images.sample_ids[row] in answers.probabilities]
    if listed is None:
        evaluated = set(own.inputs.rows.sample_ids.tolist())
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
    source = file.source(own)
    provenance = Provenance((), (), (file.name,)) if source is None else source.provenance
    model = ScoredModel(
        file.name,
        KIND,
        (),
        np.array([answers.probabilities[name] for name in ids]).reshape(len(ids), -1),
        provenance,
        inference=KIND,
    )
    crossfits = {file.name: own.inputs.crossfits[source.name]} if source and source.name in own.inputs.crossfits else {}
    parts = [] if source is None else own.inputs.out_of_sample.get(source.name, [])
    size = sum(path.stat().st_size for path in [file.path, *file.path.parent.glob(f"{file.name}*.data")])
    contents = dict(zip(((images.split, name) for name in images.sample_ids), images.contents, strict=True))
    return replace(
        own.inputs,
        settings=replace(own.inputs.settings, split=images.split, model_name=file.name),
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
        contents={**own.inputs.contents, **contents},
        groups=_test_groups(own, ids) if listed is None else external_groups(own.store, ids, listed),
        costs=Costs({}, {}, {file.name: NOTES["latency_ms"]}, {file.name: size}, {}),
    )


def _test_groups(own: OwnEvaluation, ids: Sequence[str]) -> np.ndarray | None:
    groups = own.inputs.groups
    if groups is None:
        return None
    of_row = dict(zip(own.inputs.rows.sample_ids.tolist(), groups.tolist(), strict=True))
    return np.array([of_row[name] for name in ids])


def add_notes(record: dict[str, Any]) -> None:
    """Say in the notes of `metrics.json` why an exported file has no such figures."""
    record["notes"] |= {key: note for key, note in NOTES.items() if record[key] is None}
