"""`evaluate --data`: score models on labelled images from outside the workspace, and compare with their test split."""

from __future__ import annotations

import logging
import shlex
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from utils.core.artifacts import read_record, write_json
from utils.core.config import Config
from utils.core.errors import UserError
from utils.core.results import Result
from utils.core.workspace import Workspace
from utils.evaluation import external_text, score_ranking
from utils.evaluation.evaluation_inputs import EvaluationInputs, EvaluationSettings
from utils.evaluation.evaluation_records import METRICS
from utils.evaluation.external_records import EXTERNAL_SET
from utils.evaluation.report import report_page, report_sources
from utils.external_sets import class_matching, drop, exported_models, external_inputs, scores
from utils.external_sets.class_matching import ClassMatch
from utils.external_sets.exported_models import ExportedFile
from utils.external_sets.external_inputs import OwnEvaluation
from utils.external_sets.labelled_images import LabelledImages, read_labelled_images, set_name
from utils.external_sets.restriction import restricted, rows_of_classes
from utils.predictions import catalog
from utils.predictions.image_splits import ImageSplit
from utils.predictions.store import Store

logger = logging.getLogger("disease_pipeline")

AGAIN = "Remove it, then evaluate again"


@dataclass(frozen=True)
class ExternalRequest:
    """The request of `evaluate --data`."""

    source: Path
    class_map: Path | None
    name: str
    treatment: str
    """Treatment of classes that only one side has, one of `class_matching.TREATMENTS`"""
    force: bool
    export: Path | None = None
    """An exported file, or the folder of an export, to score instead of models of the workspace"""


@dataclass(frozen=True)
class ExternalImages:
    """The images that are scored, and those that are omitted."""

    images: ImageSplit
    listed: LabelledImages
    """The same images in the same order, with the names of their source"""
    match: ClassMatch
    copies: Mapping[str, str]
    """{image: description of the equal image} of copies of images of train or val, which are omitted"""
    unreadable: Mapping[str, str]
    """{image: reason}"""
    n_unknown: int
    """Number of images of classes that the workspace lacks, or that the class map excludes"""


def evaluate_external(
    config: Config, workspace: Workspace, request: ExternalRequest, settings: EvaluationSettings
) -> Result:
    """Score all members and ensembles, or the named one, on an external set and write its records and the report.

    Raises UserError if no image can be scored, if classes that only one side has need a treatment, and like `evaluate`.
    """
    _require_own_name(workspace, request)
    store = Store(config, workspace, catalog.load(workspace))
    listed = read_labelled_images(request.source, store.digests)
    match = _matched(store, listed, request, settings.model_name)  # before any network runs
    file = None if request.export is None else ExportedFile(request.export, store.catalog.classes)
    evaluation = external_inputs.evaluation_on_test(store, settings)
    if file is None:
        prepared, inputs, test_inputs = _of_models(evaluation, listed, match, request.name, settings)
    else:
        prepared, inputs, test_inputs = _of_export(evaluation, file, listed, match, request.name)
    evaluation.store.digests.save()
    evaluation = replace(evaluation, failures={} if file else {**evaluation.failures, **inputs.failures})
    metrics = _scored(evaluation, inputs, test_inputs, match, request.treatment)
    kinds = {model.name: model.kind for model in inputs.models}
    for name, record_of_model in metrics.items():
        write_json(_metrics_path(workspace, request.name, name, kinds[name]), record_of_model)
    other_records: dict[str, Any] = {}
    kinds_of_other_models: dict[str, str] = {}
    if evaluation.model_name is not None or file is not None:
        other_records, kinds_of_other_models = _other_models(workspace, prepared, request, settings)
    ranking = score_ranking.rank(
        {**other_records, **metrics}, {**kinds_of_other_models, **kinds}, scores.SPLIT, settings.metric
    )
    record = _set_record(evaluation, prepared, request, settings, ranking, {**other_records, **metrics})
    write_json(workspace.external_set(request.name), record)
    return _with_report(config, evaluation.store, _result(workspace, record, list(metrics)))


def _of_models(
    evaluation: OwnEvaluation, listed: LabelledImages, match: ClassMatch, name: str, settings: EvaluationSettings
) -> tuple[ExternalImages, EvaluationInputs, EvaluationInputs]:
    """The images, and the models of the workspace on them and on test."""

    def unreadable_of(images: ImageSplit) -> Mapping[str, str]:
        return external_inputs.unreadable_images(evaluation, images)

    prepared = prepare(evaluation, listed, match, name, unreadable_of)
    evaluation.store.digests.save()
    inputs = external_inputs.gather_external(
        evaluation, prepared.images, prepared.listed, settings, len(prepared.copies)
    )
    return prepared, inputs, replace(evaluation.inputs, controls={})


def _of_export(
    evaluation: OwnEvaluation, file: ExportedFile, listed: LabelledImages, match: ClassMatch, name: str
) -> tuple[ExternalImages, EvaluationInputs, EvaluationInputs]:
    """The images, and an exported file on them and on test."""
    answers_on_set: list[exported_models.Answers] = []

    def unreadable_of(images: ImageSplit) -> Mapping[str, str]:
        answers_on_set.append(file.answers(images))
        return answers_on_set[0].problems

    prepared = prepare(evaluation, listed, match, name, unreadable_of)
    inputs = exported_models.export_inputs(evaluation, file, prepared.images, answers_on_set[0], prepared.listed)
    test = evaluation.store.images("test")
    test_inputs = exported_models.export_inputs(evaluation, file, test, file.answers(test), None)
    return prepared, replace(inputs, dropped=len(prepared.copies)), test_inputs


def _metrics_path(workspace: Workspace, external_set: str, name: str, kind: str) -> Path:
    folder = {"member": f"members/{name}", exported_models.KIND: f"exports/{name}"}.get(kind, name)
    return workspace.external_metrics(external_set, folder)


def _other_models(
    workspace: Workspace, prepared: ExternalImages, request: ExternalRequest, settings: EvaluationSettings
) -> tuple[dict[str, Any], dict[str, str]]:
    """{model: `metrics.json`} and {model: kind} of other models scored on the same images with the same options."""
    stored = read_record(workspace.external_set(request.name), remedy=AGAIN, form=EXTERNAL_SET)
    if stored is None or _way(stored) != (
        prepared.images.digest,
        request.treatment,
        settings.options.as_record(),
        settings.metric,
    ):
        return {}, {}
    kinds = {row["name"]: row["kind"] for row in stored["rows"]}
    records = {
        name: read_record(_metrics_path(workspace, request.name, name, kind), remedy=AGAIN, form=METRICS)
        for name, kind in kinds.items()
    }
    return {name: record for name, record in records.items() if record is not None and "external" in record}, kinds


def _way(record: Mapping[str, Any]) -> tuple[Any, ...]:
    return record.get("images_digest"), record["missing"], record.get("options"), (record.get("order") or [None])[0]


def _require_own_name(workspace: Workspace, request: ExternalRequest) -> None:
    """Raise UserError if another set has the name already."""
    path = workspace.external_set(request.name)
    stored = read_record(path, remedy=AGAIN, form=EXTERNAL_SET)
    if stored is not None and stored["source"] != str(request.source.absolute()) and not request.force:
        raise UserError(
            f"{path}: scores of another set of the name {request.name!r}, {stored['source']}. Name this one with "
            "--name NAME, or replace the other with --force"
        )


def _matched(store: Store, listed: LabelledImages, request: ExternalRequest, model_name: str | None) -> ClassMatch:
    own_classes = store.catalog.classes
    class_map = {}
    if request.class_map is not None:
        class_map = class_matching.read_class_map(request.class_map, listed.classes, own_classes)
    match = class_matching.match_classes(listed.classes, own_classes, class_map)
    test = store.samples("test")
    own_counts = np.bincount(test.labels[test.labels >= 0], minlength=len(own_classes)).tolist()
    class_matching.require_treatment(
        match,
        listed.counts(),
        dict(zip(own_classes, own_counts, strict=True)),
        request.treatment,
        str(request.source),
        _command(store.workspace, request, model_name),
    )
    return match


def _command(workspace: Workspace, request: ExternalRequest, model_name: str | None) -> str:
    """The command as typed, without `--missing`."""
    options = {
        "--data": request.source,
        "--name": request.name if request.name != set_name(request.source, None) else None,
        "--class-map": request.class_map,
        "--model-name": model_name,
        "--from-export": request.export,
        "--workspace": workspace.base,
    }
    words = [word for option, value in options.items() if value is not None for word in (option, str(value))]
    return shlex.join(["python", "ensemble_orchestrator.py", "evaluate", *words])


def prepare(
    evaluation: OwnEvaluation,
    listed: LabelledImages,
    match: ClassMatch,
    name: str,
    unreadable_of: Callable[[ImageSplit], Mapping[str, str]],
) -> ExternalImages:
    """The readable images of known classes that are not copies of images of train or val.

    `unreadable_of` returns {image: reason} of images that cannot be predicted. Raises UserError if no image remains.
    """
    store, n_listed, unreadable = evaluation.store, len(listed.names), dict(listed.unreadable)
    listed = listed.take(np.flatnonzero([listed.classes[label] in match.class_of for label in listed.labels]))
    n_unknown = n_listed - len(listed.names)
    earlier = external_inputs.earlier_images(store, evaluation.members)
    of_images = zip(listed.names, listed.contents, strict=True)
    copies = {image: earlier[content] for image, content in of_images if content in earlier}
    listed = listed.take([row for row, image in enumerate(listed.names) if image not in copies])
    unreadable |= unreadable_of(_as_split(store, listed, match, name))
    listed = listed.take([row for row, image in enumerate(listed.names) if image not in unreadable])
    if not listed.names:
        raise UserError(
            f"evaluate --data {listed.source}: no image is left to score: {len(copies)} are images of train or val, "
            f"{len(unreadable)} unreadable, {n_unknown} of other classes. Name a set of other images"
        )
    return ExternalImages(_as_split(store, listed, match, name), listed, match, copies, unreadable, n_unknown)


def _as_split(store: Store, listed: LabelledImages, match: ClassMatch, name: str) -> ImageSplit:
    classes = store.catalog.classes
    index_of = {source: classes.index(workspace_class) for source, workspace_class in match.class_of.items()}
    labels = np.array([index_of[listed.classes[label]] for label in listed.labels], dtype=np.int64)
    return listed.as_split(name, classes, labels)


def _scored(
    evaluation: OwnEvaluation,
    inputs: EvaluationInputs,
    test_inputs: EvaluationInputs,
    match: ClassMatch,
    treatment: str,
) -> dict[str, dict[str, Any]]:
    """{model: `metrics.json`} of models with predictions on the set, in the order of the evaluation."""
    is_export = not inputs.members
    ranked = {*inputs.ranked, *inputs.ensembles}
    names = [model.name for model in inputs.models if is_export or model.name in ranked]
    if evaluation.model_name is not None:
        if evaluation.model_name not in {model.name for model in inputs.models}:
            reason = evaluation.failures.get(evaluation.model_name, "it has no predictions on the set")
            raise UserError(f"{evaluation.model_name}: {reason}")
        names = [evaluation.model_name]
    areas = {model.name: drop.ood_areas(model, inputs, test_inputs) for model in inputs.models if model.name in names}
    if match.absent:
        change = restricted if treatment == class_matching.RESTRICT else rows_of_classes
        inputs, test_inputs = (change(each, match.shared) for each in (inputs, test_inputs))
    metrics = scores.score(inputs, test_inputs, evaluation.best_single, names)
    for name, record in metrics.items():
        record["external"]["ood_auroc"] = areas[name]
        if is_export:
            exported_models.add_notes(record)
    return metrics


def _set_record(
    evaluation: OwnEvaluation,
    prepared: ExternalImages,
    request: ExternalRequest,
    settings: EvaluationSettings,
    ranking: Mapping[str, Any],
    metrics: Mapping[str, Mapping[str, Any]],
) -> dict[str, Any]:
    """Contents of `external.json`."""
    match, images = prepared.match, prepared.images
    counts = np.bincount(images.labels, minlength=len(images.classes)).tolist()
    test_contents = set(evaluation.store.images("test").contents)
    return {
        **ranking,
        "set": request.name,
        "source": str(request.source.absolute()),
        "images_digest": images.digest,
        "missing": request.treatment,
        "classes": {
            "counts": dict(zip(images.classes, counts, strict=True)),
            "mapped": {name: target for name, target in match.class_of.items() if name != target},
            "unknown": dict(match.unknown),
            "dropped": list(match.dropped),
            "absent": list(match.absent),
        },
        "left_out_images": {
            "copies": dict(prepared.copies),
            "unreadable": dict(prepared.unreadable),
            "of_other_classes": prepared.n_unknown,
        },
        "also_in_test": sum(content in test_contents for content in images.contents),
        "models": {name: record["external"] for name, record in metrics.items()},
        "recommended": evaluation.recommended["name"],
        "peers": {"best_single": evaluation.best_single},
        "left_out": dict(evaluation.failures),
        "options": settings.options.as_record(),
    }


def _result(workspace: Workspace, record: dict[str, Any], scored: Sequence[str]) -> Result:
    text = f"{external_text.as_text(record, scored)}\nwritten: {workspace.external_set(record['set'])}"
    failures = [f"{name}: {reason}" for name, reason in sorted(record["left_out"].items())]
    failures += [f"{image}: {reason}" for image, reason in list(record["left_out_images"]["unreadable"].items())[:5]]
    if (more := len(record["left_out_images"]["unreadable"]) - 5) > 0:
        failures.append(f"{more} more unreadable images; {workspace.external_set(record['set'])} names them")
    return Result(text, record, failures)


def _with_report(config: Config, store: Store, result: Result) -> Result:
    """Rewrite the report of the test split, if there is one, to include the set."""
    workspace = store.workspace
    if not workspace.report("test").is_file() or not workspace.ranking("test").is_file():
        return result
    try:
        path = report_page.write(config, report_sources.read(store, "test"))
    except UserError as error:
        return replace(result, failures=[*result.failures, f"report: {error}"])
    return replace(result, text=f"{result.text}\nreport: {path}", document={**result.document, "report": str(path)})
