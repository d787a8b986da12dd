"""The sections of the report as values of the template: rows of tables, figures, captions."""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from utils.building.command_hints import build_command
from utils.core import config_file, remembered
from utils.core.config import Config
from utils.core.display_text import (
    NOT_MEASURED,
    format_count,
    format_interval,
    format_number,
    format_percent,
    join_names,
)
from utils.core.program_names import as_typed
from utils.evaluation.report import report_figures, report_summary
from utils.evaluation.report.report_data import ReportData, busy_cores, median_milliseconds, without_temperature
from utils.numeric.metrics import reliability
from utils.numeric.pareto import pareto_front
from utils.predictions.catalog import IMPORTED

NONE = "-"
PROGRAM = ("python", "ensemble_orchestrator.py")
MAX_CONFUSION_CLASSES = 200  # a larger confusion matrix is not readable
MAX_OPEN_CLASSES = 60  # a longer table of classes is collapsed


def cards(data: ReportData) -> list[dict[str, str]]:
    """Return the main metrics of the focus that are measured."""
    record, bounds = data.evaluated, data.evaluated.get("ci95") or {}
    interval = format_interval([100 * bound for bound in bounds["accuracy"]], 1) if bounds.get("accuracy") else ""
    latency, size = median_milliseconds(record), record.get("size_mb")
    shown = [
        {"word": "Accuracy", "value": format_percent(record["accuracy"]), "more": interval},
        {
            "word": "F1 macro",
            "value": format_number(record["f1_macro"], 3),
            "more": format_interval(bounds.get("f1_macro"), 3),
        },
        {
            "word": "Log-loss",
            "value": format_number(record["log_loss"], 3),
            "more": format_interval(bounds.get("log_loss"), 3),
        },
        {"word": "Calibration error", "value": format_percent(record["ece"]), "more": ""},
        {
            "word": "One image",
            "value": NOT_MEASURED if latency is None else f"{latency:.1f} ms",
            "more": _device(record) + (", measured on a busy machine" if busy_cores(record) is not None else ""),
        },
        {"word": "Weights", "value": NOT_MEASURED if size is None else f"{size:,.1f} MB", "more": ""},
    ]
    return [card for card in shown if card["value"] != NOT_MEASURED]


def cost(data: ReportData) -> dict[str, Any]:
    """Return Pareto fronts of accuracy and latency, and of accuracy and size, with a row for every model."""
    latencies = {name: median_milliseconds(record) for name, record in data.metrics.items()}
    sizes = {name: record.get("size_mb") for name, record in data.metrics.items()}
    figures, fronts = [], {}
    axes = (("latency", "milliseconds for one image (median)", latencies), ("size", "MB of weights", sizes))
    for kind, axis, costs in axes:
        points = {name: (cost, data.metrics[name]["accuracy"]) for name, cost in costs.items() if cost is not None}
        fronts[kind] = _front(points)
        if not points:
            figures.append({"title": axis, "svg": "", "caption": f"Accuracy against {axis}: {NOT_MEASURED}."})
            continue
        label = f"Accuracy on {data.counted_rows} against {axis}. Pareto front: {join_names(sorted(fronts[kind]), 8)}"
        svg = report_figures.front(points, fronts[kind], data.focus, axis, label)
        figures.append({"title": axis, "svg": svg, "caption": f"{label}."})
    rows = [
        {
            "name": name,
            "accuracy": format_percent(data.metrics[name]["accuracy"]),
            "latency": format_number(latencies[name], 2),
            "busy": busy_cores(data.metrics[name]) is not None,
            "batch": format_number(median_milliseconds(data.metrics[name], "batch_32"), 1),
            "size": format_number(sizes[name], 2),
            "front": " and ".join(kind for kind in fronts if name in fronts[kind]) or NONE,
        }
        for name in data.metrics
    ]
    return {"figures": figures, "rows": rows, "device": _device(data.evaluated), "busy": report_summary.busy(data)}


def _front(points: Mapping[str, tuple[float, float]]) -> set[str]:
    """Return the names of the points {name: (cost, score)} on the Pareto front of low cost and high score."""
    names = list(points)
    costs = np.array([(cost, -score) for cost, score in points.values()]).reshape(-1, 2)
    return {name for name, is_on_front in zip(names, pareto_front(costs), strict=True) if is_on_front}


def _device(record: Mapping[str, Any]) -> str:
    latency = record.get("latency_ms") or {}
    device = str(latency.get("device")).replace("cpu", "CPU")
    return f"{device}, {format_count(latency['threads'], 'thread')}" if latency.get("threads") else ""


def calibration(data: ReportData) -> dict[str, Any]:
    """Return reliability diagrams of the best single model and of the focus, before and after its temperature."""
    panels = []
    before = without_temperature(data)
    for kind in ("best_single", "soft_voting") if before is None else ("best_single",):
        if kind in data.peers and data.metrics[data.peers[kind]].get("reliability"):
            panels.append((data.peers[kind], data.metrics[data.peers[kind]]["reliability"]))
    if data.predictions is not None:
        if before is not None:
            panels.append(("before the temperature", reliability(before, data.predictions.labels)))
        panels.append((data.focus, reliability(data.predictions.probabilities, data.predictions.labels)))
    elif data.evaluated.get("reliability"):
        panels.append((data.focus, data.evaluated["reliability"]))
    temperature = data.record.get("temperature")
    if before is None:
        remark = f"{data.focus} is not scaled by a temperature."
    else:
        remark = f"Its temperature of {temperature:.3g} was fitted on other rows." if temperature else ""
    label = (
        f"Reliability diagrams on {data.counted_rows}: accuracy against confidence; the diagonal is perfect calibration"
    )
    svg = report_figures.reliability(panels, label) if panels else ""
    caption = f"{label}. Bars: number of rows by confidence. {remark}"
    names = [name for name in dict.fromkeys([data.focus, *data.peers.values()]) if name in data.metrics]
    rows = [
        {"name": name}
        | {
            key: format_number(data.metrics[name].get(key))
            for key in ("ece", "ece_adaptive", "mce", "brier", "log_loss")
        }
        for name in names
    ]
    return {"figure": {"svg": svg, "caption": caption}, "rows": rows}


def uncertainty(data: ReportData) -> dict[str, Any]:
    """Return risk-coverage curves, and the metrics of conformal sets."""
    curves = {}
    for name in dict.fromkeys([data.focus, *data.peers.values()]):
        curve = data.metrics[name].get("selective") or {}
        if curve.get("coverage") and curve.get("risk"):
            curves[name] = (curve["coverage"], curve["risk"])
    label = (
        f"Selective risk on {data.counted_rows}: error rate among the most confident rows, against the fraction of "
        "rows; lower is better"
    )
    svg = report_figures.risk_coverage(curves, label) if curves else ""
    sets = [
        {
            "kind": kind.upper(),
            "target": format_percent(1 - measured["alpha"], 0),
            "coverage": format_percent(measured.get("coverage")),
            "bounds": format_interval([100 * bound for bound in measured["coverage_interval"]], 1)
            if measured.get("coverage_interval")
            else "",
            "size": format_number(measured.get("mean_size"), 2),
            "n": measured.get("n", NOT_MEASURED),
        }
        for kind, measured in (data.evaluated.get("conformal") or {}).items()
        if isinstance(measured, Mapping) and measured.get("alpha") is not None
    ]
    selective = data.evaluated.get("selective") or {}
    return {
        "figure": {"svg": svg, "caption": f"{label}." if svg else f"{label}: {NOT_MEASURED}."},
        "sets": sets,
        "aurc": format_number(selective.get("aurc")),
        "threshold": selective.get("threshold"),
        "target_risk": report_summary.target_risk(selective),
        "answered": format_percent(selective.get("answered")),
        "error": format_percent(selective.get("error")),
        "ood": _out_of_distribution(data.evaluated.get("out_of_distribution")),
    }


def _out_of_distribution(scores: Mapping[str, Any] | None) -> str:
    """Return a sentence on the fraction of rows with high OOD scores; "" without scores."""
    beyond = {key: scores[key]["beyond"] for key in ("energy", "max_logit") if scores and scores.get(key)}
    if not scores or not beyond:
        return ""
    fractions = " and ".join(f"{format_percent(value)} ({key.replace('_', ' ')})" for key, value in beyond.items())
    limits = scores.get("limits", "an indication, not a test")
    return f"Rows with a higher OOD score than 95% of the val rows: {fractions}; 5% are expected ({limits})."


def errors(data: ReportData) -> dict[str, Any]:
    """Return confusion matrices, the most frequent errors and metrics per class."""
    figures = []
    for name in dict.fromkeys([data.focus, *data.peers.values()]):
        record = data.metrics[name]
        classes = [name for name in data.classes if name in record["per_class"]]
        if len(classes) > MAX_CONFUSION_CLASSES:
            figures.append(
                {
                    "title": name,
                    "svg": "",
                    "caption": f"{name}: a confusion matrix of {len(classes)} classes is not drawn.",
                }
            )
            continue
        n_errors = record["n_samples"] - int(np.trace(np.asarray(record["confusion_matrix"])))
        n_rows = record["n_samples"]
        rows_of_split = f"{format_count(n_rows, 'row')} of {data.split}"
        label = f"Confusion matrix of {name}: {format_count(n_errors, 'error')} on {rows_of_split}"
        svg = report_figures.confusion(record["confusion_matrix"], classes, label)
        figures.append({"title": name, "svg": svg, "caption": f"{label}. Colours: fractions of the true class."})
    single = data.peers.get("best_single")
    single_scores = data.metrics[single]["per_class"] if single else {}
    rows = [
        {
            "name": name,
            "precision": format_number(scores["precision"], 3),
            "recall": format_number(scores["recall"], 3),
            "f1": format_number(scores["f1"], 3),
            **{key: _defined(scores.get(key)) for key in ("specificity", "average_precision", "roc_auc")},
            "negative": _defined(scores.get("negative_predictive_value")),
            "single": format_number(single_scores[name]["f1"], 3) if name in single_scores else NONE,
            "support": scores["support"],
        }
        for name in data.classes
        if (scores := data.evaluated["per_class"].get(name)) is not None
    ]
    return {"figures": figures, "pairs": report_summary.most_confused(data), "rows": rows, "single": single}


def _defined(value: float | None) -> str:
    """Format a metric of a class, which is undefined if all or no rows belong to the class."""
    return NONE if value is None else format_number(value, 3)


def members(data: ReportData) -> dict[str, Any] | None:
    """Return the contributions of the members; None with fewer than two members that share out-of-sample rows."""
    contributions = data.contributions
    if contributions is None:
        return None
    weights = data.record.get("weights") or {}
    rows = [
        {
            "name": name,
            "weight": format_percent(weights[name]) if name in weights else NONE,
            "accuracy": format_percent(contributions.accuracy[index]),
            "log_loss": format_number(contributions.log_loss[index]),
            "without": f"{contributions.without[index]:+.4f}",
            "only_correct": int(contributions.only_correct[index]),
        }
        for index, name in enumerate(contributions.names)
    ]
    label = (
        f"Correlation of the errors of each pair of {len(contributions.names)} members on {contributions.rows:,} "
        "out-of-sample rows; 0 where errors are independent"
    )
    svg = report_figures.pairs(contributions.pairs.error_correlation, contributions.names, label)
    average = contributions.pairs.mean_among(range(len(contributions.names))) or {}
    return {
        "rows": rows,
        "n": f"{contributions.rows:,}",
        "mean_log_loss": format_number(contributions.mean_log_loss),
        "figure": {
            "svg": svg,
            "caption": f"{label}. An ensemble gains most from members with weakly correlated errors.",
        },
        "average": {
            key.replace("_", " ").replace("q statistic", "Q statistic"): format_number(value, 3)
            for key, value in average.items()
        },
        "weighted": bool(weights),
        "note": (data.evaluated.get("notes") or {}).get("weights", ""),
    }


def provenance(config: Config, data: ReportData) -> dict[str, Any]:
    """Return the rows that the focus was fitted and selected on, versions, digests and commands for reproduction."""
    record = data.evaluated
    rows = [
        {
            "use": use,
            "split": part["split"],
            "rows": part["rows"].replace("_", " "),
            "n": part["n"],
            "digest": part["digest"][:12],
        }
        for use, key in (("fitted on", "fitted_on"), ("selected on", "selected_on"))
        for part in record.get(key) or ()
    ]
    members = [
        {
            "name": member.name,
            "architecture": member.architecture,
            "source": member.source,
            "preprocessing": "none" if member.img_size is None else member.image_preprocessing.describe(),
            "digest": member.digest[:12],
        }
        for member in data.members
    ]
    base_back = data.catalog.base_back
    facts = {
        "project": f"{config.project.name}, version {config.project.version}",
        "written": record.get("created"),
        "seed": record.get("seed"),
        "configuration": f"{_config_source(config, data.workspace.config)}, digest {config.digest()[:12]}",
        "workspace": str(data.workspace.base),
        "output": str(data.workspace.output) if data.workspace.output else None,
        "base pipeline": f"{base_back.get('kind')}, digest {str(base_back.get('digest'))[:12]}",
        "inputs": str(data.ranking.get("inputs_digest", ""))[:12] or None,
        "versions": ", ".join(f"{name} {version}" for name, version in (record.get("versions") or {}).items()),
    }
    return {
        "rows": rows,
        "members": members,
        "facts": {key: value for key, value in facts.items() if value not in (None, "")},
        "commands": commands(config, data),
        "unmeasured": sorted((record.get("notes") or {}).items()),
    }


def commands(config: Config, data: ReportData) -> list[str]:
    """Return the commands that reproduce the report."""
    lines = [["discover"]]
    if data.record:
        lines.append(build_command(data.focus).split()[len(PROGRAM) :])
    lines.append(["evaluate", "--force", *([] if data.split == "test" else ["--split", data.split])])
    return [_as_typed(line, config, data) for line in lines]


def next_steps(config: Config, data: ReportData) -> list[dict[str, str]]:
    """Return `{purpose, command}` of next steps with the recommended model, as typed for this workspace."""
    exportable = all(member.source != IMPORTED for member in data.members)
    named = ["--model-name", data.focus]
    steps = [
        ("Classify new images:", ["predict", *named, "FOLDER", "--to", "answers.csv"], exportable),
        ("Score it on labelled images from elsewhere:", ["evaluate", "--data", "FOLDER", *named], exportable),
        ("Write it as one file:", ["export", *named, "--formats", "onnx"], exportable),
        ("Add predictions of further models:", ["import-predictions", "--from", "FOLDER"], not exportable),
    ]
    return [
        {"purpose": purpose, "command": _as_typed(words, config, data)} for purpose, words, applies in steps if applies
    ]


def _as_typed(words: Sequence[str], config: Config, data: ReportData) -> str:
    """Return a command line with the options that name this workspace and this configuration."""
    common = [*_config_options(config, data.workspace.config), "--workspace", str(data.workspace.base)]
    common += ["--output", str(data.workspace.output)] if data.workspace.output else []
    return as_typed(shlex.join([*PROGRAM, *words, *common]))


def _config_source(config: Config, config_path: Path) -> str:
    """Return the file of the values, also if the workspace remembers them."""
    origin = remembered.origin_of(config_path) if remembered.is_used(config_path, config) else None
    return origin[0] if origin else str(config.source)


def _config_options(config: Config, config_path: Path) -> list[str]:
    """Return the options that give a command these values; none if the workspace remembers them."""
    return (
        [] if remembered.is_used(config_path, config) else ["--config", str(config.source), *config_overrides(config)]
    )


def config_overrides(config: Config) -> list[str]:
    """Return `--set KEY=VALUE` options for every value that differs from the file."""
    if not Path(config.source).is_file():
        return []
    options: list[str] = []

    def compare(value: Any, file_value: Any, key: str) -> None:
        if isinstance(value, dict) and isinstance(file_value, dict):
            for name in value:
                compare(value[name], file_value.get(name), f"{key}.{name}" if key else name)
        elif value != file_value:
            options.extend(("--set", f"{key}={_value(value)}"))

    compare(config.as_dict(), config_file.load_config(Path(config.source)).as_dict(), "")
    return options


def _value(value: Any) -> str:
    if isinstance(value, list):
        return f"[{','.join(map(_value, value))}]"
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    return str(value)
