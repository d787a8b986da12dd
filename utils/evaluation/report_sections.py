"""The parts of the report as the template wants them: rows of tables, figures, sentences."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from utils.building.command_hints import build_command
from utils.core import config_file
from utils.core.config import Config
from utils.core.display_text import (
    NOT_MEASURED,
    format_count,
    format_interval,
    format_number,
    format_percent,
    join_names,
)
from utils.evaluation import report_figures, report_summary
from utils.evaluation.example_images import ExampleImage
from utils.evaluation.report_data import ReportData, without_temperature
from utils.evaluation.thumbnails import Thumbnail, thumbnail
from utils.numeric.metrics import reliability
from utils.numeric.pareto import pareto_front

KINDS = {
    "wrong": "Surely wrong",
    "disputed": "Most disputed",
    "mislabelled": "Likely mislabelled",
}
NONE = "-"
MOST_CELLS = 200  # classes; a larger confusion matrix is a grey field
MOST_CLASSES = 60  # rows of the per-class table that are shown at once


def cards(data: ReportData) -> list[dict[str, str]]:
    """The figures that everyone asks for first."""
    found, bounds = data.evaluated, data.evaluated.get("ci95") or {}
    spread = format_interval([100 * bound for bound in bounds["accuracy"]], 1) if bounds.get("accuracy") else ""
    latency, size = _latency(found), found.get("size_mb")
    return [
        {"word": "Accuracy", "value": format_percent(found["accuracy"]), "more": spread},
        {
            "word": "F1 macro",
            "value": format_number(found["f1_macro"], 3),
            "more": format_interval(bounds.get("f1_macro"), 3),
        },
        {
            "word": "Log-loss",
            "value": format_number(found["log_loss"], 3),
            "more": format_interval(bounds.get("log_loss"), 3),
        },
        {"word": "Calibration error", "value": format_percent(found["ece"]), "more": ""},
        {
            "word": "One image",
            "value": NOT_MEASURED if latency is None else f"{latency:.1f} ms",
            "more": _device(found),
        },
        {"word": "Weights", "value": NOT_MEASURED if size is None else f"{size:,.1f} MB", "more": ""},
    ]


def ranking(data: ReportData) -> dict[str, Any]:
    """Rows of the ranking, and a forest plot for accuracy and for log-loss."""
    rows = []
    for row in data.ranking["rows"]:
        record = data.metrics.get(row["name"], {})
        bounds = record.get("ci95") or row.get("ci95") or {}
        unseen = record.get("crossfit") or {}
        marks = [mark for mark in ("contaminated", "optimistic") if row.get(mark)]
        marks += ["recommended"] if row["name"] == data.ranking["recommended"]["name"] else []
        rows.append(
            {
                "rank": NONE if row["rank"] is None else row["rank"],
                "name": row["name"],
                "kind": row["kind"],
                "marks": marks,
                "accuracy": format_percent(row["accuracy"]),
                "accuracy_ci": format_interval([100 * bound for bound in bounds["accuracy"]], 1)
                if bounds.get("accuracy")
                else "",
                "f1": format_number(row["f1_macro"]),
                "log_loss": format_number(row["log_loss"]),
                "log_loss_ci": format_interval(bounds.get("log_loss")),
                "ece": format_number(row["ece"]),
                "unseen": format_number(unseen["log_loss"]) if unseen.get("log_loss") is not None else NONE,
            }
        )
    return {"rows": rows, "figures": [_forest(data, "accuracy"), _forest(data, "log_loss")]}


def _forest(data: ReportData, metric: str) -> dict[str, str]:
    bars, measured = [], False
    for row in data.ranking["rows"]:
        record = data.metrics.get(row["name"], row)
        low, high = (record.get("ci95") or {}).get(metric) or (None, None)
        measured |= low is not None
        marked = row["name"] == data.focus
        bars.append(report_figures.Bar(row["name"], record[metric], low, high, row["kind"], marked))
    word = "Accuracy" if metric == "accuracy" else "Log-loss"
    better = "further right is better" if metric == "accuracy" else "further left is better"
    lines = "lines are 95 % bootstrap intervals" if measured else "intervals are not measured"
    label = f"{word} of {format_count(len(bars), 'model')} on {data.split}; {better}; {lines}"
    legend = f"Diamond: {data.focus}. Circles: ensembles. Squares: single members."
    return {"title": word, "svg": report_figures.forest(bars, word.lower(), label), "caption": f"{label}. {legend}"}


def cost(data: ReportData) -> dict[str, Any]:
    """Fronts of accuracy against latency and against size, with the figures of every model."""
    latencies = {name: _latency(record) for name, record in data.metrics.items()}
    sizes = {name: record.get("size_mb") for name, record in data.metrics.items()}
    figures, fronts = [], {}
    axes = (("latency", "milliseconds for one image (median)", latencies), ("size", "MB of weights", sizes))
    for kind, axis, costs in axes:
        points = {name: (cost, data.metrics[name]["accuracy"]) for name, cost in costs.items() if cost is not None}
        fronts[kind] = _front(points)
        if not points:
            figures.append({"title": axis, "svg": "", "caption": f"Accuracy against {axis}: {NOT_MEASURED}."})
            continue
        best = join_names(sorted(fronts[kind]), 8)
        label = f"Accuracy against {axis}. No other model is both cheaper and better than {best}"
        svg = report_figures.front(points, fronts[kind], data.focus, axis, label)
        figures.append({"title": axis, "svg": svg, "caption": f"{label}."})
    rows = [
        {
            "name": name,
            "accuracy": format_percent(data.metrics[name]["accuracy"]),
            "latency": format_number(latencies[name], 2),
            "batch": format_number(_latency(data.metrics[name], "batch_32"), 1),
            "size": format_number(sizes[name], 2),
            "front": " and ".join(kind for kind in fronts if name in fronts[kind]) or NONE,
        }
        for name in data.metrics
    ]
    return {"figures": figures, "rows": rows, "device": _device(data.evaluated)}


def _front(points: Mapping[str, tuple[float, float]]) -> set[str]:
    """Names of the points {name: (cost, score)} on the Pareto front of low cost and high score."""
    names = list(points)
    costs = np.array([(cost, -score) for cost, score in points.values()]).reshape(-1, 2)
    return {name for name, is_on_front in zip(names, pareto_front(costs), strict=True) if is_on_front}


def _latency(record: Mapping[str, Any], batch: str = "batch_1") -> float | None:
    return ((record.get("latency_ms") or {}).get(batch) or {}).get("p50")


def _device(record: Mapping[str, Any]) -> str:
    found = record.get("latency_ms") or {}
    return f"{found.get('device')}, {format_count(found['threads'], 'thread')}" if found.get("threads") else ""


def calibration(data: ReportData) -> dict[str, Any]:
    """Reliability diagrams of the best single model and of the focus, before and after its temperature."""
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
    words = {
        True: f"{data.focus} carries no temperature, so there is no before and after.",
        False: f"Its temperature of {temperature:.3g} was fitted on rows that are not shown here."
        if temperature
        else "",
    }[before is None]
    label = "Reliability diagrams: accuracy against confidence, on the diagonal where the model is calibrated"
    svg = report_figures.reliability(panels, label) if panels else ""
    caption = f"{label}. Bars: how many rows have that confidence. {words}"
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
    """Risk against coverage, and conformal sets."""
    curves = {}
    for name in dict.fromkeys([data.focus, *data.peers.values()]):
        found = data.metrics[name].get("selective") or {}
        if found.get("coverage") and found.get("risk"):
            curves[name] = (found["coverage"], found["risk"])
    label = "Error rate against the share of images that are answered, the surest first; lower is better"
    svg = report_figures.risk_coverage(curves, label) if curves else ""
    sets = [
        {
            "kind": kind.upper(),
            "target": format_percent(1 - found["alpha"], 0),
            "coverage": format_percent(found.get("coverage")),
            "bounds": format_interval([100 * bound for bound in found["coverage_interval"]], 1)
            if found.get("coverage_interval")
            else "",
            "size": format_number(found.get("mean_size"), 2),
            "n": found.get("n", NOT_MEASURED),
        }
        for kind, found in (data.evaluated.get("conformal") or {}).items()
        if isinstance(found, Mapping) and found.get("alpha") is not None
    ]
    selective = data.evaluated.get("selective") or {}
    return {
        "figure": {"svg": svg, "caption": f"{label}." if svg else f"{label}: {NOT_MEASURED}."},
        "sets": sets,
        "aurc": format_number(selective.get("aurc")),
        "threshold": selective.get("threshold"),
        "wanted_error": selective.get("wanted_error"),
        "answered": format_percent(selective.get("answered")),
        "error": format_percent(selective.get("error")),
        "foreign": _foreign(data.evaluated.get("out_of_distribution")),
    }


def _foreign(found: Mapping[str, Any] | None) -> str:
    """How many rows look unlike the val rows, in words."""
    beyond = {key: found[key]["beyond"] for key in ("energy", "max_logit") if found and found.get(key)}
    if not found or not beyond:
        return ""
    words = " and ".join(f"{format_percent(share)} by {key.replace('_', ' ')}" for key, share in beyond.items())
    return (
        f"Rows less familiar than 95 % of the val rows: {words}, where 5 % are usual ({found.get('limits', 'a hint')})."
    )


def errors(data: ReportData) -> dict[str, Any]:
    """Confusion matrices, the most frequent confusions, figures per class."""
    figures = []
    for name in dict.fromkeys([data.focus, *data.peers.values()]):
        record = data.metrics[name]
        classes = [name for name in data.classes if name in record["per_class"]]
        if len(classes) > MOST_CELLS:
            figures.append(
                {"title": name, "svg": "", "caption": f"{name}: {len(classes)} classes are too many to draw."}
            )
            continue
        wrong = record["n_samples"] - int(np.trace(np.asarray(record["confusion_matrix"])))
        label = (
            f"Confusion matrix of {name}: {format_count(wrong, 'error')} on {format_count(record['n_samples'], 'row')}"
        )
        svg = report_figures.confusion(record["confusion_matrix"], classes, label)
        figures.append({"title": name, "svg": svg, "caption": f"{label}. Darker: a larger share of the true class."})
    single = data.peers.get("best_single")
    others = data.metrics[single]["per_class"] if single else {}
    rows = [
        {
            "name": name,
            "precision": format_number(own["precision"], 3),
            "recall": format_number(own["recall"], 3),
            "f1": format_number(own["f1"], 3),
            "single": format_number(others[name]["f1"], 3) if name in others else NONE,
            "support": own["support"],
        }
        for name in data.classes
        if (own := data.evaluated["per_class"].get(name)) is not None
    ]
    return {"figures": figures, "pairs": report_summary.confused(data), "rows": rows, "single": single}


def members(data: ReportData) -> dict[str, Any] | None:
    """Who adds what; None where there are no two members with honest rows in common."""
    found = data.contributions
    if found is None:
        return None
    weights = data.record.get("weights") or {}
    rows = [
        {
            "name": name,
            "weight": format_percent(weights[name]) if name in weights else NONE,
            "accuracy": format_percent(found.accuracy[place]),
            "log_loss": format_number(found.log_loss[place]),
            "without": f"{found.without[place]:+.4f}",
            "alone": int(found.only_correct[place]),
        }
        for place, name in enumerate(found.names)
    ]
    label = f"Correlation of the errors of each pair of {len(found.names)} members; 0 where they err independently"
    svg = report_figures.pairs(found.pairs.error_correlation, found.names, label)
    average = found.pairs.mean_among(range(len(found.names))) or {}
    return {
        "rows": rows,
        "n": f"{found.rows:,}",
        "mean_log_loss": format_number(found.mean_log_loss),
        "figure": {"svg": svg, "caption": f"{label}. Members that err on different images help each other."},
        "average": {key.replace("_", " "): format_number(value, 3) for key, value in average.items()},
        "weighted": bool(weights),
        "why": (data.evaluated.get("notes") or {}).get("weights", ""),
    }


def images(data: ReportData) -> list[dict[str, Any]]:
    """The example images by kind, with thumbnails where there are images."""
    groups = []
    for kind, title in KINDS.items():
        items = [_image(data, item) for item in data.examples if item.kind == kind]
        if items:
            groups.append({"kind": kind, "title": title, "images": items})
    return groups


def _image(data: ReportData, item: ExampleImage) -> dict[str, Any]:
    label, predicted = data.classes[item.label], data.classes[item.predicted]
    image = Thumbnail(None, problem="")
    if data.catalog.has_images:
        image = thumbnail(data.workspace.split_dir / item.split / item.sample_id)
    predictions = [
        {
            "member": prediction.member,
            "predicted": data.classes[prediction.predicted],
            "probability": format_percent(prediction.probability, 0),
            "agrees": prediction.predicted == item.label,
        }
        for prediction in item.member_predictions
    ]
    agreeing = sum(prediction["agrees"] for prediction in predictions)
    words = f"label {label}; {data.focus} predicts {predicted} ({format_percent(item.probability, 0)})"
    if item.predicted != item.label:
        words += f", {label} has {format_percent(item.label_probability, 0)}"
    summary = f"{agreeing} of {len(predictions)} members predict {label}" if predictions else ""
    return {
        "id": f"{item.split}/{item.sample_id}",
        "words": words,
        "summary": summary,
        "disagreement": "" if item.disagreement is None else f"disagreement {item.disagreement:.2f} nats",
        "thumbnail": image,
        "alt": f"Image {item.sample_id}, {words}",
        "predictions": predictions,
    }


def provenance(config: Config, data: ReportData) -> dict[str, Any]:
    """What was fitted and chosen on which rows, by which code and weights, and the commands that do it again."""
    record = data.evaluated
    rows = [
        {
            "use": use,
            "split": part["split"],
            "rows": part["rows"].replace("_", " "),
            "n": part["n"],
            "digest": part["digest"][:12],
        }
        for use, key in (("fitted on", "fitted_on"), ("chosen on", "selected_on"))
        for part in record.get(key) or ()
    ]
    own = [
        {
            "name": member.name,
            "architecture": member.architecture,
            "source": member.source,
            "digest": member.digest[:12],
        }
        for member in data.members
    ]
    base_back = data.catalog.base_back
    facts = {
        "project": f"{config.project.name}, version {config.project.version}",
        "written": record.get("created"),
        "seed": record.get("seed"),
        "configuration": f"{config.source}, digest {config.digest()[:12]}",
        "workspace": str(data.workspace.base),
        "output": str(data.workspace.output) if data.workspace.output else None,
        "base pipeline": f"{base_back.get('kind')}, digest {str(base_back.get('digest'))[:12]}",
        "inputs": str(data.ranking.get("inputs_digest", ""))[:12] or None,
        "versions": ", ".join(f"{name} {version}" for name, version in (record.get("versions") or {}).items()),
    }
    return {
        "rows": rows,
        "members": own,
        "facts": {key: value for key, value in facts.items() if value not in (None, "")},
        "commands": commands(config, data),
        "unmeasured": sorted((record.get("notes") or {}).items()),
    }


def commands(config: Config, data: ReportData) -> list[str]:
    """What to type to make this page again, and to use what it recommends."""
    common = ["--config", str(config.source), *_overrides(config), "--workspace", str(data.workspace.base)]
    common += ["--output", str(data.workspace.output)] if data.workspace.output else []
    program = ["python", "ensemble_orchestrator.py"]
    lines = [[*program, "discover"]]
    if data.record:
        lines.append(build_command(data.focus).split())
    lines.append([*program, "evaluate", "--force", *([] if data.split == "test" else ["--split", data.split])])
    found = [shlex.join([*line, *common]) for line in lines]
    return [
        *found,
        shlex.join([*program, "predict", "--model-name", data.focus, "FOLDER", "--to", "answers.csv", *common]),
    ]


def _overrides(config: Config) -> list[str]:
    """`--set KEY=VALUE` for every value that is not the file's."""
    if not Path(config.source).is_file():
        return []
    found: list[str] = []

    def compare(own: Any, other: Any, place: str) -> None:
        if isinstance(own, dict) and isinstance(other, dict):
            for key in own:
                compare(own[key], other.get(key), f"{place}.{key}" if place else key)
        elif own != other:
            found.extend(("--set", f"{place}={_value(own)}"))

    compare(config.as_dict(), config_file.load_config(Path(config.source)).as_dict(), "")
    return found


def _value(value: Any) -> str:
    if isinstance(value, list):
        return f"[{','.join(map(_value, value))}]"
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    return str(value)
