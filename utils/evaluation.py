"""`evaluate`: every member and ensemble scored on rows it has never seen, ranked, with the recommended one named."""

from __future__ import annotations

import logging
import platform
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import datetime
from typing import Any

import numpy as np

from utils import catalog, ensembles, fold_networks
from utils.artifacts import digest_of, read_arrays, read_record, write_arrays, write_json
from utils.catalog import IMPORTED, Catalog, Member
from utils.config import Config
from utils.ensembles import Ensemble, Provenance
from utils.errors import ContaminatedError, UserError, did_you_mean
from utils.metrics import METRICS, point_metrics, softmax
from utils.predictions import IMPORT, Store
from utils.results import Result
from utils.rows import UNKNOWN, Rows, align
from utils.workspace import Workspace

logger = logging.getLogger("disease_pipeline")

VERSION = 1  # raised whenever the same inputs would give other records
NOT_MEASURED = "not measured by this version"


@dataclass(frozen=True)
class Scored:
    """One member or ensemble on the evaluated rows."""

    name: str
    kind: str
    members: tuple[str, ...]
    probabilities: np.ndarray
    """float64 (N, C)"""
    provenance: Provenance
    config_digest: str | None


def evaluate(
    config: Config,
    workspace: Workspace,
    *,
    split: str = "test",
    model_name: str | None = None,
    allow_contaminated: bool = False,
    force: bool = False,
) -> Result:
    """Score all members and ensembles, or the one named, and write `metrics.json` of each and `ranking.json`.

    Raises UserError without catalog or ensembles, and for an unknown name; ContaminatedError when the one asked for by
    name was fitted on evaluated rows, unless `allow_contaminated`.
    """
    found = catalog.load(workspace)
    store = Store(config, workspace, found)
    saved = {name: ensembles.load(workspace, name) for name in ensembles.names(workspace)}
    selected = catalog.select(found, config)
    members = members_to_score(found, selected, saved)
    if model_name is not None and model_name not in [*saved, *members]:
        known = [*saved, *members]
        raise UserError(
            f"--model-name {model_name}: neither a member nor an ensemble. Ensembles are built by: python "
            f"ensemble_orchestrator.py build-ensemble. Known: {', '.join(known)}{did_you_mean(model_name, known)}"
        )
    if not saved:
        logger.warning("no ensemble is built; members alone are scored. Run build-ensemble first")
    key = inputs_digest(store, saved, members, split)
    ranking = read_record(workspace.ranking(split), remedy="Remove it, then evaluate again")
    if ranking and ranking.get("inputs_digest") == key and not force and model_name is None:
        return _present(workspace, ranking, split, "up to date")
    stale = [name for name, ensemble in saved.items() if _is_stale(found.members, ensemble)]
    for name in stale:
        logger.warning("%s was built from other checkpoints than the catalog holds; build it again", name)
        del saved[name]
    store.ensure(list(members.values()), ("val", split) if split != "val" else ("val",))
    rows, dropped = _evaluated_rows(store, members, split)
    scored = _score_all(store, saved, members, rows, split)
    contaminated = {item.name: _overlap(item.provenance.fitted_on, rows) for item in scored}
    if model_name is not None and contaminated[model_name] and not allow_contaminated:
        raise ContaminatedError(
            f"{model_name}: {contaminated[model_name]} of {len(rows.labels)} rows of {split} gave it its "
            "parameters, so the score would flatter it. Use another split, or --allow-contaminated to see it marked"
        )
    own = _answering_alone(config, members)
    recommended = ensembles.recommended(store, own, saved)
    ranked = {}
    for item in scored:
        if item.name == model_name or (model_name is None and (item.name in saved or item.name in own)):
            ranked[item.name] = _write_metrics(workspace, item, rows, split, dropped, store)
    if model_name is not None:
        text = _one(workspace, ranked[model_name], model_name in saved, split)
        return Result(text, ranked[model_name])
    metric = config.runs.score_ensemble.optimization_metric
    ranking = _ranking(ranked, {item.name: item.kind for item in scored}, split, metric) | {
        "recommended": {name: recommended[name] for name in ("name", "reason", "evidence")},
        "peers": {
            "best_single": recommended["best_single"],
            "soft_voting": "soft_voting_ensemble" if "soft_voting_ensemble" in saved else None,
            "greedy_selection_ensemble": None,
        },
        "inputs_digest": key,
    }
    write_json(workspace.ranking(split), ranking)
    store.digests.save()
    return _present(workspace, ranking, split, "written")


def members_to_score(found: Catalog, selected: Sequence[Member], saved: Mapping[str, Ensemble]) -> dict[str, Member]:
    """Members of the configuration and of every saved ensemble."""
    chosen = {member.name: member for member in selected}
    for ensemble in saved.values():
        chosen |= {name: found.members[name] for name in ensemble.members if name in found.members}
    return dict(sorted(chosen.items()))


def _answering_alone(config: Config, members: Mapping[str, Member]) -> dict[str, Member]:
    """Members with a rank of their own; a derived one that nobody names is ranked as the ensemble made of it."""
    named = config.backbones.selected
    return {name: member for name, member in members.items() if member.source != "derived" or name in named}


def inputs_digest(store: Store, saved: Mapping[str, Ensemble], members: Mapping[str, Member], split: str) -> str:
    """Everything a ranking depends on; found without opening an image or a checkpoint."""
    built_from = {name: ensemble.inputs_digest for name, ensemble in saved.items()}
    run_on = {name: store.key(member, split) for name, member in members.items()}
    own = sorted(_answering_alone(store.config, members))
    return digest_of([VERSION, split, built_from, run_on, own, store.config.runs.score_ensemble.optimization_metric])


def _is_stale(members: Mapping[str, Member], ensemble: Ensemble) -> bool:
    digests = ensemble.member_digests
    return any(
        name not in members or fold_networks.digest(members[name], ensemble.inference) != digests[name]
        for name in ensemble.members
    )


def _evaluated_rows(store: Store, members: Mapping[str, Member], split: str) -> tuple[Rows, int]:
    """All members on the split, less rows without a label and rows whose content is that of a train or val image."""
    rows = align({name: [store.rows(member, split)] for name, member in members.items()}, store.catalog.classes)
    copies = _copies(store, rows, split) if store.catalog.has_images else []
    for sample_id, twin in copies[:5]:
        logger.warning("evaluate: %s/%s is the same image as %s and is left out", split, sample_id, twin)
    if copies:
        logger.warning("evaluate: %d row(s) left out for every member and ensemble", len(copies))
    unknown = rows.labels == UNKNOWN
    if unknown.any():
        logger.warning("evaluate: %d of %d row(s) of %s are left out: no label", unknown.sum(), len(unknown), split)
    if unknown.all():
        raise UserError(f"{split}: no row has a label. Write labels into {split}.npz of any member, then: {IMPORT}")
    keep = ~np.isin(rows.sample_ids, [sample_id for sample_id, _ in copies]) & ~unknown
    if not keep.any():
        raise UserError(f"{split}: every image is also a train or val image. Split the images anew")
    return rows.take(np.flatnonzero(keep)), len(copies)


def _copies(store: Store, rows: Rows, split: str) -> list[tuple[str, str]]:
    """(sample id, train or val sample of the same content) of the evaluated rows that have one."""
    seen = {
        content: f"{other}/{sample_id}"
        for other in ("train", "val")
        if other != split
        for sample_id, content in zip(store.images(other).sample_ids, store.images(other).contents, strict=True)
    }
    images = store.images(split)
    content_of = dict(zip(images.sample_ids, images.contents, strict=True))
    return [(sample_id, seen[content_of[sample_id]]) for sample_id in rows.sample_ids if content_of[sample_id] in seen]


def _score_all(
    store: Store, saved: Mapping[str, Ensemble], members: Mapping[str, Member], rows: Rows, split: str
) -> list[Scored]:
    networks = ensembles.network_provenance(store)
    scored = [
        Scored(name, "member", (name,), softmax(rows.logits[rows.members.index(name)]), networks, None)
        for name in members
    ]
    for name, ensemble in saved.items():
        own = _answers(store, ensemble, rows, split)
        probabilities = _stored_predictions(store, ensemble, own, split)
        record = store.config.digest("runs.score_ensemble")
        scored.append(Scored(name, "ensemble", ensemble.members, probabilities, ensemble.provenance, record))
    return scored


def _answers(store: Store, ensemble: Ensemble, rows: Rows, split: str) -> Rows:
    """What the networks that answer for the ensemble's members give on the rows."""
    if ensemble.inference == fold_networks.FULL:
        places = [rows.members.index(name) for name in ensemble.members]
        return replace(rows, members=ensemble.members, logits=rows.logits[places])
    members = [store.catalog.members[name] for name in ensemble.members]
    fold_networks.ensure(store, members, (split,), ensemble.inference)
    found = fold_networks.aligned(store, members, split, ensemble.inference)
    return found.take(np.flatnonzero(np.isin(found.sample_ids, rows.sample_ids)))


def _stored_predictions(store: Store, ensemble: Ensemble, rows: Rows, split: str) -> np.ndarray:
    """The ensemble's probabilities on the rows, kept as `predictions_<split>.npz` for whoever asks again."""
    path = store.workspace.ensemble(ensemble.name) / f"predictions_{split}.npz"
    members = [store.catalog.members[name] for name in ensemble.members]
    keys = [fold_networks.key(store, member, split, ensemble.inference) for member in members]
    key = digest_of([ensemble.inputs_digest, keys, rows.sample_ids.tolist()])
    if path.is_file():
        arrays = read_arrays(path, remedy="Remove it, then evaluate again")
        if str(arrays["key"]) == key:
            return arrays["probabilities"]
    probabilities = ensembles.predict(ensemble, rows)
    arrays = {"probabilities": probabilities, "labels": rows.labels, "sample_ids": rows.sample_ids}
    write_arrays(path, arrays | {"classes": np.array(rows.classes), "key": np.array(key)})
    return probabilities


def _overlap(sets: Sequence[ensembles.RowSet], rows: Rows) -> int:
    """How many evaluated rows are among the given ones, by (split, sample id)."""
    known = {(part.split, sample_id) for part in sets for sample_id in part.sample_ids}
    return sum(key in known for key in zip(rows.split.tolist(), rows.sample_ids.tolist(), strict=True))


def _write_metrics(
    workspace: Workspace, item: Scored, rows: Rows, split: str, dropped: int, store: Store
) -> dict[str, Any]:
    """`metrics.json` of one member or ensemble; what this version does not measure is null, with the reason."""
    record = point_metrics(item.probabilities, rows.labels, rows.classes)
    fitted, selected = _overlap(item.provenance.fitted_on, rows), _overlap(item.provenance.selected_on, rows)
    unmeasured = ("ci95", "vs_best_single", "vs_soft_voting", "latency_ms")
    notes = record.pop("notes") | dict.fromkeys(unmeasured, NOT_MEASURED)
    imported = [name for name in item.members if store.catalog.members[name].source == IMPORTED]
    if imported:
        notes |= dict.fromkeys(("latency_ms", "size_mb"), f"known by predictions alone: {', '.join(imported)}")
    if not store.catalog.has_images:
        notes["overlap.dropped"] = "there are no images, so that equal samples under two names cannot be told"
    weights, unseen = {item.name: 1.0}, None
    if item.kind == "ensemble":
        saved = read_record(workspace.ensemble(item.name) / "ensemble.json", remedy="Build the ensemble again")
        weights, unseen = saved.get("weights"), saved["crossfit"] | {"log_loss_ci95": None}
        if weights is None:
            notes["weights"] = f"{saved['method']} is no weighted mean of its members"
        notes["crossfit.log_loss_ci95"] = NOT_MEASURED
    else:
        notes["crossfit"] = "a single member is not fitted on predictions"
    record |= dict.fromkeys(unmeasured)
    record |= {
        "name": item.name,
        "split": split,
        "members": list(item.members),
        "weights": weights,
        "size_mb": None if imported else _size_mb(store, item.members),
        "crossfit": unseen,
        "fitted_on": [part.as_record() for part in item.provenance.fitted_on],
        "selected_on": [part.as_record() for part in item.provenance.selected_on],
        "contaminated": fitted > 0,
        "optimistic": selected > 0,
        "overlap": {"fitted": fitted, "selected": selected, "dropped": dropped},
        "config_digest": item.config_digest,
        "seed": store.config.seed,
        "versions": {"python": platform.python_version(), "numpy": np.__version__},
        "created": datetime.now().astimezone().isoformat(timespec="seconds"),
        "notes": notes,
    }
    place = workspace.ensemble_metrics if item.kind == "ensemble" else workspace.member_metrics
    write_json(place(item.name, split), record)
    return record


def _size_mb(store: Store, members: Sequence[str]) -> float:
    files = [store.workspace.base / store.catalog.members[name].checkpoints[0]["path"] for name in members]
    return round(sum(file.stat().st_size for file in files) / 1e6, 3)


def _ranking(ranked: Mapping[str, Any], kinds: Mapping[str, str], split: str, metric: str) -> dict[str, Any]:
    """Rows in order: the metric, then log-loss, then name; contaminated ones at the end without a rank."""
    higher_is_better = METRICS[metric][1]

    def place(name: str) -> tuple[bool, float, float, str]:
        record = ranked[name]
        value = -record[metric] if higher_is_better else record[metric]
        return record["contaminated"], value, record["log_loss"], name

    rows = []
    for rank, name in enumerate(sorted(ranked, key=place), start=1):
        record = ranked[name]
        columns = ("accuracy", "f1_macro", "log_loss", "ece", "ci95", "contaminated", "optimistic")
        rank_or_none = None if record["contaminated"] else rank
        rows.append({"rank": rank_or_none, "name": name, "kind": kinds[name]} | {key: record[key] for key in columns})
    n = next(iter(ranked.values()))["n_samples"]
    return {"split": split, "n": n, "order": [metric, "log_loss", "name"], "rows": rows}


def _present(workspace: Workspace, ranking: Mapping[str, Any], split: str, state: str) -> Result:
    width = max(len(row["name"]) for row in ranking["rows"])
    chosen = ranking["recommended"]
    lines = [
        f"{split} split, {ranking['n']} samples, ordered by {ranking['order'][0]}",
        f"rank  {'name':{width}}  kind      accuracy  F1 macro  log-loss  ECE",
    ]
    for row in ranking["rows"]:
        marks = [mark for mark in ("contaminated", "optimistic") if row[mark]]
        marks += ["recommended"] if row["name"] == chosen["name"] else []
        rank = "-" if row["rank"] is None else row["rank"]
        lines.append(
            f"{rank:>4}  {row['name']:{width}}  {row['kind']:8}  {row['accuracy']:8.4f}  {row['f1_macro']:8.4f}  "
            f"{row['log_loss']:8.4f}  {row['ece']:.4f}{'  ' + ', '.join(marks) if marks else ''}"
        )
    evidence = chosen["evidence"]
    low, high = evidence["log_loss_ci95"]
    lines.append(
        f"recommended: {chosen['name']} ({chosen['reason']}; {evidence['n']} honest rows, {evidence['rows']}: log-loss "
        f"{evidence['log_loss']:.4f} [{low:.4f}, {high:.4f}], accuracy {evidence['accuracy']:.4f})"
    )
    lines.append(f"{state}: {workspace.ranking(split)}")
    return Result("\n".join(lines), dict(ranking))


def _one(workspace: Workspace, record: Mapping[str, Any], is_ensemble: bool, split: str) -> str:
    place = workspace.ensemble_metrics if is_ensemble else workspace.member_metrics
    marks = [mark for mark in ("contaminated", "optimistic") if record[mark]]
    return (
        f"{record['name']} on {split}: accuracy {record['accuracy']:.4f}, F1 macro {record['f1_macro']:.4f}, log-loss "
        f"{record['log_loss']:.4f}, ECE {record['ece']:.4f}{', ' + ', '.join(marks) if marks else ''}\n"
        f"written: {place(record['name'], split)}"
    )
