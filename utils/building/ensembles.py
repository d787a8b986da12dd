"""Ensembles on disk: fitted combiner, members, cross-fitted predictions and provenance."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np

from utils import ensemble_methods, fusion_methods, meta_methods, moe_methods, stacking_methods
from utils.building.command_hints import build_command, rebuild_hint
from utils.combiners import pruning
from utils.combiners.protocol import Combiner, combiner_inputs, fit_nested
from utils.core.artifacts import (
    digest_of,
    open_array,
    read_arrays,
    read_tensors,
    write_array,
    write_arrays,
    write_json,
    write_tensors,
    write_text,
)
from utils.core.errors import UserError, nearest_first
from utils.core.links import remove_file
from utils.core.parsed_files import record_once
from utils.core.record_forms import Each, Form
from utils.core.workspace import SPLITS, Workspace
from utils.predictions import training_data
from utils.predictions.catalog import LAST_EPOCH, Catalog, Member
from utils.predictions.rows import Rows
from utils.predictions.store import Store

SCHEMA = 3
VERSION = 12  # incremented when the same inputs would give a different ensemble
INNER_CROSSFIT = "inner_crossfit.npy"
"""float32 (K, N, C): probabilities by copies without each of the K `inner_folds` of `ensemble.json` and without the
row's fold; rows as in `crossfit.npz`, NaN where there is no such copy."""
BASELINES = "baselines.npz"
"""float64 (N,) for each baseline that the ensemble was compared with: its log-loss on each row, in nats."""
FORM: Form = {
    **dict.fromkeys(("members", "candidates", "classes"), Each(str, list)),
    **dict.fromkeys(("fitted_on", "selected_on"), Each(dict, list)),
    "member_digests": Each(str),
    "texts": Each({"name": str, "sha256": str}),
    **dict.fromkeys(("method", "inputs_digest"), str),
    "weights?": Each(float),
    **dict.fromkeys(("temperature?", "share_of_stacker?", "seed?"), float),
    **dict.fromkeys(("unknown_training_data?", "notes?", "overrides?"), Each(str, list)),
    **dict.fromkeys(("verdict?", "inference?", "best_single?", "baselines_digest?"), str),
    **dict.fromkeys(("guards?", "crossfit?", "training_data?"), dict),
}
"""Types of the entries of every `ensemble.json`."""
COMBINERS: dict[str, type[Combiner]] = {
    **ensemble_methods.COMBINERS,
    **ensemble_methods.SAVED_AS,
    **pruning.COMBINERS,
    **stacking_methods.COMBINERS,
    **fusion_methods.COMBINERS,
    **moe_methods.COMBINERS,
    **meta_methods.COMBINERS,
}
NAMES = {method: f"{method}_ensemble" for method in ensemble_methods.COMBINERS}
"""{method: name of its ensemble}; the configuration accepts both."""


@dataclass(frozen=True)
class RowSet:
    """Sample ids of one split, and the kind of predictions that was used for them."""

    split: str
    rows: str
    """oof, held_out or in_sample"""
    sample_ids: tuple[str, ...]

    def as_record(self) -> dict[str, Any]:
        """Return the entry of `ensemble.json`; the ids themselves are in `provenance.npz`."""
        return {
            "split": self.split,
            "rows": self.rows,
            "n": len(self.sample_ids),
            "digest": digest_of(sorted(self.sample_ids)),
        }


@dataclass(frozen=True)
class Provenance:
    """Rows that an ensemble was fitted or selected on."""

    fitted_on: tuple[RowSet, ...]
    """Rows whose labels were used to fit a parameter, of the combiner or of a member's network."""
    selected_on: tuple[RowSet, ...]
    """Rows that were used for a selection, such as that of an epoch or a method."""
    unknown_training_data: tuple[str, ...] = ()
    """Networks whose training data is not stated, so that any row may be among `fitted_on`; sorted"""


def merge_provenance(parts: Sequence[Provenance]) -> Provenance:
    """Return the union of the parts' rows, one set per split and kind."""

    def union(sets: Iterable[RowSet]) -> tuple[RowSet, ...]:
        ids: dict[tuple[str, str], set[str]] = {}
        for rows in sets:
            ids.setdefault((rows.split, rows.rows), set()).update(rows.sample_ids)
        return tuple(RowSet(split, kind, tuple(sorted(names))) for (split, kind), names in sorted(ids.items()))

    return Provenance(
        union(rows for part in parts for rows in part.fitted_on),
        union(rows for part in parts for rows in part.selected_on),
        tuple(sorted({name for part in parts for name in part.unknown_training_data})),
    )


@dataclass(frozen=True)
class Ensemble:
    """A fitted combiner and everything that is needed to use and to evaluate it."""

    name: str
    method: str
    members: tuple[str, ...]
    """Members that are needed at inference, sorted."""
    candidates: tuple[str, ...]
    """Members that the combiner was fitted on, sorted."""
    classes: tuple[str, ...]
    combiner: Combiner
    provenance: Provenance
    inputs_digest: str
    """Digest of members, predictions, configuration and folds; ensembles with equal digests are equal."""
    member_digests: dict[str, str]
    seed: int
    inference: str = "full"
    """Networks that predict for its members: `full` networks, or the mean of their fold networks (`folds`)."""
    training_data: Mapping[str, Sequence[str]] = field(default_factory=dict)
    """`training_data.stated` of the candidates at the time of the build"""


@dataclass(frozen=True)
class Crossfit:
    """Predictions on out-of-sample rows by copies of the unfitted combiner that read no label of the row's fold."""

    probabilities: np.ndarray
    """float32 (N, C)"""
    labels: np.ndarray
    """int64 (N,)"""
    sample_ids: np.ndarray
    """unicode (N,)"""
    split: np.ndarray
    """unicode (N,)"""
    fold: np.ndarray
    """int64 (N,)"""
    inner: Mapping[int, np.ndarray] = field(default_factory=dict)
    """{fold: float32 (N, C)}: probabilities by copies without this fold and the row's (`protocol.NestedPredictions`);
    empty if there are none, and if they were not read"""

    def keys(self) -> list[tuple[str, str]]:
        """Return (split, sample id) of each row."""
        return list(zip(self.split.tolist(), self.sample_ids.tolist(), strict=True))


def predict(ensemble: Ensemble, rows: Rows) -> np.ndarray:
    """Return probabilities float64 (N, C). Raises UserError if members, classes or networks are not the ensemble's."""
    if rows.members != ensemble.members or rows.classes != ensemble.classes:
        raise UserError(
            f"{ensemble.name}: needs members {', '.join(ensemble.members)} on {len(ensemble.classes)} classes, got "
            f"{', '.join(rows.members)} on {len(rows.classes)}"
        )
    if rows.inference != ensemble.inference:
        raise UserError(f"{ensemble.name}: needs its members' {ensemble.inference} networks, got {rows.inference}")
    if ensemble.combiner.reads_embeddings and rows.embeddings is None:
        raise UserError(f"{ensemble.name}: needs its members' embeddings as well as their logits")
    return ensemble.combiner.predict_proba(combiner_inputs(ensemble.combiner, rows.outputs))


def crossfit(recipe: Combiner, rows: Rows, fold: np.ndarray) -> Crossfit:
    """Fit an unfitted combiner on out-of-sample rows with folds (N,); return its cross-fitted predictions."""
    nested = fit_nested(recipe, combiner_inputs(recipe, rows.outputs), rows.labels, fold)
    return Crossfit(nested.crossfit, rows.labels, rows.sample_ids, rows.split, fold, nested.inner)


def save(
    workspace: Workspace,
    ensemble: Ensemble,
    crossfit: Crossfit,
    record: Mapping[str, Any],
    baseline_losses: Mapping[str, np.ndarray] | None = None,
) -> None:
    """Write an ensemble; `ensemble.json`, which includes `record`, is written last and marks it as complete.

    `baseline_losses` are {baseline: log-loss (N,)} of the baselines that it was compared with, if any.
    """
    folder = workspace.ensemble(ensemble.name)
    remove_file(folder / "ensemble.json")
    for stale in [*folder.glob("predictions_*.npz"), *folder.glob(INNER_CROSSFIT), *folder.glob(BASELINES)]:
        remove_file(stale)
    state = ensemble.combiner.state()
    texts = {
        name.replace("/", "_"): {"name": name, "sha256": sha256(state[name].tobytes()).hexdigest()}
        for name in sorted(state)
        if name.endswith(".json")
    }
    for stale in folder.glob("*booster.json"):
        remove_file(stale)
    for file, text in texts.items():
        write_text(folder / file, state[text["name"]].tobytes().decode())
    tensors = state.keys() - {text["name"] for text in texts.values()}
    write_tensors(folder / "combiner.safetensors", {name: state[name] for name in tensors})
    write_arrays(
        folder / "crossfit.npz",
        {
            "probabilities": crossfit.probabilities.astype(np.float32),
            "labels": crossfit.labels,
            "sample_ids": crossfit.sample_ids,
            "split": crossfit.split,
            "fold": crossfit.fold,
            "classes": np.array(ensemble.classes),
        },
    )
    if baseline_losses:
        write_arrays(folder / BASELINES, dict(baseline_losses))
    inner_folds = sorted(crossfit.inner)
    if inner_folds and ensemble.combiner.learns:
        inner = np.stack([crossfit.inner[fold] for fold in inner_folds])
        write_array(folder / INNER_CROSSFIT, inner.astype(np.float32, copy=False))
    sets = {"fitted_on": ensemble.provenance.fitted_on, "selected_on": ensemble.provenance.selected_on}
    arrays = {
        f"{kind}/{index}/{rows.split}/{rows.rows}": np.array(rows.sample_ids)
        for kind, all_rows in sets.items()
        for index, rows in enumerate(all_rows)
    }
    write_arrays(folder / "provenance.npz", arrays)
    write_json(
        folder / "ensemble.json",
        {
            **record,
            "schema": SCHEMA,
            "inner_folds": inner_folds,
            "texts": texts,
            "name": ensemble.name,
            "method": ensemble.method,
            "members": list(ensemble.members),
            "candidates": list(ensemble.candidates),
            "member_digests": ensemble.member_digests,
            "classes": list(ensemble.classes),
            "inputs_digest": ensemble.inputs_digest,
            "seed": ensemble.seed,
            "inference": ensemble.inference,
            "training_data": dict(ensemble.training_data),
            **{kind: [rows.as_record() for rows in all_rows] for kind, all_rows in sets.items()},
            "unknown_training_data": list(ensemble.provenance.unknown_training_data),
        },
    )


def stored_digest(workspace: Workspace, name: str) -> str | None:
    """Return the `inputs_digest` of a saved ensemble; None if it does not exist."""
    record = record_of(workspace, name)
    return None if record is None else record.get("inputs_digest")


def load(workspace: Workspace, name: str) -> Ensemble:
    """Load a saved ensemble. Raises UserError for an unknown name, with the saved names, and for a damaged folder."""
    record = record_of(workspace, name)
    if record is None:
        saved = names(workspace)
        raise UserError(
            f"{workspace.ensemble(name)}: no such ensemble{nearest_first(name, saved, 'Built so far')}. Build it: "
            f"{build_command(name)}"
        )
    folder = workspace.ensemble(name)
    remedy = rebuild_hint(name)
    try:
        make = COMBINERS[record["method"]]
        return Ensemble(
            name=name,
            method=record["method"],
            members=tuple(record["members"]),
            candidates=tuple(record["candidates"]),
            classes=tuple(record["classes"]),
            combiner=make.from_state(_state(folder, record["texts"], remedy)),
            provenance=_provenance(folder, record, remedy),
            inputs_digest=record["inputs_digest"],
            member_digests=record["member_digests"],
            seed=record["seed"],
            inference=record["inference"],
            training_data=record.get("training_data", {}),
        )
    except (LookupError, TypeError, ValueError, AttributeError) as error:
        raise UserError(f"{folder / 'ensemble.json'}: not the form of an ensemble ({error!r}). {remedy}") from error


def load_crossfit(workspace: Workspace, name: str) -> Crossfit:
    """Load the cross-fitted predictions of a saved ensemble."""
    arrays = read_arrays(workspace.ensemble(name) / "crossfit.npz", remedy=rebuild_hint(name))
    names = ("probabilities", "labels", "sample_ids", "split", "fold")
    probabilities, labels, sample_ids, split, fold = (arrays[name] for name in names)
    return Crossfit(probabilities, labels, sample_ids, split, fold)


def load_baseline_losses(workspace: Workspace, name: str) -> dict[str, np.ndarray]:
    """Load {baseline: log-loss of each row (N,)} of a saved ensemble that was compared with baselines."""
    return read_arrays(workspace.ensemble(name) / BASELINES, remedy=rebuild_hint(name))


def load_nested_crossfit(workspace: Workspace, ensemble: Ensemble) -> Crossfit:
    """Load the cross-fitted predictions of a saved ensemble, with those of copies without two folds if it has any."""
    crossfit = load_crossfit(workspace, ensemble.name)
    folds = (record_of(workspace, ensemble.name) or {}).get("inner_folds", [])
    if not ensemble.combiner.learns:
        return replace(crossfit, inner=dict.fromkeys(folds, crossfit.probabilities))
    if not folds:
        return crossfit
    path, remedy = workspace.ensemble(ensemble.name) / INNER_CROSSFIT, rebuild_hint(ensemble.name)
    inner = open_array(path, remedy=remedy)
    if inner.shape != (len(folds), *crossfit.probabilities.shape):
        raise UserError(
            f"{path}: its shape is {inner.shape}, expected {(len(folds), *crossfit.probabilities.shape)}. {remedy}"
        )
    return replace(crossfit, inner=dict(zip(folds, inner, strict=True)))


def names(workspace: Workspace) -> list[str]:
    """Return the names of the saved ensembles, sorted."""
    return sorted(path.parent.name for path in workspace.models.glob("*/ensemble.json"))


def record_of(workspace: Workspace, name: str) -> dict[str, Any] | None:
    """Return the content of `ensemble.json`; None if the ensemble does not exist."""
    return record_once(workspace.ensemble(name) / "ensemble.json", remedy=rebuild_hint(name), form=FORM)


def _state(folder: Path, texts: Mapping[str, Mapping[str, str]], remedy: str) -> dict[str, np.ndarray]:
    """Read a combiner's `state`: its arrays, and its texts as bytes. Raises UserError for texts with other bytes."""
    state = dict(read_tensors(folder / "combiner.safetensors", remedy=remedy))
    for file, text in texts.items():
        path = folder / Path(file).name
        if not path.is_file():
            raise UserError(f"{path}: missing. {remedy}")
        content = path.read_bytes()
        if sha256(content).hexdigest() != text["sha256"]:
            raise UserError(f"{path}: damaged, its bytes are not those that ensemble.json recorded. {remedy}")
        state[text["name"]] = np.frombuffer(content, dtype=np.uint8)
    return state


def _provenance(folder: Path, record: Mapping[str, Any], remedy: str) -> Provenance:
    arrays = read_arrays(folder / "provenance.npz", remedy=remedy)
    sets: dict[str, list[RowSet]] = {"fitted_on": [], "selected_on": []}
    for key in sorted(arrays):
        kind, _, split, rows = key.split("/")
        sets[kind].append(RowSet(split, rows, tuple(arrays[key].tolist())))
    for kind, row_sets in sets.items():
        if [rows.as_record() for rows in row_sets] != record[kind]:
            raise UserError(f"{folder / 'provenance.npz'}: its ids are not those of ensemble.json. {remedy}")
    unknown = tuple(record.get("unknown_training_data", ()))
    return Provenance(tuple(sets["fitted_on"]), tuple(sets["selected_on"]), unknown)


def is_stated_otherwise(catalog: Catalog, ensemble: Ensemble) -> bool:
    """Return whether the stated training data of the candidates has changed since the ensemble was built."""
    names = ensemble.training_data.keys() & catalog.members.keys()
    before = {name: list(ensemble.training_data[name]) for name in names}
    return before != training_data.stated(catalog, ensemble.candidates)


def network_provenance(store: Store, members: Iterable[Member]) -> Provenance:
    """Return the provenance of the members' networks: rows of their training, and the val rows that selected epochs.

    The same is assumed of imported members, of which nothing is known. Val rows selected nothing for a member whose
    record states the last epoch, and for one that was trained on none of the images. Out-of-sample rows of train and
    val selected the views of a member that averages over views.
    """
    return merge_provenance([_of_network(store, member) for member in members])


def _of_network(store: Store, member: Member) -> Provenance:
    fitted = {split: training_data.fitted_rows(store, member, split) for split in SPLITS}
    may_have_chosen = member.trained_on != training_data.NONE and member.selection != LAST_EPOCH
    val = store.samples("val").sample_ids  # always read, since this refuses images that changed since discovery
    selected_on = [RowSet("val", "held_out", val)] if val and (may_have_chosen or member.views) else []
    if member.views and member.oof is not None:
        selected_on.insert(0, RowSet("train", "oof", store.samples("train").sample_ids))
    return Provenance(
        fitted_on=tuple(RowSet(split, "in_sample", tuple(ids)) for split, ids in fitted.items() if ids),
        selected_on=tuple(selected_on),
        unknown_training_data=(member.name,) if training_data.is_unknown(store.catalog, member) else (),
    )
