"""What an evaluation on an external set reads: the same models on the own test split and on the set, and its images.

Networks run over the set one at a time, each once; whatever is stored for the same images is used again.
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
    """The models and what is known of them from the workspace."""

    store: Store
    inputs: EvaluationInputs
    """On the own test split"""
    saved: Mapping[str, SavedEnsemble]
    members: Mapping[str, Member]
    """Those that run over the set"""
    selected: Sequence[Member]
    """Selected members, where all of them run"""
    recommended: Mapping[str, Any]
    """By out-of-sample rows, which no external set changes"""
    model_name: str | None
    failures: Mapping[str, str]

    @property
    def best_single(self) -> str | None:
        """The single member that others are compared with."""
        name: str | None = self.recommended["best_single"]
        return name

    @property
    def preprocessings(self) -> list[Any]:
        """Of the members that run."""
        return [member.image_preprocessing for member in self.members.values()]


def gather_own(store: Store, settings: EvaluationSettings) -> OwnEvaluation:
    """Read the models and their test rows; predictions on test that are missing are made.

    Raises UserError where no network is left, for an unknown model, and for one that cannot be evaluated.
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
    own = OwnEvaluation(
        store,
        inputs,
        {ensemble: saved[ensemble] for ensemble in inputs.ensembles},
        inputs.members,
        selected,
        recommended,
        name,
        failures,
    )
    return own if name is None else _of_one_model(own, name)


def _of_one_model(own: OwnEvaluation, name: str) -> OwnEvaluation:
    """With the members that answer for one model, and those of what it is compared with where they are among them."""
    answering = own.saved[name].ensemble.members if name in own.saved else (name,)
    needed = {*answering, *([own.best_single] if own.best_single in own.inputs.members else [])}
    saved = {
        ensemble: entry
        for ensemble, entry in own.saved.items()
        if ensemble in (name, SOFT_VOTING) and needed.issuperset(entry.ensemble.members)
    }
    runs_all = needed.issuperset(member.name for member in own.selected)
    members = {member: each for member, each in own.members.items() if member in needed}
    return replace(own, saved=saved, members=members, selected=own.selected if runs_all else [])


def earlier_images(store: Store, members: Mapping[str, Member]) -> dict[str, str]:
    """{SHA-256: what it is} of all images that a fit or a choice may have seen: train, val and what members list.

    Test images count where a member was trained on them. The audit of near duplicates adds contents here.
    """
    catalog = store.catalog
    lineages = [each for member in members.values() for each in training_data.lineage(catalog, member)]
    splits = ["train", "val"] + (["test"] if any(each.trained_on == training_data.ALL for each in lineages) else [])
    known: dict[str, str] = {}
    for each in lineages:
        if each.trained_on == training_data.FILE and each.source != "derived":
            listed = training_data.listed_contents(store, each)
            known |= dict.fromkeys(listed, f"an image that {each.name} was trained on")
    for split in splits:
        images = store.images(split)
        names = (f"{split}/{sample_id}" for sample_id in images.sample_ids)
        known |= dict(zip(images.contents, names, strict=True))
    return known


def unreadable_images(own: OwnEvaluation, images: ImageSplit) -> dict[str, str]:
    """Decode the images for all networks that run; {image: reason} of those that cannot be."""
    store = own.store
    reasons = image_splits.decode_readable(
        images,
        own.preprocessings,
        image_cache=store.workspace.image_cache,
        threads=image_splits.decoding_threads(store.config.dataset.num_workers),
    )
    # Of several files with equal content one is decoded, so a reason holds for all of them.
    of_content = {
        content: reasons[path] for path, content in zip(images.paths, images.contents, strict=True) if path in reasons
    }
    return {
        name: of_content[content]
        for name, content in zip(images.sample_ids, images.contents, strict=True)
        if content in of_content
    }


def gather_external(
    own: OwnEvaluation, images: ImageSplit, listed: LabelledImages, settings: EvaluationSettings, n_copies: int
) -> EvaluationInputs:
    """The models on the images of an external set, which `listed` names in the same order."""
    store = own.store.with_images(images)
    settings = replace(settings, split=images.split, model_name=own.model_name)
    inputs = evaluation_inputs.gather(store, own.saved, own.members, own.selected, settings, inputs_digest="")
    groups = external_groups(store, inputs.rows.sample_ids.tolist(), listed)
    # A shift of the images is no evidence on what a member was trained on; teachers have not answered these images.
    return replace(inputs, dropped=n_copies, groups=groups, declared=(), controls={})


def external_groups(store: Store, sample_ids: Sequence[str], listed: LabelledImages) -> np.ndarray | None:
    """Group index (N,) of some images, by the source's groups, `dataset.group_regex` and equal contents."""
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
    """Raise ConfigError for options of `evaluate` that an external set has no use for."""
    wrong = [*(["--split"] if split != "test" else []), *(["--allow-contaminated"] if allow_contaminated else [])]
    if wrong:
        raise ConfigError(
            f"evaluate --data: not together with {' and '.join(wrong)}; images of train and val are left out"
        )
