"""Selection of the evaluated members and ensembles, and their probabilities on the evaluated rows.

A model without predictions is left out with the reason; the others are evaluated.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from utils.building import ensembles
from utils.building.command_hints import build_command
from utils.building.ensembles import Ensemble, Provenance
from utils.core.artifacts import digest_of, read_arrays, write_arrays
from utils.core.errors import UserError
from utils.core.workspace import Workspace
from utils.numeric import diversity
from utils.numeric.metrics import softmax
from utils.predictions import fold_networks, training_data, view_members
from utils.predictions.catalog import IMPORTED, Catalog, Member
from utils.predictions.rows import Rows
from utils.predictions.store import Store

logger = logging.getLogger("disease_pipeline")

VERSION = 6  # incremented when the same inputs would give different records


@dataclass(frozen=True)
class ScoredModel:
    """One member or ensemble with its probabilities on the evaluated rows."""

    name: str
    kind: str
    """member or ensemble"""
    members: tuple[str, ...]
    probabilities: np.ndarray
    """float64 (N, C)"""
    provenance: Provenance
    disagreement: np.ndarray | None = None
    """Mutual information (N,) of each row's class and the predicting member, in nats; None with one member"""
    inference: str = fold_networks.FULL


def members_to_score(catalog: Catalog, selected: Sequence[Member], saved: Mapping[str, Ensemble]) -> dict[str, Member]:
    """Return the selected members, also without their views, and the members of every saved ensemble, by name."""
    members = {member.name: member for member in (*selected, *view_members.without_views(catalog, selected))}
    for ensemble in saved.values():
        members |= {name: catalog.members[name] for name in ensemble.members if name in catalog.members}
    return dict(sorted(members.items()))


def ranked_members(store: Store, members: Mapping[str, Member]) -> dict[str, Member]:
    """Return the members that are ranked; a derived one that is not selected by name is ranked as its ensemble."""
    selected = store.config.backbones.selected
    return {
        name: member
        for name, member in members.items()
        if member.source != "derived" or name in selected or (member.views and store.config.tta.enable)
    }


def inputs_digest(store: Store, saved: Mapping[str, Ensemble], members: Mapping[str, Member], split: str) -> str:
    """Return the digest of everything that a ranking depends on; no image and no checkpoint is read.

    Checkpoints that are missing leave models without a size, so that the ranking is of other inputs once they are back.
    """
    ensemble_digests = {name: ensemble.inputs_digest for name, ensemble in saved.items()}
    prediction_keys = {name: store.key(member, split) for name, member in members.items()}
    ranked = sorted(ranked_members(store, members))
    config = store.config
    settings = [config.runs.score_ensemble.optimization_metric, config.dataset.group_regex, config.seed]
    stated = training_data.stated(store.catalog, members)
    parts = [VERSION, split, ensemble_digests, prediction_keys, ranked, settings]
    checkpoints = [
        entry["path"] for member in members.values() if member.source != IMPORTED for entry in member.checkpoints
    ]
    missing = sorted(path for path in checkpoints if not (store.workspace.base / path).is_file())
    return digest_of([*parts, *([stated] if stated else []), *([{"missing": missing}] if missing else [])])


def usable_ensembles(catalog: Catalog, saved: Mapping[str, Ensemble]) -> tuple[dict[str, Ensemble], dict[str, str]]:
    """Return the saved ensembles whose members are unchanged, and {ensemble: reason} of those that cannot be evaluated.

    An ensemble that was built from other checkpoints is left out with a warning and is not a failure.
    """
    usable, failures = {}, {}
    for name, ensemble in saved.items():
        missing, changed = fold_networks.missing_and_changed(catalog.members, ensemble)
        if missing:
            failures[name] = (
                f"its member {', '.join(missing)} is no longer in the catalog. Put the checkpoint or the predictions "
                f"back and run discover, or build it without: {build_command(name)} --force"
            )
        elif changed:
            logger.warning("%s was built from other checkpoints than the catalog holds; build it again", name)
        elif ensembles.is_stated_otherwise(catalog, ensemble):
            logger.warning(
                "%s was built before what its members were trained on was stated as it is now; build it again: %s",
                *(name, build_command(name)),
            )
        else:
            usable[name] = ensemble
    return usable, failures


def for_each_member(members: Sequence[Member], action: Callable[[Sequence[Member]], object]) -> dict[str, str]:
    """Apply an action to all members together, or if that fails to one after another; return {member: reason}.

    Raises the first member's UserError if it fails for all.
    """
    try:
        action(members)
        return {}
    except UserError:
        if len(members) < 2:
            raise
    errors: dict[str, UserError] = {}
    for member in members:
        try:
            action([member])
        except UserError as error:
            errors[member.name] = error
    if len(errors) == len(members):
        raise errors[members[0].name]
    return {name: str(error).removeprefix(f"member {name}: ") for name, error in errors.items()}


def require_finite(member: str, split: str, logits: np.ndarray, sample_ids: np.ndarray) -> None:
    """Raise UserError if logits (N, C) contain NaN or infinity."""
    rows = np.flatnonzero(~np.isfinite(logits).all(axis=1))
    if len(rows):
        raise UserError(
            f"member {member}: {len(rows)} row(s) of {split} with NaN or infinity, first {sample_ids[rows[0]]}. Train "
            "it again, or leave it out by backbones.exclude"
        )


def prediction_key(store: Store, ensemble: Ensemble, rows: Rows, split: str) -> str:
    """Return the digest of the inputs of an ensemble's stored predictions on the rows."""
    members = [store.catalog.members[name] for name in ensemble.members]
    keys = [fold_networks.key(store, member, split, ensemble.inference) for member in members]
    return digest_of([VERSION, ensemble.inputs_digest, keys, rows.sample_ids.tolist()])


def without_predictions(workspace: Workspace, ranking: Mapping[str, Any], split: str) -> list[str]:
    """Return the ensembles of a ranking whose predictions are no longer stored, as after a build with `--force`."""
    names = [row["name"] for row in ranking["rows"] if row["kind"] == "ensemble"]
    return [name for name in names if not workspace.ensemble_predictions(name, split).is_file()]


def ensemble_predictions(
    store: Store, ensemble: Ensemble, rows: Rows, split: str, member_outputs: Callable[[], Rows]
) -> dict[str, np.ndarray]:
    """Return an ensemble's `probabilities` (N, C) on the rows, and `mutual_information` (N,) if it has several members.

    They are read from `predictions_<split>.npz`, or computed from `member_outputs()`, the outputs of the networks that
    predict for its members, and written to this file.
    """
    path = store.workspace.ensemble_predictions(ensemble.name, split)
    key = prediction_key(store, ensemble, rows, split)
    if path.is_file():
        stored = read_arrays(path, remedy="Remove it, then evaluate again")
        if str(stored["key"]) == key:
            return stored
    outputs = member_outputs()
    arrays: dict[str, Any] = {"probabilities": ensembles.predict(ensemble, outputs)}
    if len(ensemble.members) > 1:
        arrays["mutual_information"] = diversity.mutual_information(softmax(outputs.logits))
    arrays |= {"labels": outputs.labels, "sample_ids": outputs.sample_ids, "classes": np.array(outputs.classes)}
    write_arrays(path, arrays | {"key": np.array(key)})
    return arrays
