"""`evaluate --data`: score models on labelled images from outside the workspace, beside their own test split."""

from __future__ import annotations

import logging
import shlex
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from utils.core.artifacts import read_record, write_json
from utils.core.config import Config
from utils.core.errors import UserError
from utils.core.results import Result
from utils.core.workspace import Workspace
from utils.evaluation import external_text, report_page, report_sources
from utils.evaluation.evaluation_inputs import EvaluationInputs, EvaluationSettings
from utils.evaluation.external_records import EXTERNAL_SET
from utils.external_sets import class_matching, drop, external_inputs, scores
from utils.external_sets.class_matching import ClassMatch
from utils.external_sets.external_inputs import OwnEvaluation
from utils.external_sets.labelled_images import LabelledImages, read_labelled_images
from utils.external_sets.restriction import restricted
from utils.predictions import catalog
from utils.predictions.image_splits import ImageSplit
from utils.predictions.store import Store

logger = logging.getLogger("disease_pipeline")

AGAIN = "Remove it, then evaluate again"


@dataclass(frozen=True)
class ExternalRequest:
    """What is asked for."""

    source: Path
    class_map: Path | None
    name: str
    treatment: str
    """Of classes that only one side has, one of `class_matching.TREATMENTS`"""
    force: bool


@dataclass(frozen=True)
class ExternalImages:
    """The images that are scored, and those that are not."""

    images: ImageSplit
    listed: LabelledImages
    """The same images in the same order, with the names of their source"""
    match: ClassMatch
    copies: Mapping[str, str]
    """{image: what it equals} of images of train or val, which are left out"""
    unreadable: Mapping[str, str]
    """{image: reason}"""
    n_unknown: int
    """Images of classes that the workspace lacks, or that the class map leaves out"""


def evaluate_external(
    config: Config, workspace: Workspace, request: ExternalRequest, settings: EvaluationSettings
) -> Result:
    """Score all members and ensembles, or the one named, on an external set and write its records and the report.

    Raises UserError where no image can be scored, where classes of one side alone must be treated first, and as
    `evaluate` does.
    """
    _require_own_name(workspace, request)
    store = Store(config, workspace, catalog.load(workspace))
    listed = read_labelled_images(request.source, store.digests)
    match = _matched(store, listed, request)  # before any network runs
    own = external_inputs.gather_own(store, settings)
    prepared = prepare(own, listed, match, request.name)
    own.store.digests.save()
    inputs = external_inputs.gather_external(own, prepared.images, prepared.listed, settings, len(prepared.copies))
    own.store.digests.save()
    own = replace(own, failures={**own.failures, **inputs.failures})
    results = _scored(own, inputs, match, request.treatment)
    record = _set_record(own, prepared, request, settings, results)
    for name, metrics in results.metrics.items():
        is_member = metrics["name"] in own.members
        write_json(workspace.external_metrics(request.name, f"members/{name}" if is_member else name), metrics)
    write_json(workspace.external_set(request.name), record)
    return _with_report(config, own.store, _result(workspace, record, results))


def _require_own_name(workspace: Workspace, request: ExternalRequest) -> None:
    """Raise UserError where another set has the name already."""
    path = workspace.external_set(request.name)
    stored = read_record(path, remedy=AGAIN, form=EXTERNAL_SET)
    if stored is not None and stored["source"] != str(request.source.absolute()) and not request.force:
        raise UserError(
            f"{path}: scores of another set of the name {request.name!r}, {stored['source']}. Name this one with "
            "--name NAME, or replace the other with --force"
        )


def _matched(store: Store, listed: LabelledImages, request: ExternalRequest) -> ClassMatch:
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
        shlex.quote(str(request.source)),
    )
    return match


def prepare(own: OwnEvaluation, listed: LabelledImages, match: ClassMatch, name: str) -> ExternalImages:
    """The images of known classes that are readable and no copy of an image of train or val.

    Raises UserError where none is left.
    """
    store, n_listed, unreadable = own.store, len(listed.names), dict(listed.unreadable)
    listed = listed.take(np.flatnonzero([listed.classes[label] in match.class_of for label in listed.labels]))
    n_unknown = n_listed - len(listed.names)
    earlier = external_inputs.earlier_images(store, own.members)
    of_images = zip(listed.names, listed.contents, strict=True)
    copies = {image: earlier[content] for image, content in of_images if content in earlier}
    listed = listed.take([row for row, image in enumerate(listed.names) if image not in copies])
    unreadable |= external_inputs.unreadable_images(own, _as_split(store, listed, match, name))
    listed = listed.take([row for row, image in enumerate(listed.names) if image not in unreadable])
    if not listed.names:
        raise UserError(
            f"evaluate --data {listed.source}: no image is left to score: {len(copies)} are images of train or val, "
            f"{len(unreadable)} unreadable, {n_unknown} of other classes. Name a set of other images"
        )
    return ExternalImages(_as_split(store, listed, match, name), listed, match, copies, unreadable, n_unknown)


def _as_split(store: Store, listed: LabelledImages, match: ClassMatch, name: str) -> ImageSplit:
    classes = store.catalog.classes
    index_of = {source: classes.index(own) for source, own in match.class_of.items()}
    labels = np.array([index_of[listed.classes[label]] for label in listed.labels], dtype=np.int64)
    return listed.as_split(name, classes, labels)


def _scored(own: OwnEvaluation, inputs: EvaluationInputs, match: ClassMatch, treatment: str) -> scores.ExternalScores:
    """Records of the models that have predictions on the set, in the order of the evaluation."""
    ranked = {*inputs.ranked, *inputs.ensembles}
    names = [model.name for model in inputs.models if model.name in ranked]
    if own.model_name is not None:
        if own.model_name not in {model.name for model in inputs.models}:
            raise UserError(f"{own.model_name}: {own.failures.get(own.model_name, 'it has no predictions on the set')}")
        names = [own.model_name]
    test_inputs = replace(own.inputs, controls={})
    areas = {model.name: drop.ood_areas(model, inputs, test_inputs) for model in inputs.models if model.name in names}
    if treatment == class_matching.RESTRICT and match.absent:
        inputs, test_inputs = (restricted(each, match.shared) for each in (inputs, test_inputs))
    results = scores.score(inputs, test_inputs, own.best_single, names)
    for name, record in results.metrics.items():
        record["external"]["ood_auroc"] = areas[name]
    return results


def _set_record(
    own: OwnEvaluation,
    prepared: ExternalImages,
    request: ExternalRequest,
    settings: EvaluationSettings,
    results: scores.ExternalScores,
) -> dict[str, Any]:
    """`external.json`."""
    match, images = prepared.match, prepared.images
    counts = np.bincount(images.labels, minlength=len(images.classes)).tolist()
    test_contents = set(own.store.images("test").contents)
    return {
        **results.ranking,
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
        "models": {name: record["external"] for name, record in results.metrics.items()},
        "recommended": own.recommended["name"],
        "peers": {"best_single": own.best_single},
        "left_out": dict(own.failures),
        "options": settings.options.as_record(),
    }


def _result(workspace: Workspace, record: dict[str, Any], results: scores.ExternalScores) -> Result:
    text = f"{external_text.as_text(record)}\nwritten: {workspace.external_set(record['set'])}"
    failures = [f"{name}: {reason}" for name, reason in sorted(record["left_out"].items())]
    failures += [f"{image}: {reason}" for image, reason in list(record["left_out_images"]["unreadable"].items())[:5]]
    if (more := len(record["left_out_images"]["unreadable"]) - 5) > 0:
        failures.append(f"{more} more unreadable images; {workspace.external_set(record['set'])} names them")
    return Result(text, record, failures)


def _with_report(config: Config, store: Store, result: Result) -> Result:
    """Write the report of the test split anew, where there is one, so that it shows the set."""
    workspace = store.workspace
    if not workspace.report("test").is_file() or not workspace.ranking("test").is_file():
        return result
    try:
        path = report_page.write(config, report_sources.read(store, "test"))
    except UserError as error:
        return replace(result, failures=[*result.failures, f"report: {error}"])
    return replace(result, text=f"{result.text}\nreport: {path}", document={**result.document, "report": str(path)})
