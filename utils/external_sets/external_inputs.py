"""Inputs of an evaluation on an external set: the same models on the workspace's test split and on the set's images.

Networks run on the set one at a time, each once; stored outputs for the same images are reused.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from utils.core.errors import ConfigError, LeakageError, UserError
from utils.evaluation import evaluation_inputs, evaluation_results, recommended_names, scoring
from utils.evaluation.evaluate import listed_ensembles
from utils.evaluation.evaluation_inputs import EvaluationInputs, EvaluationSettings, SavedEnsemble
from utils.evaluation.evaluation_results import SOFT_VOTING
from utils.external_sets.labelled_images import LabelledImages
from utils.predictions import grouping, image_splits, member_selection, training_data
from utils.predictions.catalog import IMPORTED, Member
from utils.predictions.image_splits import ImageSplit
from utils.predictions.store import Store

logger = logging.getLogger("disease_pipeline")

IMPORTED_REASON = "imported predictions have no network that could answer new images"


@dataclass(frozen=True)
class OwnEvaluation:
    """The models with their evaluation on the workspace's test split."""

    store: Store
    inputs: EvaluationInputs
    """Evaluation inputs on the workspace's test split"""
    saved: Mapping[str, SavedEnsemble]
    members: Mapping[str, Member]
    """Members that run on the set"""
    selected: Sequence[Member]
    """Selected members, if all of them run, else empty"""
    recommended: Mapping[str, Any]
    """Recommendation by out-of-sample rows, which does not depend on external sets"""
    model_name: str | None
    failures: Mapping[str, str]

    @property
    def best_single(self) -> str | None:
        """The single member that others are compared with."""
        name: str | None = self.recommended["best_single"]
        return name

    @property
    def preprocessings(self) -> list[Any]:
        """Preprocessings of the members that run."""
        return [member.image_preprocessing for member in self.members.values()]


def evaluation_on_test(store: Store, settings: EvaluationSettings) -> OwnEvaluation:
    """Read the models and their test rows; missing predictions on test are computed.

    Raises UserError if no network remains, for an unknown model, and for one that cannot be evaluated.
    """
    if not store.catalog.has_images:
        raise UserError(
            f"{store.workspace.root}: all members are imported; {IMPORTED_REASON}. Add networks: discover --add"
        )
    name = settings.model_name
    name = None if name is None else recommended_names.resolve(store, name)
    saved, _ = listed_ensembles(store.config, store.workspace, name)
    ensembles = {name: entry.ensemble for name, entry in saved.items()}
    selected = member_selection.select(store.catalog, store.config)
    members = scoring.members_to_score(store.catalog, selected, ensembles)
    if name is not None and name not in saved and name not in members:
        raise recommended_names.unknown_name(name, saved, members)
    settings = replace(settings, model_name=name, split="test")
    failures = {member: IMPORTED_REASON for member, each in members.items() if each.source == IMPORTED}
    failures |= {
        ensemble: f"its member {', '.join(lacking)}: {IMPORTED_REASON}"
        for ensemble, entry in saved.items()
        if (lacking := [member for member in entry.ensemble.members if member in failures])
    }
    members = {member: each for member, each in members.items() if member not in failures}
    saved = {ensemble: entry for ensemble, entry in saved.items() if ensemble not in failures}
    selected = [member for member in selected if member.name in members]
    if not members:
        raise UserError(f"no member has a network: {IMPORTED_REASON}. Add networks: discover --add")
    inputs = evaluation_inputs.gather(store, saved, members, selected, settings, inputs_digest="")
    failures |= inputs.failures
    try:
        recommended = evaluation_results.recommendation_of(inputs)
    except LeakageError:
        recommended = {"name": None, "best_single": None}
    if name is not None and name not in {model.name for model in inputs.models}:
        raise UserError(f"{name}: {failures.get(name, 'built from other checkpoints than the catalog holds')}")
    evaluation = OwnEvaluation(
        store,
        inputs,
        {ensemble: saved[ensemble] for ensemble in inputs.ensembles},
        inputs.members,
        selected,
        recommended,
        name,
        failures,
    )
    return evaluation if name is None else _of_one_model(evaluation, name)


def _of_one_model(evaluation: OwnEvaluation, name: str) -> OwnEvaluation:
    """The evaluation restricted to the members of one model, and to members of its peers that are among them."""
    model_members = evaluation.saved[name].ensemble.members if name in evaluation.saved else (name,)
    needed_members = {
        *model_members,
        *([evaluation.best_single] if evaluation.best_single in evaluation.inputs.members else []),
    }
    saved = {
        ensemble: entry
        for ensemble, entry in evaluation.saved.items()
        if ensemble in (name, SOFT_VOTING) and needed_members.issuperset(entry.ensemble.members)
    }
    runs_all = needed_members.issuperset(member.name for member in evaluation.selected)
    members = {member: each for member, each in evaluation.members.items() if member in needed_members}
    return replace(evaluation, saved=saved, members=members, selected=evaluation.selected if runs_all else [])


def earlier_images(store: Store, members: Mapping[str, Member]) -> dict[str, str]:
    """{SHA-256: description} of all images used in fits or selections: train, val and the members' training lists.

    Test images are included if a member was trained on them. The audit of near duplicates adds contents here.
    """
    catalog = store.catalog
    lineages = [each for member in members.values() for each in training_data.lineage(catalog, member)]
    splits = ["train", "val"] + (["test"] if any(each.trained_on == training_data.ALL for each in lineages) else [])
    description_of: dict[str, str] = {}
    for each in lineages:
        if each.trained_on == training_data.FILE and each.source != "derived":
            listed = training_data.listed_contents(store, each)
            description_of |= dict.fromkeys(listed, f"an image that {each.name} was trained on")
    for split in splits:
        images = store.images(split)
        names = (f"{split}/{sample_id}" for sample_id in images.sample_ids)
        description_of |= dict(zip(images.contents, names, strict=True))
    return description_of


def unreadable_images(evaluation: OwnEvaluation, images: ImageSplit) -> dict[str, str]:
    """Decode the images for all networks that run; returns {image: reason} of unreadable ones."""
    store = evaluation.store
    reasons = image_splits.decode_readable(
        images,
        evaluation.preprocessings,
        image_cache=store.workspace.image_cache,
        threads=image_splits.decoding_threads(store.config.dataset.num_workers),
    )
    # Of files with equal content, one is decoded, so a reason applies to all of them.
    of_content = {
        content: reasons[path] for path, content in zip(images.paths, images.contents, strict=True) if path in reasons
    }
    return {
        name: of_content[content]
        for name, content in zip(images.sample_ids, images.contents, strict=True)
        if content in of_content
    }


def gather_external(
    evaluation: OwnEvaluation, images: ImageSplit, listed: LabelledImages, settings: EvaluationSettings, n_copies: int
) -> EvaluationInputs:
    """The models on the images of an external set; `listed` has the same images in the same order."""
    store = evaluation.store.with_images(images)
    settings = replace(settings, split=images.split, model_name=evaluation.model_name)
    inputs = evaluation_inputs.gather(
        store, evaluation.saved, evaluation.members, evaluation.selected, settings, inputs_digest=""
    )
    groups = external_groups(store, inputs.rows.sample_ids.tolist(), listed)
    # A distribution shift is no evidence on a member's training data; teachers have no predictions on these images.
    return replace(inputs, dropped=n_copies, groups=groups, declared=(), controls={})


def external_groups(store: Store, sample_ids: Sequence[str], listed: LabelledImages) -> np.ndarray | None:
    """Group index (N,) of images, by the source's groups, `dataset.group_regex` and equal contents."""
    row_of = {name: row for row, name in enumerate(listed.names)}
    rows = [row_of[sample_id] for sample_id in sample_ids]
    groups = grouping.group_indices(
        store,
        [listed.names[row] for row in rows],
        [listed.contents[row] for row in rows],
        [listed.groups[row] for row in rows],
    )
    return groups if len(np.unique(groups)) < len(groups) else None


def require_options(split: str, *, allow_contaminated: bool) -> None:
    """Raise ConfigError for options of `evaluate` that have no effect on an external set."""
    wrong = [*(["--split"] if split != "test" else []), *(["--allow-contaminated"] if allow_contaminated else [])]
    if wrong:
        raise ConfigError(
            f"evaluate --data: not together with {' and '.join(wrong)}; images of train and val are left out"
        )
