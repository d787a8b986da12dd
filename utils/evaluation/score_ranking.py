"""`evaluate`: every member and ensemble scored on rows it has never seen, ranked, with the recommended one named."""

from __future__ import annotations

import logging
import sys
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from utils.building import ensembles, latency, recommendation
from utils.building.ensembles import Ensemble
from utils.core.artifacts import read_record, write_json, write_text
from utils.core.config import Config
from utils.core.errors import ConfigError, ContaminatedError, UserError, did_you_mean
from utils.core.results import Result
from utils.core.workspace import Workspace
from utils.evaluation import leaderboard, plots, score_records, scoring
from utils.evaluation.score_records import EvaluationContext, UncertaintyOptions
from utils.evaluation.scoring import ScoredModel
from utils.numeric import label_issues
from utils.numeric.metrics import METRICS, softmax
from utils.numeric.statistics import holm
from utils.predictions import catalog
from utils.predictions.catalog import IMPORTED, Member
from utils.predictions.rows import Rows
from utils.predictions.store import Store

logger = logging.getLogger("disease_pipeline")

SOFT_VOTING = "soft_voting_ensemble"
COLUMNS = ("accuracy", "f1_macro", "log_loss", "ece", "ci95", "contaminated", "optimistic")
COMPARED = ("vs_best_single", "vs_soft_voting")
SIMPLE = {"soft_voting": SOFT_VOTING, "greedy_selection_ensemble": "greedy_selection_ensemble"}
"""Ensembles that others are held against, by what the ranking calls them."""


def evaluate(
    config: Config,
    workspace: Workspace,
    *,
    split: str = "test",
    model_name: str | None = None,
    allow_contaminated: bool = False,
    alpha: float = UncertaintyOptions.alpha,
    target_risk: float = UncertaintyOptions.target_risk,
    wanted_error: float | None = None,
    class_conditional: bool = False,
    force: bool = False,
) -> Result:
    """Score all members and ensembles, or the one named, and write `metrics.json` of each, plots, ranking and tables.

    A member or ensemble that cannot be scored is left out and named in the result's failures. Raises UserError without
    catalog or ensembles, for an unknown name, and where nothing or not the one named can be scored; ConfigError for
    shares that are none; ContaminatedError when the one asked for by name was fitted on evaluated rows, unless
    `allow_contaminated`.
    """
    if wanted_error is not None:
        logger.warning("evaluate: --wanted-error is deprecated; use --target-risk %g instead", wanted_error)
        target_risk = wanted_error
    options = _checked(UncertaintyOptions(alpha, target_risk, class_conditional))
    found = catalog.load(workspace)
    store = Store(config, workspace, found)
    saved = {name: ensembles.load(workspace, name) for name in ensembles.names(workspace)}
    selected = catalog.select(found, config)
    members = scoring.members_to_score(found, selected, saved)
    _require_known(model_name, [*saved, *members])
    if not saved:
        logger.warning("no ensemble is built; members alone are scored. Run build-ensemble first")
    key = scoring.inputs_digest(store, saved, members, split)
    before = read_record(workspace.ranking(split), remedy="Remove it, then evaluate again")
    if model_name is None and not force and _is_current(before, key, options):
        return _present(workspace, before, split, "up to date")
    saved, failures = scoring.usable(found, saved)
    there, silent = scoring.answering(store, members, split)
    failures |= silent
    rows, dropped = scoring.evaluated_rows(store, there, split)
    scored, unscored = scoring.score_all(store, saved, there, rows, split)
    failures |= unscored
    by_name = {item.name: item for item in scored}
    if model_name is not None:
        _require(by_name, model_name, failures, rows, split, allowed=allow_contaminated)
    alone = scoring.ranked_alone(store, there)
    # Who is recommended is a matter of honest rows; members without rows of this split may have them.
    honest = {name: members[name] for name in members if name in there or not store.is_available(members[name], split)}
    recommended = recommendation.recommended(store, scoring.ranked_alone(store, honest), saved)
    items = [item for item in scored if item.name in saved or item.name in alone]
    if model_name is not None:
        items = [by_name[model_name]]
    references = {
        "vs_best_single": by_name.get(recommended["best_single"]),
        "vs_soft_voting": by_name.get(SOFT_VOTING) or _plain_mean(rows, [member.name for member in selected], there),
    }
    context = EvaluationContext(
        store,
        rows,
        split,
        items,
        dropped=dropped,
        references=references,
        options=options,
        **_latencies(store, items, saved, split),
    )
    records, pictures = {}, []
    for item in items:
        records[item.name] = score_records.record(item, saved.get(item.name), context)
        _write(workspace, item, records[item.name])
        if item.kind == "ensemble" or model_name is not None:
            pictures += _pictures(workspace, item, records[item.name])
    plots.draw_all(pictures)
    store.digests.save()
    if model_name is not None:
        return Result(_one(workspace, records[model_name], by_name[model_name].kind, split), records[model_name])
    kinds = {item.name: item.kind for item in items}
    return _ranked(context, saved, records, kinds, recommended, failures, key)


def _ranked(
    context: EvaluationContext,
    saved: Mapping[str, Ensemble],
    records: Mapping[str, Mapping[str, Any]],
    kinds: Mapping[str, str],
    recommended: Mapping[str, Any],
    failures: Mapping[str, str],
    key: str,
) -> Result:
    """Write the ranking of all that was scored, as a record and as tables; `key` tells whether it is still current."""
    store, split, workspace = context.store, context.split, context.store.workspace
    ranking = _ranking(records, kinds, split, store.config.runs.score_ensemble.optimization_metric) | {
        "recommended": {name: recommended[name] for name in ("name", "reason", "evidence")},
        "peers": {"best_single": recommended["best_single"]}
        | {kind: name if name in saved else None for kind, name in SIMPLE.items()},
        "label_issues": _label_issues(store, recommended["name"], saved),
        "left_out": failures,
        "options": context.options.as_record(),
        "inputs_digest": key,
    }
    for suffix, text_of in leaderboard.WRITERS.items():
        write_text(workspace.ranking_table(split, suffix), text_of(ranking))
    write_json(workspace.ranking(split), ranking)
    return _present(workspace, ranking, split, "written")


def _checked(options: UncertaintyOptions) -> UncertaintyOptions:
    told = {"--alpha": options.alpha, "--target-risk": options.target_risk}
    wrong = [f"{option} {value:g}" for option, value in told.items() if not 0 < value < 1]
    if wrong:
        raise ConfigError(f"evaluate {' '.join(wrong)}: expected a share of rows between 0 and 1, such as 0.1")
    return options


def _require_known(name: str | None, known: Sequence[str]) -> None:
    """Raise UserError for a name that no member or ensemble has."""
    if name is not None and name not in known:
        raise UserError(
            f"--model-name {name}: neither a member nor an ensemble. Ensembles are built by: python "
            f"ensemble_orchestrator.py build-ensemble. Known: {', '.join(known)}{did_you_mean(name, known)}"
        )


def _is_current(ranking: Mapping[str, Any] | None, key: str, options: UncertaintyOptions) -> bool:
    """Whether a ranking is what would be found now; with something left out it may not be, once that is mended."""
    if not ranking or ranking.get("inputs_digest") != key or ranking.get("left_out"):
        return False
    return ranking.get("options") == options.as_record()


def _require(
    scored: Mapping[str, ScoredModel], name: str, failures: Mapping[str, str], rows: Rows, split: str, *, allowed: bool
) -> None:
    """Raise where the one asked for cannot be scored, or was fitted on the rows and that is not `allowed`."""
    if name not in scored:
        raise UserError(f"{name}: {failures.get(name, 'built from other checkpoints than the catalog holds')}")
    fitted = scoring.overlap(scored[name].provenance.fitted_on, rows)
    if fitted and not allowed:
        raise ContaminatedError(
            f"{name}: {fitted} of {len(rows.labels)} rows of {split} gave it its "
            "parameters, so the score would flatter it. Use another split, or --allow-contaminated to see it marked"
        )


def _plain_mean(rows: Rows, selected: Sequence[str], there: Mapping[str, Member]) -> ScoredModel | None:
    """Soft voting of the configuration's members, where it is not built."""
    names = tuple(name for name in selected if name in there)
    if not names:
        return None
    places = [rows.members.index(name) for name in names]
    mean = softmax(rows.logits[places]).mean(axis=0)
    return ScoredModel(SOFT_VOTING, "ensemble", names, mean, ensembles.Provenance((), ()))


def _latencies(store: Store, items: Sequence[ScoredModel], saved: Mapping[str, Ensemble], split: str) -> dict[str, Any]:
    """`latencies` of networks, `combiners`, and why something is `unmeasured`; of what is scored, measured once."""
    catalogued = store.catalog.members
    run = [item for item in items if all(catalogued[name].source != IMPORTED for name in item.members)]
    members = [catalogued[name] for name in sorted({name for item in run for name in item.members})]
    found: dict[str, latency.Record] = {}
    unmeasured: dict[str, str] = {}

    def measure(some: Sequence[Member]) -> None:
        found.update(latency.measure(store, some))

    try:
        unmeasured = scoring.each(members, measure)
    except UserError as error:
        unmeasured = {member.name: str(error) for member in members}
    combiners = {
        item.name: latency.measure_combiner(
            store,
            saved[item.name].inputs_digest,
            item.name,
            saved[item.name].combiner.to_module,
            (len(item.members), item.probabilities.shape[1]),
            _widths(store, saved[item.name], split),
        )
        for item in run
        if item.name in saved
    }
    return {"latencies": found, "combiners": combiners, "unmeasured": unmeasured}


def _widths(store: Store, ensemble: Ensemble, split: str) -> list[int]:
    """Of its members' embeddings, where its combiner reads them."""
    if not ensemble.combiner.reads_embeddings:
        return []
    members = [store.catalog.members[name] for name in ensemble.members]
    parts = [store.rows(member, split, embeddings=True).embeddings for member in members]
    return [part.shape[1] for part in parts if part is not None]


def _write(workspace: Workspace, item: ScoredModel, record: Mapping[str, Any]) -> None:
    place = workspace.ensemble_metrics if item.kind == "ensemble" else workspace.member_metrics
    write_json(place(item.name, record["split"]), record)


def _pictures(workspace: Workspace, item: ScoredModel, record: Mapping[str, Any]) -> list[plots.Picture]:
    name = item.name if item.kind == "ensemble" else f"members/{item.name}"
    return [plots.Picture(kind, record, workspace.plot(name, kind, record["split"])) for kind in plots.KINDS]


def _ranking(records: Mapping[str, Any], kinds: Mapping[str, str], split: str, metric: str) -> dict[str, Any]:
    """Rows in order: the metric, then log-loss, then name; contaminated ones at the end without a rank."""
    higher_is_better = METRICS[metric][1]

    def place(name: str) -> tuple[bool, float, float, str]:
        record = records[name]
        value = -record[metric] if higher_is_better else record[metric]
        return record["contaminated"], value, record["log_loss"], name

    corrected = {}
    for key in COMPARED:
        tested = {name: record[key]["mcnemar_p"] for name, record in records.items() if _is_tested(record, key)}
        corrected[key] = holm(tested)
    rows = []
    for rank, name in enumerate(sorted(records, key=place), start=1):
        record = records[name]
        row = {"rank": None if record["contaminated"] else rank, "name": name, "kind": kinds[name]}
        row |= {key: record[key] for key in COLUMNS}
        for key in COMPARED:
            against = record[key]
            row[key] = None if against is None else against | {"mcnemar_p_holm": corrected[key].get(name)}
        rows.append(row)
    n = next(iter(records.values()))["n_samples"]
    return {"split": split, "n": n, "order": [metric, "log_loss", "name"], "rows": rows}


def _is_tested(record: Mapping[str, Any], key: str) -> bool:
    """A contaminated one is no candidate, so that its test costs the others nothing."""
    return record[key] is not None and not record["contaminated"]


def _label_issues(store: Store, name: str, saved: Mapping[str, Ensemble]) -> dict[str, Any]:
    """Write labels in doubt, by the honest answers of the recommended one; gives what the ranking says of them."""
    workspace, classes = store.workspace, store.catalog.classes
    if name in saved:
        unseen = score_records.crossfitted_predictions(store, name)
    else:
        unseen = score_records.member_predictions(store, store.catalog.members[name])
    issues = label_issues.find_label_issues(unseen.probabilities, unseen.labels)
    splits, ids = unseen.split.tolist(), unseen.sample_ids.tolist()
    files: dict[tuple[str, str], str] = {}
    for split in sorted(set(splits)) if store.catalog.has_images else ():
        images = store.images(split)
        paths = zip(images.sample_ids, images.paths, strict=True)
        files |= {(split, sample_id): workspace.relative(path) for sample_id, path in paths}
    places = [files.get(key, "") for key in zip(splits, ids, strict=True)]
    place = workspace.label_issues("csv")
    text = label_issues.issues_csv(issues, unseen.probabilities, unseen.labels, splits, ids, places, classes)
    write_text(place, text)
    facts = {"model": name, "n": len(ids), "in_doubt": len(issues.rows)}
    thresholds = [None if np.isnan(value) else float(value) for value in issues.thresholds]
    detail = {"classes": list(classes), "thresholds": thresholds, "confident_joint": issues.counts.tolist()}
    write_json(workspace.label_issues("json"), facts | detail)
    return facts


def _present(workspace: Workspace, ranking: Mapping[str, Any], split: str, state: str) -> Result:
    text = leaderboard.text(ranking, styled=leaderboard.is_terminal(sys.stdout))
    doubt = ranking["label_issues"]
    lines = [text]
    if doubt["in_doubt"]:
        rows = f"{doubt['in_doubt']} of {doubt['n']} honest rows"
        lines.append(f"labels in doubt: {rows}, by {doubt['model']}: {workspace.label_issues('csv')}")
    lines.append(f"{state}: {workspace.ranking(split)}")
    failures = [f"{name}: {reason}" for name, reason in sorted(ranking["left_out"].items())]
    return Result("\n".join(lines), dict(ranking), failures)


def _one(workspace: Workspace, record: Mapping[str, Any], kind: str, split: str) -> str:
    place = workspace.ensemble_metrics if kind == "ensemble" else workspace.member_metrics
    marks = [mark for mark in ("contaminated", "optimistic") if record[mark]]
    low, high = record["ci95"]["accuracy"]
    return (
        f"{record['name']} on {split}: accuracy {record['accuracy']:.4f} [{low:.4f}, {high:.4f}], F1 macro "
        f"{record['f1_macro']:.4f}, log-loss {record['log_loss']:.4f}, ECE {record['ece']:.4f}"
        f"{', ' + ', '.join(marks) if marks else ''}\n"
        f"written: {place(record['name'], split)}"
    )
