"""The summary of the report in sentences: which model to use, how reliable it is, and where it fails."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from utils.core.display_text import (
    format_count,
    format_interval,
    format_number,
    format_p_value,
    format_percent,
    join_names,
)
from utils.evaluation.report.report_data import ReportData, busy_cores, median_milliseconds
from utils.numeric.calibration_chance import calibration_verdict
from utils.numeric.metrics import METRICS

ROWS = {"oof+val": "out-of-fold predictions of train and predictions of val", "val": "predictions of val"}
MIN_ROWS = 500  # evaluated rows, below which the summary warns of wide intervals


def summary(data: ReportData) -> list[tuple[str, str]]:
    """Return (topic, sentences), most important first."""
    parts = [
        ("Recommendation", [_recommendation(data), _fast(data)]),
        ("On test" if data.split == "test" else f"On {data.split}", [_on_split(data), _first_in_ranking(data)]),
        ("Comparison", [*_comparisons(data), _baselines(data)]),
        ("Calibration", [_calibration(data)]),
        ("Errors", [_weakest_class(data)]),
        ("Abstention", [_uncertainty(data)]),
        ("Cost", [_cost(data)]),
    ]
    joined = [(topic, " ".join(filter(None, sentences))) for topic, sentences in parts]
    return [(topic, text) for topic, text in joined if text]


def warnings(data: ReportData, background: str = "") -> list[str]:
    """Return reasons not to rely on the scores, and what is not shown; `background` is the warning by the maps."""
    messages = [background] if background else []
    contaminated = [row["name"] for row in data.ranking["rows"] if row.get("contaminated")]
    optimistic = [row["name"] for row in data.ranking["rows"] if row.get("optimistic")]
    if contaminated:
        messages.append(f"Fitted on evaluated rows and therefore not ranked: {join_names(contaminated)}.")
    unknown = [row["name"] for row in data.ranking["rows"] if row.get("unknown_training_data")]
    if unknown:
        sources = sorted({name for row in data.ranking["rows"] for name in row.get("unknown_training_data") or ()})
        messages.append(
            f"The training data of {join_names(sources)} is not stated and may include the evaluated rows. "
            f"Therefore not ranked: {join_names(unknown)}."
        )
    for name, record in data.metrics.items():
        if suspicion := (record.get("notes") or {}).get("trained_on"):
            messages.append(f"The stated training data of {name} is in doubt: {suspicion}.")
    if optimistic:
        names = "all models" if len(optimistic) == len(data.ranking["rows"]) else join_names(optimistic)
        messages.append(f"The evaluated rows were used to select {names}, so the scores are optimistic.")
    if slowed := busy(data):
        messages.append(slowed)
    dropped = (data.evaluated.get("overlap") or {}).get("dropped")
    if dropped:
        messages.append(f"{format_count(dropped, 'row')} left out because the same image is in train or val.")
    bounds = (data.evaluated.get("ci95") or {}).get("accuracy")
    rows = data.evaluated["n_samples"]
    if rows < MIN_ROWS:
        interval = (
            f": the 95% interval of the accuracy is {format_interval([100 * bound for bound in bounds], 1)}%"
            if bounds
            else ""
        )
        messages.append(
            f"{data.split} has only {format_count(rows, 'row')}{interval}. Small differences are not meaningful."
        )
    return [*messages, *data.notes]


def busy(data: ReportData) -> str:
    """Return a warning that other programs slowed the timed models down; "" if they did not, or it is not known."""
    others = {name: value for name, record in data.metrics.items() if (value := busy_cores(record)) is not None}
    if not others:
        return ""
    were = "was" if len(others) == 1 else "were"
    which = "all models" if len(others) == len(data.metrics) > 1 else format_count(len(others), "model")
    return (
        f"Other programs used up to {max(others.values()):.1f} cores while {which} {were} timed, so the latencies are "
        f"too high. Remove {data.workspace.relative(data.workspace.latency)} and evaluate again on an idle machine."
    )


def _recommendation(data: ReportData) -> str:
    recommended = data.ranking["recommended"]
    evidence = recommended["evidence"]
    if recommended["name"] != data.focus:
        return (
            f"{recommended['name']} is recommended, but it has no metrics of {data.split}; this report is about "
            f"{data.focus} instead."
        )
    rule = evidence.get("after_selection")  # not in rankings of earlier versions
    note = f" {_sentence(recommended['note'])}" if recommended.get("note") else ""
    selected = (
        ""
        if rule is None
        else f" On new images expect a log-loss of {_loss(rule)}: the mean over folds, each scored with the model that "
        "the other folds select."
    )
    return (
        f"Use {data.focus} ({recommended['reason']}). The recommendation is based on "
        f"{format_count(evidence['n'], 'out-of-sample row')} ({ROWS.get(evidence['rows'], evidence['rows'])}): "
        f"log-loss {_loss(evidence)}, accuracy {format_percent(evidence['accuracy'])}.{selected}{note}"
    )


def _loss(scores: Mapping[str, Any]) -> str:
    interval = scores["log_loss_ci95"]
    return format_number(scores["log_loss"]) + (f" {format_interval(interval)}" if interval else "")


def _sentence(text: str) -> str:
    return f"{text[:1].upper()}{text[1:]}."


def _fast(data: ReportData) -> str:
    """Return a sentence on the recommended fast model, with its cost and that of the recommended one."""
    fast, recommended = data.ranking.get("recommended_fast") or {}, data.ranking["recommended"]
    if fast.get("name") is None:
        return ""
    if fast["name"] == recommended["name"]:
        return f"It is also the cheapest within one standard error ({format_number(fast['latency_ms'], 1)} ms)."
    dearer = recommended.get("latency_ms")
    instead = "" if dearer is None else f" instead of {format_number(dearer, 1)} ms"
    return (
        f"Where time counts, use {fast['name']} (recommended_fast), {fast['reason']}: "
        f"{format_number(fast['latency_ms'], 1)} ms for one image{instead}, log-loss {_loss(fast['evidence'])}, "
        f"accuracy {format_percent(fast['evidence']['accuracy'])}."
    )


def _on_split(data: ReportData) -> str:
    record = data.evaluated
    ranked = [row for row in data.ranking["rows"] if row["rank"] is not None]
    rank = next((row["rank"] for row in ranked if row["name"] == data.focus), None)
    position = f"; it is number {rank} of {len(ranked)} by {data.ordered_by}" if rank is not None else ""
    bounds = (record.get("ci95") or {}).get("accuracy")
    interval = f" (95% interval {format_percent(bounds[0])} to {format_percent(bounds[1])})" if bounds else ""
    unused = ", which were not used for the recommendation," if data.split == "test" else ""
    return (
        f"On the {data.counted_rows}{unused} its accuracy is {format_percent(record['accuracy'])}{interval}{position}."
    )


def _comparisons(data: ReportData) -> list[str]:
    comparisons = []
    for kind, title in (("best_single", "the best single model"), ("soft_voting", "soft voting")):
        comparison = data.evaluated.get(f"vs_{kind}")
        if comparison and comparison.get("name") != data.focus:
            comparisons.append(_measured_difference(comparison, f"{title} ({comparison['name']})"))
        elif kind in data.peers:
            peer = data.peers[kind]
            difference = data.evaluated["accuracy"] - data.metrics[peer]["accuracy"]
            comparisons.append(
                f"Compared with {title} ({peer}): {100 * difference:+.1f} percentage points of accuracy; the interval "
                "is not measured."
            )
    return comparisons


def _measured_difference(comparison: Mapping[str, Any], title: str) -> str:
    low, high = comparison["delta_ci95"] or (None, None)
    p = comparison.get("p_value", comparison.get("mcnemar_p"))  # the latter in records of earlier versions
    name = "the sign-flip test of groups" if comparison.get("test") == "sign_flip" else "McNemar's exact test"
    test = f", {format_p_value(p)} by {name}" if p is not None else ""
    difference = f"Compared with {title}: {100 * comparison['delta_accuracy']:+.1f} percentage points of accuracy"
    if low is None or high is None:
        return f"{difference}{test}.{_calibrated_difference(comparison)}"
    verdict = "it is better" if low > 0 else "it is worse" if high < 0 else "the difference is not significant"
    interval = f"[{100 * low:+.1f}, {100 * high:+.1f}]"
    return f"{difference} {interval}{test}: {verdict}.{_calibrated_difference(comparison)}"


def _calibrated_difference(comparison: Mapping[str, Any]) -> str:
    """Return a sentence on the difference in log-loss after temperature scaling; "" for records of earlier versions."""
    difference, interval = (comparison.get(f"delta_calibrated_log_loss{end}") for end in ("", "_ci95"))
    if difference is None:
        return ""
    bounds = f" [{interval[0]:+.4f}, {interval[1]:+.4f}]" if interval else ""
    return f" After temperature scaling of both, its log-loss differs by {difference:+.4f}{bounds} nats."


def _baselines(data: ReportData) -> str:
    verdict = data.record.get("verdict")
    return f"Compared with the baselines on out-of-sample rows, it {verdict}." if verdict else ""


def _calibration(data: ReportData) -> str:
    error, chance = data.evaluated["ece"], data.evaluated.get("ece_by_chance")
    measured = f"the expected calibration error is {format_percent(error)}"
    if chance is None:  # a record of an earlier version
        return f"Of its probabilities, {measured}."
    return (
        f"Its probabilities are {calibration_verdict(error, chance)}: {measured}, and chance alone gives a perfectly "
        f"calibrated model up to {format_percent(chance['quantile'])} on so many rows."
    )


def _weakest_class(data: ReportData) -> str:
    classes = {name: scores for name, scores in data.evaluated["per_class"].items() if scores["support"]}
    if len(classes) < 2:
        return ""
    name = min(classes, key=lambda key: (classes[key]["f1"], key))
    scores = classes[name]
    if scores["f1"] == 1:
        return "It makes no error on these rows."
    weakest = (
        f"Its lowest F1 is that of class {name} (F1 {format_number(scores['f1'], 3)}, recall "
        f"{format_number(scores['recall'], 3)}, {format_count(scores['support'], 'row')})"
    )
    pairs = most_confused(data)
    if not pairs:
        return f"{weakest}."
    truth, predicted, count, _ = pairs[0]
    return f"{weakest}; the most frequent error is {truth} predicted as {predicted} ({format_count(count, 'row')})."


def most_confused(data: ReportData, most: int = 10) -> list[tuple[str, str, int, int]]:
    """Return (true class, predicted class, count, rows of the true class), most frequent first."""
    names = [name for name in data.classes if name in data.evaluated["per_class"]]
    cells = [
        (names[row], names[column], count, sum(counts))
        for row, counts in enumerate(data.evaluated["confusion_matrix"] or ())
        for column, count in enumerate(counts)
        if row != column and count
    ]
    return sorted(cells, key=lambda cell: (-cell[2], cell[0], cell[1]))[:most]


def _uncertainty(data: ReportData) -> str:
    parts = []
    selective = data.evaluated.get("selective") or {}
    target = target_risk(selective)
    if selective.get("threshold") is not None and target is not None:
        parts.append(
            f"a confidence threshold of {format_percent(selective['threshold'])} targets an error rate of "
            f"{format_percent(target)} among the rows that are answered{_with_confidence(selective)}"
        )
    sets = (data.evaluated.get("conformal") or {}).get("lac")
    if sets:
        parts.append(
            f"conformal sets with a target coverage of {format_percent(1 - sets['alpha'])} contain the true class in "
            f"{format_percent(sets.get('coverage'))} of the rows, with {format_number(sets.get('mean_size'), 2)} "
            "classes on average"
        )
    text = "; ".join(parts)
    return _sentence(text) if text else ""


def _with_confidence(selective: Mapping[str, Any]) -> str:
    confidence = selective.get("confidence")  # not in records of earlier versions
    return "" if confidence is None else f", which val rows establish with {format_percent(confidence, 0)} confidence"


def target_risk(selective: Mapping[str, Any]) -> float | None:
    """Return the target selective risk of a record, which earlier versions stored only as `wanted_error`."""
    return selective.get("target_risk", selective.get("wanted_error"))


def _cost(data: ReportData) -> str:
    latency = median_milliseconds(data.evaluated)
    size = data.evaluated.get("size_mb")
    parts = [f"{format_number(latency, 1)} ms for one image"] if latency is not None else []
    parts += [f"{size:,.1f} MB of weights"] if size is not None else []
    members = len(data.evaluated["members"])
    return f"It runs {format_count(members, 'network')}: {' and '.join(parts)}." if parts else ""


def _first_in_ranking(data: ReportData) -> str:
    """Return a sentence on why the first model of the ranking is not the recommended one; "" if it is."""
    first = data.ranking["rows"][0]
    if first["name"] == data.focus or first["rank"] is None:
        return ""
    metric = data.ranking["order"][0]
    if first["name"] not in data.metrics or metric not in METRICS:
        return ""
    values = format_number(data.metrics[first["name"]][metric]), format_number(data.evaluated[metric])
    return (
        f"{first['name']} ranks first on {data.split} ({data.ordered_by} {values[0]}, compared with {values[1]}). It "
        f"is not recommended on that ground: selecting the best of many models on {data.split} overestimates it."
    )
