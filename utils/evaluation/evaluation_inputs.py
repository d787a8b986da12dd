"""The first step of `evaluate`: read all inputs of the computation, each record and each array once."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from utils.building import ensembles
from utils.building.ensembles import Crossfit, Ensemble
from utils.core.errors import UserError
from utils.core.workspace import Workspace
from utils.distillation import controls
from utils.evaluation import costs, evaluated_rows, score_plots, scoring
from utils.evaluation.costs import Costs
from utils.evaluation.scoring import ScoredModel
from utils.numeric import selective, uncertainty
from utils.numeric.metrics import softmax
from utils.predictions import extraction, fold_networks
from utils.predictions.catalog import Catalog, Member, is_declared
from utils.predictions.row_groups import row_groups
from utils.predictions.rows import MemberRows, Rows, align
from utils.predictions.store import Store


@dataclass(frozen=True)
class UncertaintyOptions:
    """Options of `evaluate` on conformal sets and abstention."""

    alpha: float = uncertainty.ALPHA
    """Fraction of rows whose conformal set may miss the true class"""
    target_risk: float = selective.TARGET_RISK
    """Target selective risk: error rate among the rows that are answered"""
    class_conditional: bool = False
    """Whether conformal sets with one threshold per class are measured as well"""

    def as_record(self) -> dict[str, Any]:
        """Return the options as a ranking stores them, under the keys on disk."""
        return {
            "alpha": self.alpha,
            "wanted_error": self.target_risk,
            "class_conditional": self.class_conditional,
        }


@dataclass(frozen=True)
class EvaluationSettings:
    """Split, models and options of an evaluation."""

    split: str
    model_name: str | None
    """The single model to evaluate; None for all models, with ranking and report"""
    allow_contaminated: bool
    metric: str
    """Key of `metrics.METRICS` that orders the ranking"""
    seed: int
    options: UncertaintyOptions
    columns: Sequence[str] | None = None
    """Metrics in the tables of the ranking; None for the default ones"""
    plots: str = score_plots.COMPARED
    """Models whose plots are drawn, one of `score_plots.SELECTIONS`; a model evaluated alone counts as compared"""

    def ranking_options(self) -> dict[str, Any]:
        """Return the options as a ranking stores them."""
        columns = None if self.columns is None else list(self.columns)
        return self.options.as_record() | {"metrics": columns, "plots": self.plots}


@dataclass(frozen=True)
class SavedEnsemble:
    """A saved ensemble with its record."""

    ensemble: Ensemble
    record: Mapping[str, Any]
    """Content of `ensemble.json`"""


@dataclass(frozen=True)
class EvaluationInputs:
    """All inputs of an evaluation."""

    settings: EvaluationSettings
    inputs_digest: str
    catalog: Catalog
    ensembles: Mapping[str, SavedEnsemble]
    """Ensembles whose members are unchanged"""
    members: Mapping[str, Member]
    """Members with predictions on the split"""
    ranked: Mapping[str, Member]
    """Those of `members` that are part of the ranking"""
    declared: Sequence[str]
    """Members that the user has declared, whose training data is stated by the user"""
    selected: Sequence[str]
    """Members that the configuration selects"""
    candidates: Sequence[str]
    """Members that may be recommended, including those without rows of the split"""
    rows: Rows
    """All members on the evaluated rows"""
    dropped: int
    """Rows that are left out as copies of train or val images"""
    groups: np.ndarray | None
    """Group index of each row (N,); None if rows are independent"""
    earlier_groups: Mapping[tuple[str, str], int]
    """{(split, sample id): group} of the rows of train and val; empty if they are independent"""
    contents: Mapping[tuple[str, str], str]
    """{(split, sample id): SHA-256 of the image} of the evaluated rows and of val; empty without images"""
    models: Sequence[ScoredModel]
    out_of_sample: Mapping[str, Sequence[MemberRows]]
    """{member: its out-of-sample rows, one part per available split of train and val}"""
    crossfits: Mapping[str, Crossfit]
    """{ensemble: its cross-fitted predictions}"""
    fold_rows: Mapping[str, MemberRows]
    """{member: rows of the split by its fold networks}, if an ensemble uses them"""
    controls: Mapping[str, controls.Controls]
    """{distilled ensemble: predictions of its teacher and of the network trained without one}"""
    costs: Costs
    image_paths: Mapping[tuple[str, str], str]
    """{(split, sample id): file in the workspace} of the out-of-sample rows; empty without images"""
    failures: Mapping[str, str]
    """{member or ensemble: why it cannot be evaluated}"""

    @property
    def split(self) -> str:
        """The evaluated split."""
        return self.settings.split

    def groups_of(self, keys: Iterable[tuple[str, str]]) -> np.ndarray | None:
        """Return the group index (N,) of rows of train and val; None if they are independent."""
        return np.array([self.earlier_groups[key] for key in keys]) if self.earlier_groups else None

    def uniforms(self, keys: Iterable[tuple[str, str]]) -> np.ndarray:
        """Return numbers (N,) for randomised conformal sets, from image contents, or from sample ids without images."""
        return uncertainty.uniform_numbers(self.contents.get(key, key[1]) for key in keys)

    def val_rows(self, member: str) -> MemberRows | None:
        """Return a member's out-of-sample rows of val; None if it has none."""
        return next((part for part in self.out_of_sample.get(member, ()) if part.split == "val"), None)


def read_ensembles(workspace: Workspace) -> dict[str, SavedEnsemble]:
    """Read all saved ensembles, by name. Raises UserError for a damaged one."""
    saved = {}
    for name in ensembles.names(workspace):
        ensemble = ensembles.load(workspace, name)
        saved[name] = SavedEnsemble(ensemble, ensembles.record_of(workspace, name) or {})
    return saved


def gather(
    store: Store,
    saved: Mapping[str, SavedEnsemble],
    members: Mapping[str, Member],
    selected: Sequence[Member],
    settings: EvaluationSettings,
    inputs_digest: str,
) -> EvaluationInputs:
    """Read the inputs of an evaluation; missing predictions and latencies are computed first.

    Raises UserError if no member has predictions on the split.
    """
    split = settings.split
    usable, failures = scoring.usable_ensembles(store.catalog, {name: entry.ensemble for name, entry in saved.items()})
    failures |= scoring.for_each_member(
        list(members.values()), lambda batch: extraction.ensure(store, batch, sorted({"val", split}))
    )
    streamed = {name: member for name, member in members.items() if name not in failures}
    with_val = {name: member for name, member in streamed.items() if store.is_available(member, "val")}
    _, unreadable = _open(store, with_val, "val")
    split_rows, failed = _open(store, {name: m for name, m in streamed.items() if name not in unreadable}, split)
    failures |= unreadable | failed
    evaluated = {name: member for name, member in streamed.items() if name in split_rows}
    rows, dropped = evaluated_rows.evaluated_rows(store, {name: split_rows[name] for name in evaluated}, split)
    models = [
        ScoredModel(
            name,
            "member",
            (name,),
            softmax(rows.logits[rows.members.index(name)]),
            ensembles.network_provenance(store, [member]),
        )
        for name, member in evaluated.items()
    ]
    fold_rows, unstreamed = _open_fold_rows(store, usable, evaluated, split)
    embedded: dict[str, MemberRows] = {}
    for name, ensemble in usable.items():
        try:
            models.append(_scored_ensemble(store, ensemble, rows, fold_rows, unstreamed, embedded))
        except UserError as error:
            failures[name] = str(error)
    candidates = scoring.ranked_members(
        store,
        {name: m for name, m in members.items() if name in evaluated or not store.is_available(m, split)},
    )
    out_of_sample = store.out_of_sample_parts([members[name] for name in {**evaluated, **candidates}])
    scored = {model.name: model for model in models}
    ranked = scoring.ranked_members(store, evaluated)
    costed = [model for model in models if _is_evaluated(model, settings, ranked)]
    return EvaluationInputs(
        settings=settings,
        inputs_digest=inputs_digest,
        catalog=store.catalog,
        ensembles={name: saved[name] for name in usable},
        members=evaluated,
        ranked=ranked,
        declared=[name for name, member in evaluated.items() if is_declared(store.workspace, member)],
        selected=[member.name for member in selected],
        candidates=list(candidates),
        rows=rows,
        dropped=dropped,
        groups=row_groups(store, zip(rows.split.tolist(), rows.sample_ids.tolist(), strict=True)),
        earlier_groups=_earlier_groups(store),
        contents=_contents(store, {"val", split}),
        models=models,
        out_of_sample=out_of_sample,
        crossfits={name: ensembles.load_crossfit(store.workspace, name) for name in usable},
        fold_rows=fold_rows,
        controls={
            name: control
            for name in usable
            if name in scored and (control := controls.read_controls(store.workspace, name)) is not None
        },
        costs=costs.measure_costs(store, costed, usable, split, embedded),
        image_paths=_image_paths(store),
        failures=failures,
    )


def _is_evaluated(model: ScoredModel, settings: EvaluationSettings, ranked: Mapping[str, Member]) -> bool:
    """Return whether a model gets a record: the model named in the settings, or any ensemble and ranked member."""
    if settings.model_name is not None:
        return model.name == settings.model_name
    return model.kind == "ensemble" or model.name in ranked


def _open(store: Store, members: Mapping[str, Member], split: str) -> tuple[dict[str, MemberRows], dict[str, str]]:
    """Return {member: its rows of a split}, and {member: why they cannot be used}."""
    opened: dict[str, MemberRows] = {}

    def read(batch: Sequence[Member]) -> None:
        for member in batch:
            if member.name not in opened:
                opened[member.name] = store.rows(member, split)
            part = opened[member.name]
            scoring.require_finite(member.name, split, part.logits, part.sample_ids)

    failures = scoring.for_each_member(list(members.values()), read)
    return {name: part for name, part in opened.items() if name not in failures}, failures


def _open_fold_rows(
    store: Store, saved: Mapping[str, Ensemble], members: Mapping[str, Member], split: str
) -> tuple[dict[str, MemberRows], dict[str, str]]:
    """Return {member: rows of the split by its fold networks}, for ensembles that use them, and {member: why missing}.

    Fold networks that have not run on the split run first.
    """
    names = {name for e in saved.values() if e.inference == fold_networks.FOLDS for name in e.members}
    opened: dict[str, MemberRows] = {}

    def read(batch: Sequence[Member]) -> None:
        fold_networks.ensure(store, batch, (split,), fold_networks.FOLDS)
        for member in batch:
            opened[member.name] = fold_networks.rows(store, member, split, fold_networks.FOLDS)

    try:
        failures = scoring.for_each_member([members[name] for name in sorted(names & members.keys())], read)
    except UserError as error:  # all members failed; the full networks can still be evaluated
        failures = dict.fromkeys(names, str(error))
    return opened, failures


def _scored_ensemble(
    store: Store,
    ensemble: Ensemble,
    rows: Rows,
    fold_rows: Mapping[str, MemberRows],
    unstreamed: Mapping[str, str],
    embedded: dict[str, MemberRows],
) -> ScoredModel:
    """Return an ensemble with its predictions on the rows; rows with embeddings are added to the cache `embedded`.

    Raises UserError if a member has no predictions.
    """
    split = str(rows.split[0])
    absent = [member for member in ensemble.members if member not in rows.members]
    if absent:
        raise UserError(f"its member {', '.join(absent)} has no predictions on the rows of {split}")

    def member_outputs() -> Rows:
        if ensemble.inference == fold_networks.FULL and not ensemble.combiner.reads_embeddings:
            indices = [rows.members.index(name) for name in ensemble.members]
            return replace(rows, members=ensemble.members, logits=rows.logits[indices])
        failed = [name for name in ensemble.members if ensemble.inference == fold_networks.FOLDS and name in unstreamed]
        if failed:
            raise UserError(f"its member {failed[0]}: {unstreamed[failed[0]]}")
        parts = dict(fold_rows)
        if ensemble.combiner.reads_embeddings:  # embeddings are the full network's; fold networks share no space
            parts = costs.open_embedded(store, ensemble.members, split, embedded)
        if ensemble.combiner.reads_embeddings and ensemble.inference == fold_networks.FOLDS:
            parts = {name: replace(part, logits=fold_rows[name].logits) for name, part in parts.items()}
        aligned = align({name: [parts[name]] for name in ensemble.members}, store.catalog.classes)
        aligned = replace(aligned, inference=ensemble.inference)
        return aligned.take(np.flatnonzero(np.isin(aligned.sample_ids, rows.sample_ids)))

    arrays = scoring.ensemble_predictions(store, ensemble, rows, split, member_outputs)
    return ScoredModel(
        ensemble.name,
        "ensemble",
        ensemble.members,
        arrays["probabilities"],
        ensemble.provenance,
        arrays.get("mutual_information"),
        ensemble.inference,
    )


def _image_paths(store: Store) -> dict[tuple[str, str], str]:
    """Return {(split, sample id): file in the workspace} of train and val images; empty without images."""
    paths: dict[tuple[str, str], str] = {}
    for split in ("train", "val") if store.catalog.has_images else ():
        images = store.images(split)
        pairs = zip(images.sample_ids, images.paths, strict=True)
        paths |= {(split, sample_id): store.workspace.relative(path) for sample_id, path in pairs}
    return paths


def _earlier_groups(store: Store) -> dict[tuple[str, str], int]:
    """Return {(split, sample id): group} of all train and val rows; empty if all rows are independent."""
    keys = [(split, sample_id) for split in ("train", "val") for sample_id in store.samples(split).sample_ids]
    groups = row_groups(store, keys)
    return {} if groups is None else dict(zip(keys, groups.tolist(), strict=True))


def _contents(store: Store, splits: Iterable[str]) -> dict[tuple[str, str], str]:
    """Return {(split, sample id): SHA-256 of the image}; empty without images."""
    contents: dict[tuple[str, str], str] = {}
    for split in splits if store.catalog.has_images else ():
        images = store.images(split)
        pairs = zip(images.sample_ids, images.contents, strict=True)
        contents |= {(split, sample_id): content for sample_id, content in pairs}
    return contents
